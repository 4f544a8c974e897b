"""Jobs that wait together run together.

    batcher = DynamicBatcher(encode, budget=1024, length=len)  # encode: list of token ids -> list of vectors
    vectors = await batcher.submit(token_ids)  # in the order of the items

No timers: an idle engine starts in the event loop's next iteration with what was submitted in this one; while
it runs, items queue, and the next batch is formed when a thread becomes free.

Batches. A batch holds items of one key. Its cost is that of its padded form, longest item times number of
items, and is at most `budget`; a longer item runs alone. The oldest item leads: the batch is that item and
the next shorter ones, as many as fit. Items queued between the same two batches are equally old, and of those
the longest leads: a queue that nothing joins is served in the fewest batches possible (proof in the test).

Fairness. An item waits at most one batch for each item queued no later than it, whatever comes after, and a
submit() has at most `window` budgets of its items in the queue at once, its longest first.

Failure. A batch that raises runs again in halves, ahead of the queue, until the failing item is alone: at
most 2 * ceil(log2(n)) more runs for one among n. The same applies to a batch that runs out of memory. A wrong
number of results is a programming error and fails the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

from shared import telemetry

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class _Submission:
    """The items of one submit()."""

    future: asyncio.Future[list[Any]]
    results: list[Any]
    unfinished: int  # items without a result
    pending: list[_Entry] = field(default_factory=list)  # not in the queue yet, the longest last
    active_cost: int = 0  # of its items that are queued or running
    started: float = 0.0  # time.perf_counter() at its first batch
    largest_batch: int = 0


@dataclass(slots=True, eq=False)
class _Entry:
    """One item in the queue."""

    submission: _Submission
    index: int
    item: Any
    key: Hashable
    length: int
    cost: int  # share of the budget that it takes at least
    queued_at: int = 0  # number of batches formed before it joined the queue


def constant(item: object) -> Hashable:
    """The default key: any two items may share a batch."""
    return None


class DynamicBatcher(Generic[Item, Result]):
    """Collects the items of concurrent submit() calls into batches and runs them on threads of its own.

    run: called on such a thread with items of one key; returns one result for each, in their order.
    budget: the highest cost of a batch, in the unit of `length` (tokens, pixels, seconds).
    length: the cost of one item alone; below 1 counts as 1.
    key: items share a batch only where their keys are equal (sampling params, task).
    max_items: the most items in a batch whatever their cost; None: no such limit.
    window: how many budgets of one submit() may be in the queue at once.
    threads: how many batches may run at a time, each on a thread; `running` is how many do.
    name: prefix of the threads' names.

    Each submit() uses the running event loop; another loop may follow when the last has closed or nothing
    waits on it. Not for calls from several threads at once.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Sequence[Result]],
        *,
        budget: int,
        length: Callable[[Item], int],
        key: Callable[[Item], Hashable] = constant,
        max_items: int | None = None,
        window: int = 4,
        threads: int = 1,
        name: str = "engine",
    ) -> None:
        self._max_items = budget if max_items is None else min(max_items, budget)
        if min(budget, self._max_items, window, threads) < 1:
            raise ValueError("budget, max_items, window and threads must be at least 1")
        self._run, self._length, self._key = run, length, key
        self._budget, self._window = budget, window * budget
        # One executor a thread, the lowest free one first: the caches of a thread that rests grow cold.
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"{name}-{i}") for i in range(threads)]
        self._free = list(range(threads))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queue: list[_Entry] = []
        self._halves: list[list[_Entry]] = []  # of batches that failed, the next one last
        self._batches_formed = 0
        self.running = 0
        self._dispatch_scheduled = False
        self._closed = False

    @property
    def queued(self) -> int:
        """How many items wait in the queue."""
        return len(self._queue)

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """The results of `items`, in their order.

        Raises what `run` raised for the first item to fail; the others are then dropped, as all are when the
        call is cancelled. A running batch cannot be stopped: its results are discarded.
        RuntimeError: the batcher is closed, or in use on another event loop.
        """
        loop = self._bind()
        if not items:
            return []
        submission = _Submission(loop.create_future(), [None] * len(items), len(items))
        share = -(-self._budget // self._max_items)
        for index, item in enumerate(items):
            length = max(1, self._length(item))
            entry = _Entry(submission, index, item, self._key(item), length, max(length, share))
            submission.pending.append(entry)
        submission.pending.sort(key=lambda entry: (entry.length, -entry.index))
        self._enqueue(submission)
        if self._free and not self._dispatch_scheduled:
            self._dispatch_scheduled = True
            loop.call_soon(self._dispatch)
        submitted = time.perf_counter()
        results: list[Result] = await submission.future
        telemetry.observe("batch_wait", submission.started - submitted)
        telemetry.observe("model", time.perf_counter() - submission.started)
        telemetry.observe("batch_size", submission.largest_batch)
        return results

    def close(self) -> None:
        """Fail what is queued and let the threads end; running items are still answered."""
        self._closed = True
        for thread in self._threads:
            thread.shutdown(wait=False)
        self._fail_queued()

    def _bind(self) -> asyncio.AbstractEventLoop:
        """The running event loop, to which the batcher belongs from now on."""
        loop = asyncio.get_running_loop()
        if self._closed:
            raise RuntimeError("the batcher is closed")
        if loop is not self._loop:
            if (self.running or self._dispatch_scheduled) and self._loop and not self._loop.is_closed():
                raise RuntimeError("the batcher is in use on another event loop")
            self._loop, self._queue, self._halves = loop, [], []
            self.running, self._dispatch_scheduled = 0, False
            self._free = list(range(len(self._threads)))
        return loop

    def _enqueue(self, submission: _Submission) -> None:
        """Move as many pending items into the queue as the window holds."""
        pending = submission.pending
        while pending and (
            not submission.active_cost or submission.active_cost + pending[-1].cost <= self._window
        ):
            entry = pending.pop()
            entry.queued_at = self._batches_formed
            submission.active_cost += entry.cost
            self._queue.append(entry)

    def _fail_queued(self) -> None:
        for entry in sum(self._halves, self._queue):
            _fail(entry.submission, RuntimeError("the batcher was closed"))
        self._queue, self._halves = [], []

    def _dispatch(self) -> None:
        """Give each free thread its next batch."""
        self._dispatch_scheduled = False
        if self._closed:
            return self._fail_queued()
        while self._free and (batch := self._next_half() or self._form_batch()):
            self.running += 1
            thread = min(self._free)
            self._free.remove(thread)
            now = time.perf_counter()
            for submission in {entry.submission for entry in batch}:
                submission.started = submission.started or now
                submission.largest_batch = max(submission.largest_batch, len(batch))
            self._threads[thread].submit(self._run_batch, batch, thread)

    def _next_half(self) -> list[_Entry]:
        """Take the next half of a batch that failed; empty if there is none."""
        batch: list[_Entry] = []
        while self._halves and not batch:
            batch = [entry for entry in self._halves.pop() if not entry.submission.future.done()]
        return batch

    def _form_batch(self) -> list[_Entry]:
        """Take the next batch out of the queue; empty if nothing is queued."""
        self._queue = [entry for entry in self._queue if not entry.submission.future.done()]
        if not self._queue:
            return []
        self._queue.sort(key=lambda entry: -entry.length)
        oldest = min(self._queue, key=lambda entry: entry.queued_at)  # the longest of several
        candidates = (e for e in self._queue[self._queue.index(oldest) :] if e.key == oldest.key)
        batch = list(islice(candidates, min(self._max_items, max(1, self._budget // oldest.length))))
        taken = set(batch)
        self._queue = [entry for entry in self._queue if entry not in taken]
        self._batches_formed += 1
        return batch

    def _run_batch(self, batch: list[_Entry], thread: int) -> None:
        """On an engine thread. Every exception is reported to the loop: no submit() may wait for ever."""
        outcome: list[Result] | BaseException
        try:
            outcome = list(self._run([entry.item for entry in batch]))
        except BaseException as error:
            outcome = error
            if type(error).__name__ == "OutOfMemoryError" and (torch := sys.modules.get("torch")):
                traceback.clear_frames(error.__traceback__)  # the frames hold the tensors
                with contextlib.suppress(Exception):
                    torch.cuda.empty_cache()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop = batch[0].submission.future.get_loop()
            loop.call_soon_threadsafe(self._finish_batch, batch, thread, outcome)

    def _finish_batch(self, batch: list[_Entry], thread: int, outcome: list[Result] | BaseException) -> None:
        """Store the results of a batch, or split one that failed, and dispatch the next."""
        self.running -= 1
        self._free.append(thread)
        if isinstance(outcome, Exception) and len(batch) > 1:
            half = len(batch) // 2
            self._halves += [batch[half:], batch[:half]]
            return self._dispatch()
        if isinstance(outcome, list) and len(outcome) != len(batch):
            outcome = RuntimeError(f"the engine gave {len(outcome)} results for {len(batch)} items")
        for position, entry in enumerate(batch):
            submission = entry.submission
            if isinstance(outcome, BaseException):
                _fail(submission, outcome)
            elif not submission.future.done():
                submission.results[entry.index] = outcome[position]
                submission.unfinished -= 1
                submission.active_cost -= entry.cost
                self._enqueue(submission)
                if not submission.unfinished:
                    submission.future.set_result(submission.results)
        self._dispatch()


def _fail(submission: _Submission, error: BaseException) -> None:
    if not isinstance(error, Exception) or isinstance(error, StopIteration):
        # A SystemExit in a task would end the event loop; a future refuses StopIteration.
        cause, error = error, RuntimeError(f"the engine stopped with {error!r}")
        error.__cause__ = cause
    if not submission.future.done():
        submission.future.set_exception(error)
