"""Real models, each fetched once: where that cannot be, the tests are skipped with the cause."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tools.models import real


@pytest.fixture(scope="session")
def fetched() -> Callable[[str], Path]:
    """The folder of a real model by its key."""

    def fetch(key: str) -> Path:
        try:
            return real.folder(key)
        except real.Unavailable as problem:
            pytest.skip(str(problem))

    return fetch
