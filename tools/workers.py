"""Finds the workers, by looking into workers/, and imports their handlers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def worker_names(root: Path = ROOT) -> list[str]:
    """The folders of workers/ that hold a file, sorted. A leftover __pycache__ makes no worker."""
    return sorted({path.parent.name for path in root.glob("workers/*/*") if path.is_file()})


def load_handler(name: str, root: Path = ROOT) -> ModuleType:
    """Import workers/<name>/handler.py, once: a folder name may hold a hyphen, so `import` cannot.

    Raises FileNotFoundError when there is no such handler.
    """
    module_name = f"workers.{name}.handler"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, root / "workers" / name / "handler.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # pydantic looks a model's module up by name to read its annotations.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
