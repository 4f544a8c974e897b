"""make size, and what runs an image in place of a handler's file. The images themselves: tests/images."""

from __future__ import annotations

from pathlib import Path

import pytest

from local.__main__ import _assignment
from local.containers import Container
from tools import images, start
from tools.images import Layer

A, B, C, D = (Layer(name, size, "RUN x") for name, size in [("a", 100), ("b", 5000), ("c", 300), ("d", 20)])
# Twice the same contents, but not on the same layers below.
BUILT = {"one": [A, B, C, D], "two": [A, B, D], "three": [A, C, D]}


def test_unique_is_what_no_other_image_begins_with() -> None:
    assert images.unique(BUILT) == {"one": [C, D], "two": [D], "three": [C, D]}
    assert images.unique({"one": [A, B]}) == {"one": [A, B]}


def test_the_table_counts_what_is_shared_once() -> None:
    big = {
        name: [Layer(layer.digest, layer.bytes * 1_000_000, layer.made_by) for layer in found]
        for name, found in BUILT.items()
    }
    lines = images.table(big).splitlines()
    assert lines[1].split() == ["one", "5,420.0", "MB", "320.0", "MB", "5.9%"]
    assert lines[-1].split() == ["all", "together", "5,760.0", "MB"]


def test_layers_find_their_size_in_the_history() -> None:
    history = [
        ("# debian.sh --arch 'amd64'", 78_000_000),
        ("ENV PATH=/usr/local/bin", 0),
        ("RUN /bin/sh -c set -eux; ln -s a b # buildkit", 0),
        ('/bin/sh -c #(nop)  CMD ["python3"]', 0),
        ("/bin/sh -c apt-get update", 0),
        ("WORKDIR /app", 0),
        ("COPY shared shared # buildkit", 40_000),
        ('CMD ["python"]', 0),
    ]
    found = images.assign(["0", "1", "2", "3", "4"], history)
    assert [(layer.digest, layer.bytes) for layer in found] == [
        ("0", 78_000_000), ("1", 0), ("2", 0), ("3", 0), ("4", 40_000),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="6 layers, but 5"):
        images.assign(list("012345"), history)


def test_an_image_is_called_what_the_bake_file_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REGISTRY", raising=False)
    monkeypatch.delenv("TAG", raising=False)
    assert images.image("llava") == "docker.io/example/worker-llava:dev"
    monkeypatch.setenv("REGISTRY", "r.example/me")
    monkeypatch.setenv("TAG", "1.4.2")
    assert images.image("llava") == "r.example/me/worker-llava:1.4.2"


def test_a_container_gets_names_and_no_values() -> None:
    """What stands in a command can be read by every user of the machine."""
    command = Container("image:1", ["--gpus=all"]).command("abc", ["HF_TOKEN", "A"])
    assert command[:3] == ["docker", "run", "--rm"]
    assert command[-4:] == ["--env=A", "--env=HF_TOKEN", "--gpus=all", "image:1"]
    assert "--name=runpod-local-abc" in command


def test_a_variable_without_a_value_is_taken_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "x=y")
    assert _assignment("HERE") == ("HERE", "x=y")
    assert _assignment("A=b=c") == ("A", "b=c")
    with pytest.raises(Exception, match="NOT_HERE"):
        _assignment("NOT_HERE")


def test_the_files_that_variables_name_are_mounted_where_they_are(tmp_path: Path) -> None:
    env = {"MODEL_NAME": str(tmp_path), "SERVED_MODEL_NAME": "a/b", "X": "/nowhere/at/all"}
    assert start.mounts(env) == [f"--volume={tmp_path}:{tmp_path}:ro"]
