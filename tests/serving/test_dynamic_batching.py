"""The engine is a plain function here; threads, event loop and futures are the real ones.

Why no other way of forming batches needs fewer of them (`test_no_partition_needs_fewer_batches`): in any
partition, the batch of the longest item has at most budget // longest places. Moving the longest items into
those places, empty ones too, makes no other batch more expensive. So some best partition starts with the
batch that DynamicBatcher forms, and the same holds for the items that are left.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import statistics
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serving.dynamic_batching import DynamicBatcher
from shared import telemetry

BUDGET = 100


class Text(NamedTuple):
    name: Any
    length: int
    key: str = ""


class Engine:
    """Answers every item with itself, and records its batches. It waits while the gate is closed."""

    def __init__(self, fail_on: Sequence[Any] = (), error: BaseException | None = None) -> None:
        self.batches: list[list[Text]] = []
        self.fail_on = set(fail_on)
        self.error = error or ValueError("unanswerable")
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()

    def __call__(self, items: list[Text]) -> list[Text]:
        self.batches.append(items)
        self.started.set()
        assert self.gate.wait(10)
        if self.fail_on & {item.name for item in items}:
            raise self.error
        return items

    def batcher(self, **options: Any) -> DynamicBatcher[Text, Text]:
        return DynamicBatcher(
            self,
            **{"budget": BUDGET, "length": lambda item: item.length, "key": lambda item: item.key, **options},
        )


RUNNING = Text("running", BUDGET)


async def occupy(
    engine: Engine, batcher: DynamicBatcher[Text, Text], item: Text = RUNNING
) -> asyncio.Future[Any]:
    """Close the gate, and return when a batch of this item waits at it."""
    engine.gate.clear()
    running = asyncio.ensure_future(batcher.submit([item]))
    await asyncio.to_thread(engine.started.wait)
    return running


async def together(batcher: DynamicBatcher[Text, Text], items: Sequence[Text]) -> list[Any]:
    """Each item as a request of its own, all in one tick; exceptions as results."""
    answers = await asyncio.gather(*(batcher.submit([item]) for item in items), return_exceptions=True)
    return [answer if isinstance(answer, BaseException) else answer[0] for answer in answers]


def cost(batch: Sequence[Text]) -> int:
    return max(item.length for item in batch) * len(batch)


def fewest(lengths: Sequence[int], most: int) -> int:
    """By looking at every partition."""

    def assign(rest: Sequence[int], groups: list[list[int]]) -> int:
        if not rest:
            return len(groups)
        best = len(lengths)
        for group in groups:
            if len(group) < most and max(*group, rest[0]) * (len(group) + 1) <= BUDGET:
                group.append(rest[0])
                best = min(best, assign(rest[1:], groups))
                group.pop()
        return min(best, assign(rest[1:], [*groups, [rest[0]]]))

    return assign(lengths, [])


# Batches


@given(st.lists(st.integers(1, 130), min_size=1, max_size=8), st.integers(1, 5))
def test_no_partition_needs_fewer_batches(lengths: list[int], most: int) -> None:
    engine = Engine()
    items = [Text(n, length) for n, length in enumerate(lengths)]
    asyncio.run(together(engine.batcher(max_items=most), items))
    assert len(engine.batches) == fewest(lengths, most)
    assert all(len(batch) == 1 or (cost(batch) <= BUDGET and len(batch) <= most) for batch in engine.batches)


# Fairness


async def flood(
    batcher: DynamicBatcher[Text, Text], engine: Engine, length: int, stop: Callable[[], bool]
) -> None:
    """Keeps the queue full of fresh items of this length."""
    pending: set[asyncio.Future[Any]] = set()
    for number in itertools.count():
        if stop():
            break
        pending.add(asyncio.ensure_future(batcher.submit([Text(f"flood{number}", length)])))
        if len(pending) >= 20:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.gather(*pending)


@pytest.mark.parametrize("item", [Text("short", 1), Text("other key", 50, "b")])
async def test_no_item_starves(item: Text) -> None:
    """At most 20 items are older, and new ones come for ever: the bound is a batch for each of the 20."""
    engine = Engine()
    batcher = engine.batcher()
    answered = asyncio.Event()
    flooding = asyncio.ensure_future(flood(batcher, engine, 50, answered.is_set))
    await asyncio.sleep(0.01)
    before = len(engine.batches)
    async with asyncio.timeout(20):
        await batcher.submit([item])
    answered.set()
    await flooding
    waited = next(n for n, batch in enumerate(engine.batches) if item in batch) - before
    assert waited <= 1 + 20


async def test_a_short_submission_passes_one_of_10_000_items() -> None:
    engine = Engine()
    batcher = engine.batcher(window=4)
    rng = random.Random(3)
    big = [Text(n, rng.randint(5, 50)) for n in range(10_000)]
    engine.gate.clear()
    job = asyncio.ensure_future(batcher.submit(big))
    await asyncio.to_thread(engine.started.wait)
    lone = asyncio.ensure_future(batcher.submit([Text("lone", 1)]))
    await asyncio.sleep(0)
    engine.gate.set()
    await lone
    assert not job.done()
    position = next(n for n, batch in enumerate(engine.batches) if Text("lone", 1) in batch)
    assert position <= 1 + 4
    assert await job == big
    assert len(engine.batches) > 1_000


async def test_two_large_submissions_advance_side_by_side() -> None:
    engine = Engine()
    batcher = engine.batcher()
    jobs = [[Text((name, n), 20) for n in range(1_000)] for name in "ab"]
    assert await asyncio.gather(*map(batcher.submit, jobs)) == jobs
    order = [item.name[0] for batch in engine.batches for item in batch]
    assert 0.4 < order[:1_000].count("a") / 1_000 < 0.6


# The idle engine


async def test_an_idle_engine_starts_a_batch_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("call_at", "call_later"):  # it sets no timer
        monkeypatch.setattr(asyncio.get_running_loop(), method, None)
    engine = Engine()
    batcher = engine.batcher()
    items = [Text(n, 10) for n in range(10)]
    assert await together(batcher, items) == items
    assert len(engine.batches) == 1

    added = []
    for _ in range(200):
        start = time.perf_counter()
        await batcher.submit([items[0]])
        added.append(time.perf_counter() - start)
    # A thread hop and back, 0.1 ms on an idle machine; a busy one may take a hundred times as long.
    assert statistics.quantiles(added, n=4)[0] < 0.01


# Threads


async def test_each_thread_runs_a_batch_and_later_items_wait_for_one() -> None:
    together = threading.Barrier(3)  # two batches on their threads, and this test
    gate = threading.Semaphore(0)
    ran: list[tuple[int, list[str]]] = []

    def run(items: list[Text]) -> list[Text]:
        ran.append((batcher.running, [item.name for item in items]))
        if len(ran) <= 2:
            together.wait(10)
        assert gate.acquire(timeout=10)
        return items

    batcher: DynamicBatcher[Text, Text] = DynamicBatcher(
        run, budget=BUDGET, length=lambda item: item.length, threads=2
    )
    first = [asyncio.ensure_future(batcher.submit([Text(name, BUDGET)])) for name in "ab"]
    await asyncio.to_thread(together.wait, 10)
    late = [asyncio.ensure_future(batcher.submit([Text(name, 10)])) for name in "cd"]
    await asyncio.sleep(0.01)
    assert (len(ran), batcher.running) == (2, 2)
    gate.release(3)
    await asyncio.gather(*first, *late)
    assert sorted(names for _, names in ran) == [["a"], ["b"], ["c", "d"]]
    assert batcher.running == 0


# Order, identity and cancellation

arrivals = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 130), st.sampled_from("abc")), max_size=12),
        st.integers(0, 3),  # ticks until the next request
        st.sampled_from([False, False, False, True]),  # cancelled, a tick after it came
    ),
    min_size=1,
    max_size=25,
)


@given(
    arrivals, st.integers(1, 3), st.none() | st.integers(1, 5), st.sets(st.integers(0, 24)), st.integers(1, 3)
)
@settings(max_examples=150, deadline=None)
@example([([(5, "a")], 0, True)] * 3, 1, None, set(), 1)
def test_order_and_identity_under_random_arrival(
    requests: list[tuple[list[tuple[int, str]], int, bool]],
    window: int,
    most: int | None,
    failing: set[int],
    threads: int,
) -> None:
    engine = Engine(fail_on=[(number, 0) for number in failing])
    sent = [
        [Text((number, n), length, key) for n, (length, key) in enumerate(items)]
        for number, (items, _, _) in enumerate(requests)
    ]

    async def scenario() -> list[Any]:
        batcher = engine.batcher(window=window, max_items=most, threads=threads)
        tasks: list[asyncio.Task[Any]] = []
        for items, (_, ticks, cancelled) in zip(sent, requests, strict=True):
            tasks.append(asyncio.ensure_future(batcher.submit(items)))
            for _ in range(ticks + cancelled):
                await asyncio.sleep(0)
            if cancelled:
                tasks[-1].cancel()
        async with asyncio.timeout(20):
            return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(scenario())
    for number, (answer, items, (_, _, cancelled)) in enumerate(zip(answers, sent, requests, strict=True)):
        if cancelled and isinstance(answer, asyncio.CancelledError):
            continue
        if number in failing and items:
            assert answer is engine.error
        else:
            assert answer == items
            assert all(got is item for got, item in zip(answer, items, strict=True))
    for batch in engine.batches:
        assert len({item.key for item in batch}) == 1
        assert len(batch) <= (most or BUDGET)
        assert (
            len(batch) == 1 or cost([item._replace(length=max(1, item.length)) for item in batch]) <= BUDGET
        )


async def test_cancelled_requests_are_dropped_before_a_batch_forms() -> None:
    engine = Engine()
    batcher = engine.batcher()
    running = await occupy(engine, batcher)
    gone = asyncio.ensure_future(batcher.submit([Text(("gone", n), 10) for n in range(1000)]))
    stays = asyncio.ensure_future(batcher.submit([Text("stays", 10)]))
    await asyncio.sleep(0)
    for task in (running, gone):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    engine.gate.set()
    assert await stays == [Text("stays", 10)]
    assert [[item.name for item in batch] for batch in engine.batches] == [["running"], ["stays"]]


# Failure


@pytest.mark.parametrize("count", [1, 2, 10, 64])
async def test_a_failing_request_fails_alone(count: int) -> None:
    """The other requests are answered, and finding it takes no more than 2 * ceil(log2(n)) more runs."""
    for bad in {0, count // 2, count - 1}:
        engine = Engine(fail_on=[bad])
        items = [Text(n, 1) for n in range(count)]
        answers = await together(engine.batcher(), items)
        assert answers[bad] is engine.error
        assert answers[:bad] + answers[bad + 1 :] == items[:bad] + items[bad + 1 :]
        assert len(engine.batches) <= 1 + 2 * math.ceil(math.log2(count))


async def test_a_request_that_was_cancelled_is_not_run_again() -> None:
    engine = Engine(fail_on=["bad"])
    batcher = engine.batcher()
    engine.gate.clear()
    tasks = [asyncio.ensure_future(batcher.submit([Text(name, 1)])) for name in ("bad", "good", "gone")]
    await asyncio.to_thread(engine.started.wait)
    tasks[2].cancel()
    await asyncio.wait(tasks[2:])
    engine.gate.set()
    answers = await asyncio.gather(*tasks[:2], return_exceptions=True)
    assert answers == [engine.error, [Text("good", 1)]]
    assert [[item.name for item in batch] for batch in engine.batches[1:]] == [["bad"], ["good"]]


async def test_a_job_with_a_failing_item_fails_and_the_rest_of_it_is_dropped() -> None:
    engine = Engine(fail_on=[0])
    items = [Text(n, 100 - n % 2) for n in range(1000)]
    with pytest.raises(ValueError, match="unanswerable"):
        await engine.batcher().submit(items)
    assert len(engine.batches) < 10


async def test_out_of_memory_is_split_and_memory_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    class Tensor:
        pass

    tensors: weakref.WeakSet[Tensor] = weakref.WeakSet()
    held: list[int] = []  # tensors that the frames still hold when the cache is emptied
    cuda = SimpleNamespace(empty_cache=lambda: held.append(len(tensors)))

    def run(items: list[int]) -> list[int]:
        tensor = Tensor()
        tensors.add(tensor)
        if len(items) > 16:
            raise OutOfMemoryError(f"no memory for {len(items)}")
        return items

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))  # type: ignore[arg-type]
    batcher: DynamicBatcher[int, int] = DynamicBatcher(run, budget=64, length=lambda _: 1)
    assert await batcher.submit(list(range(64))) == list(range(64))
    assert held == [0, 0, 0]


@pytest.mark.parametrize("wrong", [lambda items: items[1:], lambda items: [*items, 0], lambda _: []])
async def test_a_wrong_number_of_results_fails_the_batch(wrong: Callable[[list[int]], list[int]]) -> None:
    calls = []

    def run(items: list[int]) -> list[int]:
        calls.append(items)
        return wrong(items) if len(items) > 1 else items

    batcher: DynamicBatcher[int, int] = DynamicBatcher(run, budget=8, length=lambda _: 1)
    answers = await asyncio.gather(*(batcher.submit([n]) for n in range(8)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {RuntimeError}
    assert "8 items" in str(answers[0])
    assert len(calls) == 1
    assert await batcher.submit([1]) == [1]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(1), asyncio.CancelledError(), StopIteration()]
)
async def test_no_exception_on_the_engine_thread_hangs_a_request(error: BaseException) -> None:
    engine = Engine(fail_on=["bad"], error=error)
    batcher = engine.batcher()
    async with asyncio.timeout(10):
        (answer,) = await together(batcher, [Text("bad", 1)])
        assert isinstance(answer, RuntimeError)
        assert answer.__cause__ is error
        assert await batcher.submit([Text("good", 1)]) == [Text("good", 1)]


async def test_close_fails_what_is_queued_or_pending_and_answers_running_items() -> None:
    engine = Engine()
    batcher = engine.batcher(window=1)
    running = await occupy(engine, batcher)
    big = asyncio.ensure_future(batcher.submit([Text(n, 100) for n in range(50)]))
    await asyncio.sleep(0)
    batcher.close()
    for waiting in (big, batcher.submit([Text("late", 1)])):
        with pytest.raises(RuntimeError, match="closed"):
            await waiting
    engine.gate.set()
    assert await running == [RUNNING]


# Event loops


def test_a_loop_that_ended_with_a_batch_on_the_thread_leaves_nothing_behind() -> None:
    engine = Engine()
    batcher = engine.batcher()

    async def abandon() -> None:
        running = await occupy(engine, batcher, Text("abandoned", 100))
        waiting = asyncio.ensure_future(batcher.submit([Text("waiting", 100)]))
        await asyncio.sleep(0)
        del running, waiting  # asyncio.run cancels them

    asyncio.run(abandon())
    engine.gate.set()
    assert asyncio.run(batcher.submit([Text("next", 1)])) == [Text("next", 1)]
    assert [batch[0].name for batch in engine.batches] == ["abandoned", "next"]


async def test_two_loops_at_once_are_refused() -> None:
    engine = Engine()
    batcher = engine.batcher()
    running = await occupy(engine, batcher)
    with pytest.raises(RuntimeError, match="another event loop"):
        await asyncio.to_thread(asyncio.run, batcher.submit([Text("there", 1)]))
    engine.gate.set()
    await running


@pytest.mark.parametrize("option", ["budget", "max_items", "window", "threads"])
def test_options_below_one_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        Engine().batcher(**{option: 0})


async def test_a_job_is_charged_what_its_batches_cost() -> None:
    def sleep(items: list[int]) -> list[int]:
        time.sleep(0.05)
        return items

    batcher = DynamicBatcher(sleep, budget=4, length=lambda _: 1)

    async def submit(count: int) -> dict[str, float]:
        with telemetry.record("native", "queue") as record:
            await batcher.submit([1] * count)
        return record.values

    first, second = await asyncio.gather(submit(4), submit(6))  # batches of 4, 4 and 2
    assert first["batch_wait"] < second["batch_wait"]
    assert 0.04 < first["model"] < second["model"]
    assert second["batch_wait"] > 0.04
    assert (first["batch_size"], second["batch_size"]) == (4, 4)
    batcher.close()
