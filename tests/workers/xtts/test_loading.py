"""Folders of models: original checkpoints, pickles with code, folders of other models."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from shared.errors import StartError
from tests.helpers import error, send
from tests.workers.xtts.sounds import decoded, recording, wav
from tools.models import local_env

pytestmark = pytest.mark.engine


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the model, to be changed."""
    return Path(shutil.copytree(local_env("xtts")["MODEL_NAME"], tmp_path / "model"))


def test_an_original_checkpoint_in_a_folder_that_cannot_be_written(load: Any, folder: Path) -> None:
    """XTTS's own holds pickled settings by the names that their classes had then."""
    load().synthesizer.engine.close()  # imports TTS
    from TTS.tts.configs import xtts_config as now
    from TTS.tts.models import xtts as then

    def files() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}

    weights = torch.load(folder / "model.pth", weights_only=True)
    moved = [now.XttsArgs, now.XttsAudioConfig]
    for kind in moved:
        kind.__module__ = then.__name__
    try:
        torch.save({**weights, "config": now.XttsConfig()}, folder / "model.pth")
    finally:
        for kind in moved:
            kind.__module__ = now.__name__
    before = files()
    folder.chmod(0o555)
    try:
        load(MODEL_NAME=str(folder)).synthesizer.engine.close()
    finally:
        folder.chmod(0o755)
    assert files() == before


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (exec, (f"open({self.path!r}, 'w').close()",))


@pytest.mark.parametrize("name", ["model.pth", "speakers_xtts.pth"])
def test_no_code_of_a_checkpoint_is_run(load: Any, folder: Path, tmp_path: Path, name: str) -> None:
    torch.save({"model": Evil(tmp_path / "ran")}, folder / name)
    with pytest.raises(pickle.UnpicklingError):
        load(MODEL_NAME=str(folder))
    assert not (tmp_path / "ran").exists()


def test_folders_without_an_xtts(load: Any, folder: Path) -> None:
    with pytest.raises(StartError, match=r"DEFAULT_SPEAKER='Bob'.*Ana Florence"):
        load(MODEL_NAME=str(folder), DEFAULT_SPEAKER="Bob")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model": "vits"}))
    with pytest.raises(StartError, match="a vits model") as caught:
        load(MODEL_NAME=str(folder))
    assert caught.value.code == "unsupported_architecture"
    (folder / "vocab.json").unlink()
    with pytest.raises(StartError, match=r"has no vocab\.json"):
        load(MODEL_NAME=str(folder))


async def test_without_built_in_voices_and_in_bfloat16(
    worker: ModuleType, load: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "speakers_xtts.pth").unlink()
    engine = load(MODEL_NAME=str(folder), DTYPE="bfloat16")
    monkeypatch.setattr(worker, "engine", engine)
    assert (await error(worker.handler, text="Hello."))["code"] == "unknown_voice"
    assert (await send(worker.handler, voices=True))["default"] is None
    answer = await send(worker.handler, text="Hello world.", speaker_wav=wav(recording()))
    assert decoded(answer).any()
    engine.synthesizer.engine.close()
