"""What a generator yields to the SDK, which posts each yield and asks for the next when that is answered.

async for chunk in relay(client.stream(path, body)):  # the connection buffers in the meantime
    yield chunk
async for chunk in coalesce(tokens()):  # nothing else would buffer
    yield chunk
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext, suppress
from typing import ClassVar, TypeVar

from shared.errors import replace_lone_surrogates

STREAM_LIMIT = 1_000_000
"""Bytes that the platform takes in one post of a stream."""

_ENVELOPE = len('{"output": ""}')  # what the SDK puts around a chunk
_json = json.JSONEncoder(ensure_ascii=False).encode
_EVENT = re.compile(r".*?\n\n|.+", re.DOTALL)  # an event, or the end of a text that has no blank line
T = TypeVar("T")


async def relay(source: AsyncIterator[str], *, max_bytes: int = STREAM_LIMIT) -> AsyncGenerator[str]:
    """Yield what `source` yields, for a source that buffers by itself.

    Nothing runs while a chunk is posted, so many streams cost little. A text that takes more than `max_bytes`
    as the SDK posts it is split after blank lines, which end server-sent events, and between characters where
    an event alone is too long.

    An error of the source is raised. The source is closed as `coalesce` closes it, with one exception: when
    the job is cancelled while it waits for the source, the cancellation closes the source, and a second one
    would interrupt that. A source whose closing awaits nothing is not affected.
    """
    room = max_bytes - _ENVELOPE
    job = asyncio.current_task()
    assert job is not None
    async with _WhenJobEnds(job, lambda: [asyncio.create_task(_close(source))]):
        try:
            async for text in source:
                if _max_size(text) > room:
                    for chunk in _chunks(_EVENT.findall(text), room):
                        yield chunk
                elif text:
                    yield replace_lone_surrogates(text)
        except asyncio.CancelledError:
            if job.cancelling():
                raise
            raise _source_cancelled() from None


async def coalesce(source: AsyncIterator[str], *, max_bytes: int = STREAM_LIMIT) -> AsyncIterator[str]:
    """Yield the first unit of `source` at once, then each time all units that have arrived since, joined.

    A chunk takes at most `max_bytes` as the SDK posts it and is split between units. A unit that alone takes
    more, even a server-sent event, is split between characters: joined, the chunks are the text. The source
    is not asked for more while `max_bytes` are buffered.

    An error of the source is raised after all that it yielded before. The source is closed when it ends, when
    this generator is closed, and when the task that iterates this generator ends, however it does: the SDK
    does not close the generator of a job that it cancels. So the job's own task must do the iterating.
    """
    buffer = _Buffer(max_bytes - _ENVELOPE)
    reader = asyncio.create_task(_fill(buffer, source))
    job = asyncio.current_task()
    assert job is not None
    async with _WhenJobEnds(job, lambda: _cancel([reader])):
        while buffer or not reader.done():
            if buffer:
                yield buffer.take()
            else:
                await buffer.wait_until_filled()
        reader.result()


class _Buffer:
    """Units between a source and the SDK. `room`: the bytes of a chunk, and the limit of what is buffered.

    To measure a unit means to encode it, so units are measured only when an upper bound of their sizes
    reaches `room`: a fast consumer never pays for it.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._unmeasured: list[str] = []
        self._max_unmeasured = 0  # upper bound of their bytes
        self._measured: deque[tuple[str, int]] = deque()  # the older units, each with its bytes
        self._measured_bytes = 0
        self.full = False
        self._filled, self._taken = asyncio.Event(), asyncio.Event()

    def __bool__(self) -> bool:
        return bool(self._measured or self._unmeasured)

    def put(self, unit: str) -> None:
        self._unmeasured.append(unit)
        self._max_unmeasured += _max_size(unit)
        if self._measured_bytes + self._max_unmeasured >= self.room:
            self._measure()
            self.full = self._measured_bytes >= self.room
        self._filled.set()

    def take(self) -> str:
        """The oldest units, as many as fit into one chunk."""
        if not self._measured and self._max_unmeasured <= self.room:
            chunk = replace_lone_surrogates("".join(self._unmeasured))
            self._unmeasured.clear()
            self._max_unmeasured = 0
            return chunk
        self._measure()
        chunk, size = _take(self._measured, self.room)
        self._measured_bytes -= size
        self.full = self._measured_bytes >= self.room
        self._taken.set()
        return chunk

    async def wait_for_room(self) -> None:
        while self.full:
            self._taken.clear()
            await self._taken.wait()

    async def wait_until_filled(self) -> None:
        """Until a unit has arrived, or the source has ended."""
        self._filled.clear()
        await self._filled.wait()

    def end(self) -> None:
        self._filled.set()

    def _measure(self) -> None:
        parts = [part for unit in self._unmeasured for part in _split(unit, self.room)]
        self._measured += parts
        self._measured_bytes += sum(size for _, size in parts)
        self._unmeasured.clear()
        self._max_unmeasured = 0


