"""A lock between processes, on one host or on many that share a file system."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shared.logs import log

BEAT_S = 3.0  # the holder shows that it lives
STALE_S = 30.0  # a lock that stands still for so long has lost its holder
SAY_S = 10.0  # a wait shows in the log
_POLL_S = 0.2


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock that is `folder`; waits for as long as its holder lives. Raises OSError as the disk does.

    flock is not used: on a network file system it may hold within one host only. What every file system keeps
    is that one process alone creates a file of a given name. So the lock is a row of numbered files: who
    creates the next number holds it, and may do so when the last one has a `.free` beside it or has lost its
    holder. Nobody ever deletes a file that another might just have created.

    The holder touches its file every BEAT_S. A waiter calls it lost when it has not changed for STALE_S by
    the waiter's own clock (the clocks of two hosts are never compared), and at once when the holder was a
    process of the waiter's own container and is gone.

    A holder that only slept, a paused host say, may wake up beside its heir: what is done under the lock has
    to be safe then, if wasteful.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begin = still_since = time.monotonic()
    said, seen = begin - SAY_S, None
    while True:
        last = _last(folder)
        held, now = folder / str(last), time.monotonic()
        if (beat := (last, _changed(held))) != seen:
            still_since, seen = now, beat
        free = last == 0 or (folder / f"{last}.free").exists()
        if free or _is_gone(held) or now - still_since > STALE_S:
            mine = folder / str(last + 1)
            if _create(mine) and _last(folder) == last + 1:
                break
            continue
        if now - said >= SAY_S:
            said = now
            log.info("waiting for another worker, %.0f s so far: %s", now - begin, folder)
        time.sleep(_POLL_S)
    if not free:
        log.warning("taken over from a worker that is gone: %s", folder)
    for old in folder.iterdir():
        if old.stem.isdigit() and int(old.stem) < last:
            old.unlink(missing_ok=True)
    try:
        with every(BEAT_S, lambda: os.utime(mine)):
            yield
    finally:
        try:
            mine.with_suffix(".free").touch()
        except OSError:
            # A full disk still deletes, and then the number before it counts, which is free or lost.
            with suppress(OSError):
                mine.unlink()


@contextmanager
def every(seconds: float, call: Callable[[], object]) -> Iterator[None]:
    """Call again and again while the block runs, on a thread of its own; an OSError is passed over."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(seconds):
            with suppress(OSError):
                call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _last(folder: Path) -> int:
    return max((int(path.name) for path in folder.iterdir() if path.name.isdigit()), default=0)


def _changed(held: Path) -> int:
    with suppress(OSError):
        return held.stat().st_mtime_ns
    return 0


def _create(mine: Path) -> bool:
    try:
        with mine.open("x") as file:
            json.dump({"host": _host(), "pid": os.getpid(), "began": _began(os.getpid())}, file)
    except FileExistsError:
        return False
    except OSError:
        mine.unlink(missing_ok=True)
        raise
    return True


def _is_gone(held: Path) -> bool:
    """Whether the holder was a process of this container that is no more."""
    try:
        holder = json.loads(held.read_text())
        here = bool(_host()) and holder["host"] == _host()
        return here and bool(holder["began"] != _began(holder["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _host() -> str:
    """This container: its processes, and no others, know each other by number. Empty if it is unknown."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _began(pid: int) -> str | None:
    """When a process began, which no later one of its number shares; None when it is gone."""
    with suppress(OSError, IndexError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else fields[18]
    return None
