"""A machine for tests of model folders: an empty volume, image and disk, and a hub on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared import volume
from tests.hub import Hub

MODEL = "Org/Some-Model"
DEAD_HUB = "http://127.0.0.1:9"
CACHES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")


def use_machine(root: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`volume` is mounted; `models`, `store` and `cache`, the container's disk, may be made."""
    hub.mend()
    (root / "volume").mkdir()
    folders = {
        "RUNPOD_VOLUME_PATH": "volume",
        "BAKED_MODEL_DIR": "models",
        "RUNPOD_MODEL_STORE": "store",
        "XDG_CACHE_HOME": "cache",
    }
    for name, folder in folders.items():
        monkeypatch.setenv(name, str(root / folder))
    volume.leave_offline()
    for name in (*CACHES, "HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(root / "no-token"))
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder
