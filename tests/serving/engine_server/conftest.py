from collections.abc import Iterator

import pytest

from serving.engine_server import reaper
from tests.serving.engine_server.watched import Watched


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Watched]:
    server = Watched()
    server.start()
    yield server
    server.stop()
    assert not server.dead.is_set()


@pytest.fixture
def server() -> Iterator[Watched]:
    """A server that this test may break."""
    server = Watched("--child")
    server.start()
    yield server
    session = server.pid
    server.stop()
    assert session is not None
    assert reaper.members(session) == []
