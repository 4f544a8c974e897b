"""`make run-<worker>` and `make serve-<worker>`: the image, by its name, with the files that it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import images, start


def test_layers_have_their_size_from_the_history() -> None:
    with_a_layer = [
        "RUN /bin/sh -c set -eux; ln -s a b # buildkit",
        "/bin/sh -c apt-get update",
        "WORKDIR /app",
    ]
    without = ["ENV PATH=/usr/local/bin", '/bin/sh -c #(nop)  CMD ["python3"]', 'CMD ["python"]']
    empty = [(instruction, 0) for instruction in (*with_a_layer, *without)]
    history = [("# debian.sh --arch 'amd64'", 78_000_000), *empty, ("COPY shared shared # buildkit", 40_000)]
    sizes = [(layer.digest, layer.bytes) for layer in images.assign(list("01234"), history)]
    assert sizes == [("0", 78_000_000), ("1", 0), ("2", 0), ("3", 0), ("4", 40_000)]
    with pytest.raises(ValueError, match="6 layers, but 5"):
        images.assign(list("012345"), history)


def test_an_image_is_called_what_the_bake_file_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REGISTRY", raising=False)
    monkeypatch.delenv("TAG", raising=False)
    assert images.image("llava") == "docker.io/example/worker-llava:dev"
    monkeypatch.setenv("REGISTRY", "r.example/me")
    monkeypatch.setenv("TAG", "1.4.2")
    assert images.image("llava") == "r.example/me/worker-llava:1.4.2"


def test_the_files_that_variables_name_are_mounted_where_they_are(tmp_path: Path) -> None:
    env = {"MODEL_NAME": str(tmp_path), "SERVED_MODEL_NAME": "a/b", "X": "/nowhere/at/all"}
    assert start.mounts(env) == [f"--volume={tmp_path}:{tmp_path}:ro"]
