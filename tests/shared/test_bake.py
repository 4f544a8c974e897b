"""Baking a model into an image, against a hub on loopback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import bake
from shared.volume import resolve_model
from tests.hub import Hub, safetensors
from tests.machine import DEAD_HUB, content, use_machine

FILES = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}', "model.safetensors": safetensors(1000)}
TOKEN = "hf_ThisIsTheTokenOfATest"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_machine(tmp_path, hub, monkeypatch)


@pytest.mark.parametrize("secret", [True, False])
def test_a_baked_model_loads(hub: Hub, machine: Path, monkeypatch: pytest.MonkeyPatch, secret: bool) -> None:
    commit = hub.push("org/baked", {**FILES, "pytorch_model.bin": b"x"}, gated=TOKEN)
    monkeypatch.setenv("HUGGINGFACE_HUB_CACHE", str(machine / "of-the-base-image"))
    if secret:
        (machine / "secret").write_text(TOKEN + "\n")
        monkeypatch.setattr(bake, "TOKEN_FILE", machine / "secret")
    else:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert bake.main(["org/baked", "--to", str(machine / "models")]) == 0
    assert {path.name for path in (machine / "models").iterdir()} == {"models--org--baked", "CACHEDIR.TAG"}
    assert all(TOKEN.encode() not in data for data in content(machine / "models").values())
    assert list((machine / "volume").iterdir()) == []
    assert not Path(os.environ["HF_HOME"]).exists()
    monkeypatch.setenv("HF_ENDPOINT", DEAD_HUB)
    model = resolve_model("org/baked")
    assert (model.source, model.revision, content(model.path)) == ("baked", commit, FILES)


def test_an_error_of_baking_is_one_line(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["org/nothing", "--revision", "v1", "--to", str(machine / "models")]
    assert bake.main(arguments) == 1
    assert capsys.readouterr().err.count("\n") == 1
