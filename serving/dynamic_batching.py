"""Jobs that wait together run together.

    batcher = DynamicBatcher(encode, budget=1024, length=len)  # encode: list of token ids -> list of vectors
    vectors = await batcher.submit(token_ids)  # in the order of the items

No timers: an idle engine starts on the loop's next turn with what came in this one; while it runs, items
gather, and the next batch is formed at the moment the engine is free. With several threads the engine is free
while fewer batches than that are running.

Packing. A batch holds items of one key and costs what its padded form holds: longest item times number of
items, at most `budget`; a longer item runs alone. The item that has waited longest leads: it and the next
shorter ones, as many as fit. Items queued between the same two batches are equally old and the longest leads,
so what waits from the start runs in the fewest batches: in any plan the longest item's batch has at most
budget // longest places, and to put the longest items into them, empty ones too, makes no other batch dearer.
So a best plan starts like ours. (Letting longer items pass older ones saved nothing in simulations.)

Fairness. An item waits at most one batch for each item queued no later than it, whatever comes after, and a
submit() has at most `window` budgets of its items in the queue at once, its longest first.

Failure. A batch that raises is run again in halves, ahead of the queue, until the item that breaks it is
alone: at most 2 * ceil(log2(n)) more runs for one among n. So is a batch that runs out of memory. A wrong
number of results is a programming error and fails all of the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import traceback
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class _Job:
    """One submit()."""

    done: asyncio.Future[list[Any]]
    results: list[Any]
    left: int  # results still to come
    rest: list[_Entry] = field(default_factory=list)  # not in the queue yet, the longest last
    open: int = 0  # the cost of what is in the queue or runs


@dataclass(slots=True, eq=False)
class _Entry:
    job: _Job
    index: int
    item: Any
    key: Hashable
    length: int
    cost: int
    entered: int = 0  # how many batches had been formed when it came into the queue


def constant(item: object) -> Hashable:
    """The default key: every item may share a batch with every other."""
    return None


class DynamicBatcher(Generic[Item, Result]):
    """Collects the items of concurrent submit() calls into batches and runs them on threads of its own.

    run: called on that thread with items of one key; returns one result for each, in their order.
    budget: the most that a batch may cost, in the unit of `length` (tokens, pixels, seconds).
    length: what an item costs alone; below 1 counts as 1.
    key: items share a batch only where their keys are equal (sampling parameters, task).
    max_items: the most items in a batch whatever they cost; None: no such limit.
    window: how many budgets of one submit() may be in the queue at once. threads: how many batches may run at
    a time, each on a thread; `running` says how many do. name: the threads'.

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
        # A thread each, the first free one first: one that rests has lost what it needs at hand.
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"{name}-{i}") for i in range(threads)]
        self._free = list(range(threads))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[_Entry] = []
        self._halves: list[list[_Entry]] = []
        self._formed = 0
        self.running = 0
        self._due = False  # _next is on its way
        self._closed = False

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """The results of `items`, in their order.

        Raises what `run` raised for the first item to fail; the others are then dropped, as all are when the
        call is cancelled. A batch that already runs cannot be stopped: its results are thrown away.
        RuntimeError: the batcher is closed, or in use on another event loop.
        """
        loop = self._bind()
        if not items:
            return []
        job = _Job(loop.create_future(), [None] * len(items), len(items))
        share = -(-self._budget // self._max_items)
        for index, item in enumerate(items):
            length = max(1, self._length(item))
            job.rest.append(_Entry(job, index, item, self._key(item), length, max(length, share)))
        job.rest.sort(key=lambda entry: (entry.length, -entry.index))
        self._feed(job)
        if self._free and not self._due:
            self._due = True
            loop.call_soon(self._next)
        results: list[Result] = await job.done
        return results

    def close(self) -> None:
        """Fail what waits and let the threads end; items that run are still answered."""
        self._closed = True
        for thread in self._threads:
            thread.shutdown(wait=False)
        self._drop()

    def _bind(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._closed:
            raise RuntimeError("the batcher is closed")
        if loop is not self._loop:
            if (self.running or self._due) and self._loop and not self._loop.is_closed():
                raise RuntimeError("the batcher is in use on another event loop")
            self._loop, self._waiting, self._halves = loop, [], []
            self.running, self._due, self._free = 0, False, list(range(len(self._threads)))
        return loop

    def _feed(self, job: _Job) -> None:
        """Move as much of the job into the queue as its window holds."""
        while job.rest and (not job.open or job.open + job.rest[-1].cost <= self._window):
            entry = job.rest.pop()
            entry.entered = self._formed
            job.open += entry.cost
            self._waiting.append(entry)

    def _drop(self) -> None:
        for entry in sum(self._halves, self._waiting):
            _fail(entry.job, RuntimeError("the batcher was closed"))
        self._waiting, self._halves = [], []

    def _next(self) -> None:
        """Hand each free thread its next batch."""
        self._due = False
        if self._closed:
            return self._drop()
        while self._free and (batch := self._again() or self._form()):
            self.running += 1
            thread = min(self._free)
            self._free.remove(thread)
            self._threads[thread].submit(self._work, batch, thread)

    def _again(self) -> list[_Entry]:
        """Take the next half of a batch that has failed; empty if none is left."""
        batch: list[_Entry] = []
        while self._halves and not batch:
            batch = [entry for entry in self._halves.pop() if not entry.job.done.done()]
        return batch

    def _form(self) -> list[_Entry]:
        """Take the next batch out of the queue; empty if nobody waits."""
        self._waiting = [entry for entry in self._waiting if not entry.job.done.done()]
        if not self._waiting:
            return []
        self._waiting.sort(key=lambda entry: -entry.length)
        lead = min(self._waiting, key=lambda entry: entry.entered)  # the longest, where several are
        fitting = (entry for entry in self._waiting[self._waiting.index(lead) :] if entry.key == lead.key)
        batch = list(islice(fitting, min(self._max_items, max(1, self._budget // lead.length))))
        taken = set(batch)
        self._waiting = [entry for entry in self._waiting if entry not in taken]
        self._formed += 1
        return batch

    def _work(self, batch: list[_Entry], thread: int) -> None:
        """On an engine thread. Every way out reports to the loop: no job may wait for ever."""
        outcome: list[Result] | BaseException
        try:
            outcome = list(self._run([entry.item for entry in batch]))
        except BaseException as error:
            outcome = error
            if type(error).__name__ == "OutOfMemoryError" and (torch := sys.modules.get("torch")):
                traceback.clear_frames(error.__traceback__)  # they hold the tensors
                with contextlib.suppress(Exception):
                    torch.cuda.empty_cache()
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits
            batch[0].job.done.get_loop().call_soon_threadsafe(self._settle, batch, thread, outcome)

    def _settle(self, batch: list[_Entry], thread: int, outcome: list[Result] | BaseException) -> None:
        """Answer what has run, or split what has failed, and go on."""
        self.running -= 1
        self._free.append(thread)
        if isinstance(outcome, Exception) and len(batch) > 1:
            half = len(batch) // 2
            self._halves += [batch[half:], batch[:half]]
            return self._next()
        if isinstance(outcome, list) and len(outcome) != len(batch):
            outcome = RuntimeError(f"the engine gave {len(outcome)} results for {len(batch)} items")
        for position, entry in enumerate(batch):
            job = entry.job
            if isinstance(outcome, BaseException):
                _fail(job, outcome)
            elif not job.done.done():
                job.results[entry.index] = outcome[position]
                job.left -= 1
                job.open -= entry.cost
                self._feed(job)
                if not job.left:
                    job.done.set_result(job.results)
        self._next()


def _fail(job: _Job, error: BaseException) -> None:
    if not isinstance(error, Exception) or isinstance(error, StopIteration):
        # Raised in a task, the one kind would end the event loop; a future refuses the other.
        cause, error = error, RuntimeError(f"the engine stopped with {error!r}")
        error.__cause__ = cause
    if not job.done.done():
        job.done.set_exception(error)
