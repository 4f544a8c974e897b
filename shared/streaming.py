"""What a generator yields to the SDK, which posts each yield and asks for the next when that is answered.

async for chunk in coalesce(sse_events(response.content.iter_any())):
    yield chunk
"""

from __future__ import annotations

import asyncio
import codecs
import io
import json
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext

from shared.errors import JobError, whole

STREAM_LIMIT = 1_000_000
"""Bytes that the platform takes in one post of a stream."""

_ENVELOPE = len('{"output": ""}')  # what the SDK puts around a chunk
_json = json.JSONEncoder(ensure_ascii=False).encode


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
    waiting: deque[tuple[str, int]] = deque()
    held = 0
    arrived, taken = asyncio.Event(), asyncio.Event()

    async def read() -> None:
        nonlocal held
        try:
            async with _closing(source):
                async for unit in source:
                    for piece in _pieces(unit, room):
                        waiting.append(piece)
                        held += piece[1]
                        arrived.set()
                    while held >= room:
                        taken.clear()
                        await taken.wait()
        except asyncio.CancelledError:
            if reader.cancelling():
                raise
            # The source gave up by itself; passed on, this would end the job without any answer.
            raise RuntimeError("the source of the stream was cancelled") from None
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
        while waiting or not reader.done():
            if not waiting:
                arrived.clear()
                await arrived.wait()
                continue
            size, chunk = 0, list[str]()
            while waiting and (not chunk or size + waiting[0][1] <= room):
                text, more = waiting.popleft()
                chunk.append(text)
                size += more
            held -= size
            taken.set()
            yield "".join(chunk)
        reader.result()
    finally:
        job.remove_done_callback(stop)
        stop()
        await asyncio.wait([reader])


async def sse_events(body: AsyncIterator[bytes]) -> AsyncIterator[str]:
    r"""The server-sent events of an HTTP body, however it is cut, each whole and ending in a blank line.

    Every line end becomes `\n`, bytes that are not UTF-8 become U+FFFD. The last event may lack its blank
    line; a body that ends within a line raises JobError.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True)
    rest = ""
    async with _closing(body):
        async for data in body:
            *events, rest = (rest + decoder.decode(data)).split("\n\n")
            for event in events:
                if event := event.strip("\n"):
                    yield f"{event}\n\n"
    rest += decoder.decode(b"", final=True)
    if event := rest.strip("\n"):
        if not rest.endswith("\n"):
            message = "The engine's answer ended in the middle of an event. Try again."
            raise JobError(message, code="stream_cut", type="server_error")
        yield f"{event}\n\n"


def error_event(error: JobError) -> str:
    """The end of a stream of OpenAI's that failed: the error as a server-sent event, then `[DONE]`."""
    return f"data: {json.dumps({'error': error.body()})}\n\ndata: [DONE]\n\n"


def _pieces(unit: str, room: int) -> list[tuple[str, int]]:
    """The unit, cut if it takes more than `room` bytes, with what each piece takes as JSON.

    Surrogates, which cannot be sent, are joined to characters, and lone ones become U+FFFD.
    """
    unit = whole(unit)
    if (size := _size(unit)) <= room:
        return [(unit, size)] if unit else []
    step = max(1, room // 24)  # no character takes more than 6 bytes, and four pieces fill a chunk well
    pieces = [unit[start : start + step] for start in range(0, len(unit), step)]
    return [(piece, _size(piece)) for piece in pieces]


def _size(text: str) -> int:
    return len(_json(text).encode()) - 2


def _closing(source: object) -> AbstractAsyncContextManager[object]:
    """Closes what can be closed: a generator. Iterators of other kinds hold nothing open."""
    return aclosing(source) if hasattr(source, "aclose") else nullcontext()
