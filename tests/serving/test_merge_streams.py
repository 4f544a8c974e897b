"""Several streams as one, with a consumer that is slow in the way the SDK is."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator

import pytest

from serving.streaming import merge_streams
from tests.helpers import until


class Source:
    """A stream of numbers that notes when it has been closed."""

    def __init__(self, count: int, *, error: Exception | None = None, seed: int = 0) -> None:
        self.count, self.error, self.random = count, error, random.Random(seed)
        self.closed = False

    async def items(self) -> AsyncGenerator[int]:
        try:
            for number in range(self.count):
                await asyncio.sleep(self.random.choice([0, 0, 0.001]))
                yield number
            if self.error:
                raise self.error
        finally:
            await asyncio.sleep(0.01)  # must not be interrupted
            self.closed = True


@pytest.mark.parametrize("pause", [0, 0.002])
@pytest.mark.parametrize("count", [1, 3])
async def test_every_item_comes_once_and_in_order(count: int, pause: float) -> None:
    sources = [Source(20, seed=number) for number in range(count)]
    received: list[list[int]] = [[] for _ in sources]
    async for batch in merge_streams([source.items() for source in sources]):
        assert batch
        for index, item in batch:
            received[index].append(item)
        await asyncio.sleep(pause)
    assert received == [list(range(20))] * count
    assert all(source.closed for source in sources)


async def test_the_first_item_does_not_wait_and_later_ones_come_together() -> None:
    taken = asyncio.Event()

    async def items() -> AsyncGenerator[int]:
        yield 0
        await taken.wait()
        for number in range(1, 5):
            yield number

    stream = merge_streams([items()])
    assert await anext(stream) == [(0, 0)]
    taken.set()
    await asyncio.sleep(0.01)
    assert await anext(stream) == [(0, number) for number in range(1, 5)]
    assert [batch async for batch in stream] == []


async def test_an_error_comes_after_the_items_before_it_and_closes_the_others() -> None:
    bad, endless = Source(3, error=ValueError("bad")), Source(10**6)
    received: list[int] = []

    async def receive() -> None:
        async for batch in merge_streams([bad.items(), endless.items()]):
            received.extend(item for index, item in batch if index == 0)

    with pytest.raises(ValueError, match="bad"):
        await receive()
    assert received == [0, 1, 2]
    assert bad.closed
    assert endless.closed


@pytest.mark.parametrize("waiting", [True, False], ids=["for the source", "for the platform"])
async def test_sources_are_closed_when_the_job_is_cancelled(waiting: bool) -> None:
    """The SDK does not close the generator of a job that it cancels: it may still hold it."""
    source, begun = Source(10**6), asyncio.Event()
    stream = merge_streams([source.items()])

    async def job() -> None:
        async for _ in stream:
            begun.set()
            if not waiting:
                await asyncio.Event().wait()

    task = asyncio.create_task(job())
    await begun.wait()
    task.cancel()
    await asyncio.wait([task])
    await until(lambda: source.closed)
    await stream.aclose()
