from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.shared.http.servers import Server, running


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One toy worker for the tests of a module that leave it as it was. 8 requests run and 8 wait."""
    with running() as toy:
        yield toy
