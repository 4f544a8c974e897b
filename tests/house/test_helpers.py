"""The guard of the event loop: it counts what blocks the loop, not what other processes take of the cores."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.helpers import longest_stall


@pytest.mark.parametrize("block", [lambda: time.sleep(0.15), lambda: sum(range(30_000_000))])
async def test_what_blocks_the_loop_is_a_stall(block: Callable[[], None]) -> None:
    with longest_stall() as stall:
        await asyncio.sleep(0.02)
        block()
        await asyncio.sleep(0.02)
    assert stall[0] > 0.1


@pytest.fixture
def busy_machine() -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(12)]
    yield
    for process in busy:
        process.kill()
        process.wait()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux counts the time without a core")
async def test_a_busy_machine_is_no_stall(busy_machine: None) -> None:
    with longest_stall() as stall:
        for _ in range(6):
            sum(range(1_000_000))  # some 20 ms, many times that among the others
            await asyncio.sleep(0.001)
    assert stall[0] < 0.1
