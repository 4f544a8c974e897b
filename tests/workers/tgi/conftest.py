from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.workers.tgi.in_process import prepared


@pytest.fixture(scope="module")
def worker() -> Iterator[ModuleType]:
    with prepared() as module:
        yield module
