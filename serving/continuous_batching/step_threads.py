"""How many of torch's threads a decode step on CPU uses."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
STEPS = 4  # in a trial
COST = 0.01  # of the time, for trials that lose
LONGEST_S = 30.0  # without a trial


class StepThreads:
    """Runs decode steps on one of torch's threads, on all, or on all but one: on what is fastest now.

    Threads that share an operation spin while they wait for each other, and one that lost its core to another
    process delays all: a step of a tiny model takes a hundred times as long. On an idle machine a step of a
    large batch is faster on all threads. Which it is depends on the model, the batch and the machine's other
    load, so it is measured (benchmarks/results/huggingface.md).

    threads: how many torch has; 1: nothing is to be chosen. clock: seconds.
    """

    def __init__(self, threads: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.threads, self._clock = threads, clock
        self._set = threads
        self._trials: defaultdict[int, _Trials] = defaultdict(lambda: _Trials(threads))

    def run(self, step: Callable[[], T], batch_size: int) -> T:
        """The result of `step`, which runs the model for one token of each sequence."""
        if self.threads == 1:
            return step()
        trials = self._trials[batch_size.bit_length()]
        begin = self._clock()
        self.use(trials.choose(begin))
        result = step()
        end = self._clock()
        trials.measured(end - begin, end)
        return result

    def use(self, threads: int) -> None:
        """Set how many threads torch uses for operations of the calling thread."""
        if threads != self._set:
            torch.set_num_threads(threads)
            self._set = threads


class _Trials:
    """The best number of threads, and trials of others, by turns: STEPS steps against as many of the best.

    A trial ends as soon as it has lost. The next one waits 1 / COST times as long as that cost.
    """

    def __init__(self, threads: int) -> None:
        self._best, *self._others = sorted({1, max(1, threads - 1), threads})
        self._last: list[float] = []  # seconds of the last steps on `_best`
        self._trial: list[float] = []
        self._next_s = 0.0
        self._trying = False

    def choose(self, now_s: float) -> int:
        self._trying = bool(self._trial) or (len(self._last) == STEPS and now_s >= self._next_s)
        return self._others[0] if self._trying else self._best

    def measured(self, seconds: float, now_s: float) -> None:
        if not self._trying:
            self._last = [*self._last, seconds][-STEPS:]
            return
        self._trial.append(seconds)
        if sum(self._trial) >= sum(self._last):
            lost = sum(self._trial) - len(self._trial) * sum(self._last) / STEPS
            self._next_s = now_s + min(max(lost, 0.0) / COST, LONGEST_S)
            self._others.append(self._others.pop(0))
            self._trial = []
        elif len(self._trial) == STEPS:
            self._best, self._others = self._others[0], [*self._others[1:], self._best]
            self._last, self._trial = self._trial, []
