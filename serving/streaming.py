"""What a generator yields to the SDK, which posts each yield and asks for the next when that is answered.

async for chunk in relay(sse_events(response.content.iter_any())):  # the body keeps what comes meanwhile
    yield chunk
async for chunk in coalesce(tokens()):  # here nobody else would
    yield chunk
"""

from __future__ import annotations

import asyncio
import codecs
import io
import json
import re
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext, suppress
from typing import TypeVar

from shared.errors import JobError, replace_lone_surrogates

STREAM_LIMIT = 1_000_000
"""Bytes that the platform takes in one post of a stream."""

_ENVELOPE = len('{"output": ""}')  # what the SDK puts around a chunk
_json = json.JSONEncoder(ensure_ascii=False).encode
_BLANKS = re.compile("\n{3,}")
_EVENT = re.compile(r".*?\n\n|.+", re.DOTALL)  # an event, or a text's last part
_closings: set[asyncio.Task[None]] = set()
T = TypeVar("T")


async def relay(source: AsyncIterator[str], *, max_bytes: int = STREAM_LIMIT) -> AsyncIterator[str]:
    """Yield what `source` gives, for one that gives at once all that has come since it was last asked.

    Nothing runs while a chunk is posted, so many streams cost little. What takes more than `max_bytes` as the
    SDK posts it is cut after blank lines, which end server-sent events, and where that does not do, between
    characters.

    An error of the source is raised as it comes. The source is closed as `coalesce` closes it, save that a
    job cancelled while it waits for the source closes it itself, which a second cancel would break into: a
    body that awaits nothing to be closed does not mind.
    """
    room = max_bytes - _ENVELOPE
    closing: list[asyncio.Task[None]] = []

    def stop(_: object = None) -> None:
        if not closing:
            closing.append(asyncio.get_running_loop().create_task(_close(source)))
            _closings.add(closing[0])
            closing[0].add_done_callback(_closings.discard)

    job = asyncio.current_task()
    assert job is not None
    job.add_done_callback(stop)
    try:
        async for text in source:
            if _at_most(text) > room:
                for chunk in _chunks(_EVENT.findall(text), room):
                    yield chunk
            elif text:
                yield replace_lone_surrogates(text)
    except asyncio.CancelledError:
        if job.cancelling():
            raise
        raise _gave_up() from None
    finally:
        job.remove_done_callback(stop)
        stop()
        await asyncio.wait(closing)


async def coalesce(source: AsyncIterator[str], *, max_bytes: int = STREAM_LIMIT) -> AsyncIterator[str]:
    """Yield what `source` gives: the first unit at once, then each time all that has come since.

    A chunk takes at most `max_bytes` as the SDK posts it and is cut between units of the source. A unit that
    alone takes more, be it a server-sent event, is cut between characters: joined, the chunks are the text.
    While `max_bytes` wait to be taken the source is not asked for more.

    An error of the source is raised after all that came before it. The source is closed when it ends, when
    this is closed and when the task that iterates this ends, however it does: the SDK does not close the
    generator of a job that it cancels. So the job's own task must do the iterating.
    """
    room = max_bytes - _ENVELOPE
    waiting: deque[tuple[str, int]] = deque()  # each with its bytes
    fresh: list[str] = []  # what is not measured yet: together at most `guess` bytes
    held = guess = 0
    arrived, taken = asyncio.Event(), asyncio.Event()

    def measure() -> None:
        nonlocal held, guess
        for unit in fresh:
            for piece in _pieces(unit, room):
                waiting.append(piece)
                held += piece[1]
        fresh.clear()
        guess = 0

    async def read() -> None:
        nonlocal guess
        try:
            async with _closing(source):
                async for unit in source:
                    if not unit:
                        continue
                    fresh.append(unit)
                    guess += _at_most(unit)
                    arrived.set()
                    if held + guess >= room:
                        measure()
                    while held >= room:
                        taken.clear()
                        await taken.wait()
        except asyncio.CancelledError:
            if reader.cancelling():
                raise
            raise _gave_up() from None
        finally:
            arrived.set()

    def stop(_: object = None) -> None:
        if not reader.cancelling():  # a second time would break into the closing of the source
            reader.cancel()

    reader = asyncio.create_task(read())
    job = asyncio.current_task()
    assert job is not None
    job.add_done_callback(stop)
    try:
        while waiting or fresh or not reader.done():
            if fresh and not waiting and guess <= room:
                chunk = replace_lone_surrogates("".join(fresh))
                fresh.clear()
                guess = 0
                yield chunk
                continue
            measure()
            if not waiting:
                arrived.clear()
                await arrived.wait()
                continue
            chunk, size = _take(waiting, room)
            held -= size
            taken.set()
            yield chunk
        reader.result()
    finally:
        job.remove_done_callback(stop)
        stop()
        await asyncio.wait([reader])


