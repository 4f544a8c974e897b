"""The number of threads of a decode step follows what is fastest, at little cost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from serving.continuous_batching.step_threads import StepThreads


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Machine:
    """Steps whose seconds depend on torch's threads, on a clock of their own."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.now = 0.0
        self.chooser = StepThreads(threads, clock=lambda: self.now)

    def steps(self, count: int, seconds: dict[int, float], batch_size: int = 1) -> float:
        """The seconds that `count` steps take."""
        begin = self.now

        def step() -> None:
            self.now += seconds[torch.get_num_threads()]

        for _ in range(count):
            self.chooser.run(step, batch_size)
        return self.now - begin


IDLE, BUSY = {1: 0.05, 3: 0.035, 4: 0.03}, {1: 0.003, 3: 0.3, 4: 0.4}


@pytest.mark.parametrize("seconds", [IDLE, BUSY], ids=["idle", "busy"])
def test_steps_take_little_longer_than_on_the_best_number_throughout(seconds: dict[int, float]) -> None:
    machine = Machine(4)
    machine.steps(20, seconds)
    assert machine.steps(2000, seconds) < 2000 * min(seconds.values()) * 1.15
    machine.steps(2000, seconds)
    assert machine.steps(20_000, seconds) < 20_000 * min(seconds.values()) * 1.03


def test_the_choice_follows_the_machine_and_the_batch() -> None:
    machine = Machine(4)
    machine.steps(200, IDLE)
    assert machine.steps(200, BUSY) < 40, "80 on all threads"
    machine.steps(20_000, BUSY)
    machine.steps(1500, IDLE)
    assert machine.steps(100, IDLE) < 100 * IDLE[4] * 1.05
    machine.steps(50, BUSY, batch_size=64)
    assert machine.steps(100, IDLE) < 100 * IDLE[4] * 1.05, "another batch size has a choice of its own"


def test_all_threads_are_to_be_had_between_steps() -> None:
    machine = Machine(2)
    machine.steps(1, {1: 1.0, 2: 2.0})
    assert torch.get_num_threads() == 1
    machine.chooser.use(2)
    assert torch.get_num_threads() == 2
