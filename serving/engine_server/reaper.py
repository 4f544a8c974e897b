"""Ends the processes of an engine. `python reaper.py WORKER SESSION GRACE` first waits for the worker's end.

A worker that is killed outright cannot clean up, and the kernel's own way (PR_SET_PDEATHSIG) reaches only the
engine's first process, not the processes that this one started and which hold the GPU. So a process of a few
megabytes waits beside the engine: when the worker is gone, it ends all processes of the engine. Where the
worker is PID 1, as in a container, the kernel does that too.

Standard library only: it runs by its path, without any interpreter's packages.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

POLL_S = 0.05
KILL_S = 10.0  # what the kernel may take to end a process that holds a GPU


def members(session: int) -> list[int]:
    """The processes of a session that have not ended.

    Unlike a group, a session includes TGI's shards, which lead groups of their own. Without /proc: the group
    of the session's leader, negated, if it exists.
    """
    if not os.path.isdir("/proc/self"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(session, 0)
            return [-session]
        return []
    alive = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # after the name in parentheses: state, parent, group, session
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] not in "ZX":
                    alive.append(int(entry.name))
    return alive


def end(session: int, grace: float) -> None:
    """SIGTERM to the leader of `session`, then to those that it leaves behind; SIGKILL after `grace` seconds.

    The leader first, as engines end their own processes in order and report a crash otherwise.
    """
    deadline = time.monotonic() + grace
    signalled: set[int] = set()
    while (alive := members(session)) and time.monotonic() < deadline:
        for process in [session] if session in alive else alive:
            if process not in signalled:
                signalled.add(process)
                _send(process, signal.SIGTERM)
        time.sleep(POLL_S)
    deadline = time.monotonic() + KILL_S
    while (alive := members(session)) and time.monotonic() < deadline:
        for process in alive:
            _send(process, signal.SIGKILL)
        time.sleep(POLL_S)


def _send(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, number)


if __name__ == "__main__":
    worker, session, grace = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    while os.getppid() == worker:
        time.sleep(0.25)
    end(session, grace)
