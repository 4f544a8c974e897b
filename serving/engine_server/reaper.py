"""Ends the processes of an engine, whatever they do: `python reaper.py WORKER SESSION GRACE` waits first.

A worker that is killed outright can tidy nothing up, and the kernel's own way (PR_SET_PDEATHSIG) reaches only
the engine's first process, not the model's processes that this one started and which hold the GPU. So a
process of a few megabytes stands by: when the worker is gone, it ends all that the engine started. In a
container that is the kernel's doing too, where the worker is PID 1; elsewhere it is not.

Standard library only: it runs by its path, beside any interpreter's packages.
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
    """The processes of a session that have not ended. Unlike a group, a session also has those of TGI's
    shards, which make groups of their own. Without /proc: the group of the session's leader, if it is there.
    """
    if not os.path.isdir("/proc/self"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(session, 0)
            return [-session]
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # after the name: state, parent, group, session
                state, _, _, its = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(its) == session and state not in "ZX":
                    found.append(int(entry.name))
    return found


def end(session: int, grace: float) -> None:
    """SIGTERM to the leader of `session`, then to those that it leaves behind; SIGKILL after `grace` seconds.

    The leader first, as engines end their own processes in good order and report a crash otherwise.
    """
    deadline = time.monotonic() + grace
    told: set[int] = set()
    while (left := members(session)) and time.monotonic() < deadline:
        for process in [session] if session in left else left:
            if process not in told:
                told.add(process)
                _send(process, signal.SIGTERM)
        time.sleep(POLL_S)
    deadline = time.monotonic() + KILL_S
    while (left := members(session)) and time.monotonic() < deadline:
        for process in left:
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
