"""Streams, with a consumer that is slow in the way the SDK is. The SDK itself is in test_streaming_sdk.py."""

import asyncio
import contextlib
import gc
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.streaming import STREAM_LIMIT, coalesce, relay
from tests.helpers import until

FAMILY = "👨‍👩‍👧‍👦"


def posted(chunk: str) -> int:
    """The bytes that the SDK posts for a chunk."""
    return len(json.dumps({"output": chunk}, ensure_ascii=False).encode())


class Engine:
    """A source that notes when it is closed. `gaps` are the seconds before each unit."""

    def __init__(self, units, gaps=(), error=None):
        self.units, self.gaps, self.error = units, gaps, error
        self.given = 0
        self.closed_at = 0.0
        self.closing = asyncio.Event()
        self.cleaned_up = False

    async def __call__(self):
        try:
            for unit, gap in zip(self.units, [*self.gaps, *[0] * len(self.units)], strict=False):
                if gap:
                    await asyncio.sleep(gap)
                self.given += 1
                yield unit
            if self.error:
                raise self.error
        finally:
            self.closed_at = time.monotonic()
            self.closing.set()
            await asyncio.sleep(0.01)  # an engine's abort takes a moment, and must not be interrupted
            self.cleaned_up = True


async def iterate(stream, pause=0.0, chunks=None):
    """Iterates and never closes, like `handle_job` of runpod 1.12; a pause stands for each post."""
    chunks = [] if chunks is None else chunks
    async for chunk in stream:
        chunks.append(chunk)
        await asyncio.sleep(pause)
    return chunks


async def collected(source, pause=0.0, through=coalesce, **options):
    return await iterate(through(source, **options), pause)


both = pytest.mark.parametrize("through", [coalesce, relay])


@settings(max_examples=40, deadline=None)
@given(
    units=st.lists(st.text(max_size=8), max_size=30),
    gaps=st.lists(st.sampled_from([0, 0, 0.0005, 0.002]), max_size=30),
    pause=st.sampled_from([0, 0.001, 0.005]),
    max_bytes=st.integers(20, 80),
    through=st.sampled_from([coalesce, relay]),
)
async def test_any_timing_gives_the_same_text_within_the_limit(units, gaps, pause, max_bytes, through):
    engine = Engine(units, gaps)
    chunks = await collected(engine(), pause, through, max_bytes=max_bytes)
    assert "".join(chunks) == "".join(units)
    assert all(chunks)
    assert all(posted(chunk) <= max_bytes for chunk in chunks)
    assert engine.cleaned_up


async def test_the_first_unit_does_not_wait_and_the_rest_are_joined():
    arrived, chunks = asyncio.Event(), []

    async def source():
        yield "<0>"
        await arrived.wait()
        for number in range(1, 10):
            await asyncio.sleep(0)
            yield f"<{number}>"
        over.set()

    over = asyncio.Event()
    async with asyncio.timeout(20):
        async for chunk in coalesce(source()):
            chunks.append(chunk)
            arrived.set()
            await over.wait()
    assert chunks == ["<0>", "".join(f"<{n}>" for n in range(1, 10))]


async def test_chunks_are_cut_between_events():
    events = ["data: {}\n\n".format("x" * n) for n in range(1, 60)]
    assert await collected(Engine(["".join(events)])(), through=relay) == ["".join(events)]
    for units, through in ((["".join(events)], relay), (events, coalesce)):
        chunks = await collected(Engine(units)(), through=through, max_bytes=200)
        assert "".join(chunks) == "".join(events)
        assert all(posted(chunk) <= 200 for chunk in chunks)
        assert all(chunk.endswith("\n\n") and chunk.startswith("data: ") for chunk in chunks)
        assert any(chunk.count("data") > 1 for chunk in chunks)


async def test_a_relayed_source_is_asked_only_when_the_consumer_is():
    engine = Engine(["a", "b", "c"])
    stream = relay(engine())
    assert await anext(stream) == "a"
    await asyncio.sleep(0.02)
    assert engine.given == 1
    await stream.aclose()
    assert engine.cleaned_up


