"""The lock between processes and hosts, on a clock that only its own waiting moves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared import lock as module
from shared.lock import STALE_S, lock


class Clock:
    """In the place of `time` in shared.lock. `each` is called in every sleep."""

    def __init__(self) -> None:
        self.now = 0.0
        self.each: Callable[[], None] = lambda: None
        self._mutex = threading.Lock()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._mutex:
            self.now += seconds
            self.each()
        time.sleep(0.001)

    def stand_still(self) -> None:
        """As `each`: however long a holder takes here, no waiter calls it lost."""
        self.now = 0.0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def held_elsewhere(folder: Path, number: int = 1) -> Path:
    """As a worker on another host holds it."""
    folder.mkdir(parents=True)
    held = folder / str(number)
    held.write_text(json.dumps({"host": "another", "pid": os.getpid(), "began": "1"}))
    return held


def seconds_to_get(folder: Path) -> float:
    begin = module.time.monotonic()
    with lock(folder):
        return module.time.monotonic() - begin


def test_one_at_a_time_and_all_in_the_end(tmp_path: Path, clock: Clock) -> None:
    clock.each = clock.stand_still
    inside: list[int] = []

    def work(number: int) -> int:
        with lock(tmp_path / "a" / "lock"):
            inside.append(number)
            time.sleep(0.01)
            assert inside == [number]
            inside.clear()
        return number

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(work, range(24))) == list(range(24))
    assert len(list((tmp_path / "a" / "lock").iterdir())) <= 4, "old numbers are cleared away"


def test_is_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), lock(tmp_path):
        raise RuntimeError
    assert seconds_to_get(tmp_path) == 0


def test_a_beating_lock_of_another_host_is_waited_for(tmp_path: Path, clock: Clock) -> None:
    held = held_elsewhere(tmp_path / "lock")
    beats = iter(range(100))

    def beat() -> None:
        # A clock that is a day behind and a beat that goes backwards: only change counts.
        if (step := next(beats, None)) is not None:
            os.utime(held, (1e9 - step, 1e9 - step))
            clock.now += STALE_S / 2

    clock.each = beat
    assert seconds_to_get(tmp_path / "lock") > 100 * STALE_S / 2 + STALE_S


def test_a_still_lock_of_another_host_is_taken_over_by_one(tmp_path: Path, clock: Clock) -> None:
    held_elsewhere(tmp_path / "lock", 7)
    inside, most = 0, 0

    def work(_: int) -> None:
        nonlocal inside, most
        with lock(tmp_path / "lock"):
            inside += 1
            most = max(most, inside)
            clock.each = clock.stand_still
            time.sleep(0.02)
            inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert most == 1


def test_an_old_view_of_the_folder_does_not_make_a_second_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system may show an old listing: here, one of before 4 was taken and cleared away."""
    held_elsewhere(tmp_path / "lock", 9)
    (tmp_path / "lock" / "3.free").touch()
    views = iter([3])
    last = module._last
    monkeypatch.setattr(module, "_last", lambda folder: next(views, None) or last(folder))
    assert seconds_to_get(tmp_path / "lock") > STALE_S


def test_a_dead_process_of_this_host_is_not_waited_for(tmp_path: Path) -> None:
    code = "import sys, os; from pathlib import Path; from shared.lock import lock\n"
    code += "with lock(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=Path(__file__).parents[2], check=False)
    assert (tmp_path / "1").exists()
    assert not (tmp_path / "1.free").exists()
    assert seconds_to_get(tmp_path) == 0


def test_a_process_number_that_is_in_use_again_is_another_process(tmp_path: Path) -> None:
    with lock(tmp_path):
        holder = json.loads((tmp_path / "1").read_text())
    (tmp_path / "2").write_text(json.dumps({**holder, "began": "1"}))
    assert seconds_to_get(tmp_path) == 0


def test_a_lock_that_was_only_begun_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "1").touch()
    assert STALE_S < seconds_to_get(tmp_path) < STALE_S + 1


def test_a_waiter_says_so_once_a_while(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_elsewhere(tmp_path / "lock")
    seconds_to_get(tmp_path / "lock")
    said = [line for line in capsys.readouterr().out.splitlines() if "waiting for another worker" in line]
    assert [line.partition(" so far")[0].split(", ")[-1] for line in said] == ["0 s", "10 s", "20 s"]


def test_an_unwritable_place_is_an_error_at_once() -> None:
    with pytest.raises(OSError, match="sys"), lock(Path("/sys/lock")):
        pass


def test_a_full_disk_leaves_no_lock_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", full)
        with pytest.raises(OSError, match="No space"), lock(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch, lock(tmp_path):
        patch.setattr(Path, "touch", full)
    assert seconds_to_get(tmp_path) == 0