async def merge_streams(sources: Sequence[AsyncIterator[T]]) -> AsyncGenerator[list[tuple[int, T]]]:
    """The items of several streams, each with its stream's index: every list has all since the last list.

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

    readers = [asyncio.create_task(read(index, source)) for index, source in enumerate(sources)]

    def ended(reader: asyncio.Task[None]) -> None:
        if not reader.cancelled():
            reader.exception()  # asyncio logs those that nobody has looked at
        changed.set()

    def stop(_: object = None) -> None:
        for reader in readers:
            if not reader.cancelling():  # a second cancel would interrupt the closing of the source
                reader.cancel()

    for reader in readers:
        reader.add_done_callback(ended)
    job = asyncio.current_task()
    assert job is not None
    job.add_done_callback(stop)
    try:
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
    finally:
        job.remove_done_callback(stop)
        stop()
        await asyncio.wait(readers)


async def sse_events(body: AsyncIterator[bytes]) -> AsyncGenerator[str]:
    r"""The server-sent events of an HTTP body, however it is cut: at a time those that a read has made whole.

    Each ends in one blank line. Every line end becomes `\n`, bytes that are not UTF-8 become U+FFFD. The last
    event may lack its blank line; a body that ends within a line raises JobError.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True)
    rest = ""
    async with _closing(body):
        async for data in body:
            events, blank, rest = (rest + decoder.decode(data)).rpartition("\n\n")
            if events := events.lstrip("\n"):
                yield _BLANKS.sub("\n\n", events + blank)
    rest += decoder.decode(b"", final=True)
    if event := rest.strip("\n"):
        if not rest.endswith("\n"):
            message = "The engine's answer ended in the middle of an event. Try again."
            raise JobError(message, code="stream_cut", type="server_error")
        yield f"{event}\n\n"


def _at_most(text: str) -> int:
    """The most bytes that `text` can take in JSON: the least that is said of it without reading it."""
    return 6 * len(text)


def _chunks(units: Iterable[str], room: int) -> Iterator[str]:
    """As many units at a time as take at most `room` bytes."""
    waiting = deque(piece for unit in units for piece in _pieces(unit, room))
    while waiting:
        yield _take(waiting, room)[0]


def _take(waiting: deque[tuple[str, int]], room: int) -> tuple[str, int]:
    """The first pieces of `waiting`, as many as there is room for, and their bytes."""
    size, chunk = 0, list[str]()
    while waiting and (not chunk or size + waiting[0][1] <= room):
        text, more = waiting.popleft()
        chunk.append(text)
        size += more
    return "".join(chunk), size


def _pieces(unit: str, room: int) -> list[tuple[str, int]]:
    """The unit, cut if it takes more than `room` bytes, with what each piece takes as JSON."""
    unit = replace_lone_surrogates(unit)
    if (size := _size(unit)) <= room:
        return [(unit, size)]
    step = max(1, room // 24)  # no character takes more than 6 bytes, and four pieces fill a chunk well
    pieces = [unit[start : start + step] for start in range(0, len(unit), step)]
    return [(piece, _size(piece)) for piece in pieces]


def _size(text: str) -> int:
    return len(_json(text).encode()) - 2


def _gave_up() -> RuntimeError:
    """In place of a source's own CancelledError: passed on, that would end the job without any answer."""
    return RuntimeError("the source of the stream was cancelled")


async def _close(source: object) -> None:
    with suppress(Exception):  # nobody waits for it any more
        async with _closing(source):
            pass


def _closing(source: object) -> AbstractAsyncContextManager[object]:
    """Closes what can be closed: a generator. Iterators of other kinds hold nothing open."""
    return aclosing(source) if hasattr(source, "aclose") else nullcontext()
