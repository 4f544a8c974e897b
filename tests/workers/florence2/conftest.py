"""The tiny model, loaded once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tools.models import local_env
from tools.workers import load_handler


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    """The engine of the handler's module, as `prepare()` leaves it."""
    worker = load_handler("florence2")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in local_env("florence2").items():
            patch.setenv(name, value)
        worker.prepare()
    yield worker.loaded.engine
    del worker.loaded


@pytest.fixture(scope="session")
def processor(engine: Any) -> Any:
    return engine.processor
