from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.helpers import one_torch_thread
from tests.workers.huggingface.in_process import serving


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def worker() -> Iterator[ModuleType]:
    """The handler's module with the tiny Llama loaded."""
    with serving(PREWARM="true") as module:
        yield module