@pytest.mark.parametrize("character", ["a", '"', "a\n", "\x01", "é", "漢", "😀", FAMILY, "e\u0301"])
@both
async def test_a_unit_above_a_megabyte_is_cut_between_characters(character, through):
    unit = character * (3_000_000 // len(character.encode()))
    chunks = await collected(Engine(["before", unit, "after"])(), through=through)
    assert "".join(chunks) == "before" + unit + "after"
    assert all(posted(chunk) <= STREAM_LIMIT for chunk in chunks)
    assert len(chunks) <= posted(unit) / STREAM_LIMIT * 1.4 + 2, "chunks are well filled"


async def test_many_small_units_fill_chunks_up_to_the_limit():
    started = time.monotonic()
    chunks = await collected(Engine(["漢字"] * 200_000)())
    assert sum(map(len, chunks)) == 400_000
    assert all(posted(chunk) <= STREAM_LIMIT for chunk in chunks)
    assert len(chunks) == 2
    assert time.monotonic() - started < 30, "joining must not be quadratic"


async def test_a_slow_consumer_holds_the_engine_back():
    engine = Engine(["x" * 100] * 1000)
    stream = coalesce(engine(), max_bytes=1014)
    await anext(stream)
    await asyncio.sleep(0.05)
    assert engine.given <= 20
    rest = [chunk async for chunk in stream]
    assert sum(map(len, rest)) >= 98_000
    assert engine.given == 1000


@both
@pytest.mark.parametrize("max_bytes", [STREAM_LIMIT, 20])
async def test_what_cannot_be_sent_is_replaced_and_pairs_are_joined(through, max_bytes):
    chunks = await collected(Engine(["a\ud800b", "\ud83d\ude00"])(), through=through, max_bytes=max_bytes)
    assert "".join(chunks) == "a\ufffdb😀"


@both
async def test_an_error_comes_after_all_that_came_before(through):
    engine = Engine(["a", "b", "c"], [0, 0.01, 0.01], ZeroDivisionError("engine died"))
    chunks = []
    with pytest.raises(ZeroDivisionError, match="engine died"):
        await iterate(through(engine()), 0.1, chunks)
    assert "".join(chunks) == "abc"
    assert engine.cleaned_up


@both
async def test_a_source_that_was_cancelled_is_an_error_not_an_end(through):
    async def source():
        yield "half an ans"
        raise asyncio.CancelledError

    chunks = []
    with pytest.raises(RuntimeError, match="cancelled"):
        await iterate(through(source()), 0, chunks)
    assert chunks == ["half an ans"]


@pytest.mark.parametrize(
    "gaps", [[0.001] * 100_000, [0, *[60] * 999]], ids=["in its post", "waiting for the engine"]
)
@both
async def test_the_end_of_the_job_closes_the_source(gaps, through):
    """It takes two turns of the loop; a source that was left alone would go on for ages. Best of three, since
    other work may hold the machine."""
    for _ in range(3):
        engine, log = Engine(["x"] * len(gaps), gaps), []
        stream = through(engine())
        job = asyncio.create_task(iterate(stream, 0.05, log))
        await until(lambda log=log: log)
        cancelled_at = time.monotonic()
        job.cancel()
        await asyncio.wait([job])
        await until(lambda engine=engine: engine.cleaned_up)  # unless its closing was interrupted
        given = engine.given
        await asyncio.sleep(0.02)
        assert engine.given == given
        await stream.aclose()
        if engine.closed_at - cancelled_at < 0.5:
            return
    pytest.fail(f"closed after {engine.closed_at - cancelled_at:.3f} s")


@pytest.mark.parametrize("end", ["aclose", "break and forget", "exception in the consumer"])
@both
async def test_every_other_end_closes_the_source_too(end, through):
    engine = Engine(["x"] * 1000, [0.001] * 1000)

    async def job():
        stream = through(engine())
        await anext(stream)
        if end == "aclose":
            await stream.aclose()
            assert engine.cleaned_up
        elif end == "exception in the consumer":
            raise ZeroDivisionError

    with contextlib.suppress(ZeroDivisionError):
        await asyncio.create_task(job())
    gc.collect()
    await until(lambda: engine.cleaned_up)


async def test_the_end_of_the_job_closes_a_source_that_is_held_back():
    """It waits at its yield then, so that a cancelled reader does not reach it."""
    engine = Engine(["x" * 100] * 1000)
    source = engine()
    job = asyncio.create_task(iterate(coalesce(source, max_bytes=200), 60))
    await until(lambda: engine.given)
    await asyncio.sleep(0.02)
    job.cancel()
    await asyncio.wait([job])
    await until(lambda: engine.cleaned_up)
    assert engine.given < 10


@both
async def test_closing_the_stream_does_not_break_into_the_closing_of_the_source(through):
    engine = Engine(["x"] * 1000, [0.001] * 1000)
    stream, chunks = through(engine()), []
    job = asyncio.create_task(iterate(stream, 60, chunks))
    await until(lambda: chunks)
    job.cancel()
    await engine.closing.wait()
    await stream.aclose()
    assert engine.cleaned_up


@both
async def test_an_error_that_nobody_waits_for_is_quiet(caplog, through):
    job = asyncio.create_task(iterate(through(Engine(["x"], error=ZeroDivisionError())()), 60))
    await asyncio.sleep(0.05)
    job.cancel()
    await asyncio.wait([job])
    del job
    for _ in range(2):  # first the generator goes, then what it held
        gc.collect()
        await asyncio.sleep(0.02)
    assert caplog.records == []


async def test_a_second_cancel_does_not_break_into_the_closing():
    engine = Engine(["x"] * 1000, [0.001] * 1000)
    job = asyncio.create_task(collected(engine(), 0))
    await until(lambda: engine.given)
    job.cancel()
    await engine.closing.wait()
    job.cancel()
    await asyncio.wait([job])
    await until(lambda: engine.cleaned_up)


@both
async def test_a_source_that_is_no_generator(through):
    class Words:
        def __init__(self):
            self.words = iter(["to", "be", "or"])

        def __aiter__(self):
            return self

        async def __anext__(self):
            try:
                return next(self.words)
            except StopIteration:
                raise StopAsyncIteration from None

    assert "".join(await collected(Words(), through=through)) == "tobeor"
