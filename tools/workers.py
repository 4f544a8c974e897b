"""Finds the workers, by looking into workers/, and imports their modules."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def worker_names(root: Path = ROOT) -> list[str]:
    """The folders of workers/ that hold a file, sorted. A leftover __pycache__ makes no worker."""
    return sorted({path.parent.name for path in root.glob("workers/*/*") if path.is_file()})


def load_module(name: str, module: str) -> ModuleType:
    """workers/<name>/<module>.py. A folder's name may hold a hyphen, which an `import` statement cannot.

    Raises ModuleNotFoundError when there is no such module.
    """
    return importlib.import_module(f"workers.{name}.{module}")


def load_handler(name: str) -> ModuleType:
    """workers/<name>/handler.py."""
    return load_module(name, "handler")
