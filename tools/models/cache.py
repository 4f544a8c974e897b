"""Folders of models in .cache/models, each made once."""

from __future__ import annotations

import hashlib
import inspect
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from tools.workers import ROOT

CACHE = ROOT / ".cache"


def made(name: str, build: Callable[[Path], object], *, version: str | None = None) -> Path:
    """The folder .cache/models/<name>, which `build` fills when it is new or its version has changed.

    version: None: the contents of `build`'s file.
    """
    folder = CACHE / "models" / name
    version = version or Path(inspect.getfile(build)).read_text()
    stamp = folder / hashlib.sha256(version.encode()).hexdigest()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{name}.lock"):
        if not stamp.exists():
            new = Path(tempfile.mkdtemp(dir=folder.parent))
            try:
                build(new)
                (new / stamp.name).touch()
                shutil.rmtree(folder, ignore_errors=True)
                new.rename(folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    # What mkdtemp and safetensors write is the maker's alone, and a container may run as another user.
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(path.stat().st_mode | 0o044)
    return folder