async def _fill(buffer: _Buffer, source: AsyncIterator[str]) -> None:
    """Read `source` into `buffer` to its end, and close it."""
    reader = asyncio.current_task()
    assert reader is not None
    try:
        async with _closing(source):
            async for unit in source:
                if unit:
                    buffer.put(unit)
                    if buffer.full:
                        await buffer.wait_for_room()
    except asyncio.CancelledError:
        if reader.cancelling():
            raise
        raise _source_cancelled() from None
    finally:
        buffer.end()


async def merge_streams(sources: Sequence[AsyncIterator[T]]) -> AsyncGenerator[list[tuple[int, T]]]:
    """The items of several streams, each with its stream's index: a list has all items since the last one.

    The first item comes at once, alone or with what came at the same time. An error of a source is raised
    after the items that came before it. The sources are closed when all have ended, when this is closed and
    when the task that iterates this ends, as `coalesce` closes its source.
    """
    items: list[tuple[int, T]] = []
    changed = asyncio.Event()  # an item came, or a source ended

    async def read(index: int, source: AsyncIterator[T]) -> None:
        async with _closing(source):
            async for item in source:
                items.append((index, item))
                changed.set()

    def ended(reader: asyncio.Task[None]) -> None:
        if not reader.cancelled():
            reader.exception()  # asyncio logs those that nobody has looked at
        changed.set()

    readers = [asyncio.create_task(read(index, source)) for index, source in enumerate(sources)]
    for reader in readers:
        reader.add_done_callback(ended)
    job = asyncio.current_task()
    assert job is not None
    async with _WhenJobEnds(job, lambda: _cancel(readers)):
        while True:
            changed.clear()
            done = [reader for reader in readers if reader.done()]
            if items:
                batch, items[:] = items[:], []
                yield batch
                continue
            for reader in done:
                reader.result()
            if len(done) == len(readers):
                return
            await changed.wait()


class _WhenJobEnds:
    """Call `stop` once, when the block or the task `job` ends; the block ends after the tasks of `stop`.

    The end of the job matters where a generator is suspended in the block and nobody closes it.
    """

    _running: ClassVar[set[asyncio.Task[None]]] = set()  # the event loop itself holds tasks weakly

    def __init__(self, job: asyncio.Task[object], stop: Callable[[], list[asyncio.Task[None]]]) -> None:
        self._job, self._stop = job, stop
        self._stopping: list[asyncio.Task[None]] | None = None

    async def __aenter__(self) -> None:
        self._job.add_done_callback(self._stop_once)

    async def __aexit__(self, *_: object) -> None:
        self._job.remove_done_callback(self._stop_once)
        await asyncio.wait(self._stop_once())

    def _stop_once(self, _: object = None) -> list[asyncio.Task[None]]:
        if self._stopping is None:
            self._stopping = self._stop()
            self._running.update(self._stopping)
            for task in self._stopping:
                task.add_done_callback(self._running.discard)
        return self._stopping


def _cancel(readers: list[asyncio.Task[None]]) -> list[asyncio.Task[None]]:
    for reader in readers:
        if not reader.cancelling():  # a second cancellation would interrupt the closing of the source
            reader.cancel()
    return readers


def _max_size(text: str) -> int:
    """The most bytes that `text` can take in JSON, by its length alone."""
    return 6 * len(text)


def _size(text: str) -> int:
    """The bytes that `text` takes in JSON, without the quotes."""
    return len(_json(text).encode()) - 2


def _chunks(units: Iterable[str], room: int) -> Iterator[str]:
    """`units` joined into texts of at most `room` bytes."""
    parts = deque(part for unit in units for part in _split(unit, room))
    while parts:
        yield _take(parts, room)[0]


def _take(parts: deque[tuple[str, int]], room: int) -> tuple[str, int]:
    """Remove from `parts` the first ones, as many as `room` bytes hold; their text and bytes."""
    size, texts = 0, list[str]()
    while parts and (not texts or size + parts[0][1] <= room):
        text, more = parts.popleft()
        texts.append(text)
        size += more
    return "".join(texts), size


def _split(unit: str, room: int) -> list[tuple[str, int]]:
    """The unit, split if it takes more than `room` bytes; each part with its bytes."""
    unit = replace_lone_surrogates(unit)
    if (size := _size(unit)) <= room:
        return [(unit, size)]
    step = max(1, room // 24)  # a character takes at most 6 bytes, and four parts fill a chunk well
    parts = [unit[start : start + step] for start in range(0, len(unit), step)]
    return [(part, _size(part)) for part in parts]


def _source_cancelled() -> RuntimeError:
    """In place of a source's own CancelledError, which would end the job without an answer."""
    return RuntimeError("the source of the stream was cancelled")


async def _close(source: object) -> None:
    with suppress(Exception):  # nobody waits for the source any more
        async with _closing(source):
            pass


def _closing(source: object) -> AbstractAsyncContextManager[object]:
    """Close `source` at the end where it is a generator; other iterators hold nothing open."""
    return aclosing(source) if hasattr(source, "aclose") else nullcontext()
