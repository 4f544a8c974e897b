"""Worker processes: started with the platform's environment, watched, drained, replaced, never orphaned."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from local.containers import Container
from serving.engine_server import reaper

if TYPE_CHECKING:
    from local.fleet import Fleet

_PHASE = re.compile(r"phase=(\S+) seconds=(\d+(?:\.\d+)?)")
_LINES, _LINE_LENGTH = 5000, 10_000


class WorkerFailed(RuntimeError):
    """A worker has died before it was ready; the message ends with its last log lines."""


class WorkerProcess:
    """One process of a worker; its replacement is another WorkerProcess, with an id of its own.

    id: the worker's (pod's) id.
    phases: seconds by name, from log lines that hold `phase=<name> seconds=<float>`.
    ready_after: seconds from the process's start until it asked for a job, or its /ping answered 200; None
    before that.
    jobs_taken: how many jobs, or requests of a load balancer, it has received.
    returncode: None while it lives; negative for a signal.
    """

    def __init__(
        self, fleet: Fleet, command: Sequence[str] | Container, cwd: Path, env: Mapping[str, str]
    ) -> None:
        self.id = uuid.uuid4().hex[:14]
        self.command, self.cwd, self.env = command, cwd, dict(env)
        self.phases: dict[str, float] = {}
        self.ready_after: float | None = None
        self.returncode: int | None = None
        self.jobs_taken = 0
        self.draining = False  # Gets no more jobs: it was terminated, or asks to be refreshed.
        self.replace_on_exit = True  # Another process replaces it when it exits.
        self.unresponsive = False  # Its pings have stopped.
        self._killed = False
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._fleet = fleet
        self._last_ping = self._started = 0.0
        self._process: asyncio.subprocess.Process | None = None

    def __repr__(self) -> str:
        return f"<WorkerProcess {self.id} {self.state}>"

    @property
    def pid(self) -> int:
        """The id of the process and of its group."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self.returncode is None and not self._killed

    @property
    def lines(self) -> list[str]:
        """The last lines of its standard output and error."""
        return list(self._lines)

    def tail(self) -> str:
        """The end of its log, to be shown in an error."""
        lines = "\n".join(map(_readable, self.lines[-20:])).splitlines()
        return "\n".join(f"  {line}" for line in lines[-20:]) or "  (it wrote nothing)"

    @property
    def state(self) -> str:
        """initializing, idle, running, draining, unhealthy (failed, or without pings) or exited."""
        if not self.alive:
            expected = self.returncode == 0 and self.ready_after is not None
            return "exited" if expected or self._killed or not self.replace_on_exit else "unhealthy"
        if self.draining:
            return "draining"
        if self.unresponsive:
            return "unhealthy"
        if self.ready_after is None:
            return "initializing"
        return "running" if self._fleet.work.in_flight(self.id) else "idle"

    def kill(self) -> None:
        """SIGKILL to the process and all that it has started. It is replaced, as after a crash."""
        if self.returncode is None:
            self._killed = True
            self._signal_group()

    def terminate(self) -> None:
        """Send SIGTERM, and SIGKILL when the grace is over. It finishes its jobs and is not replaced."""
        self.replace_on_exit, self.draining = False, True
        self._fleet.loop.call_soon_threadsafe(self._drain)

    def refresh(self) -> None:
        """Drain it: it gets no more jobs, and is replaced when those that it has end."""
        self.draining = True
        self._fleet.work.withdraw(self.id)
        if not self._fleet.work.in_flight(self.id):
            self._drain()

    def mark_ready(self) -> None:
        """It polls for a job, or its /ping answers 200."""
        if self.ready_after is None:
            self.ready_after = time.monotonic() - self._started
            self.ping_received()
            self._fleet.notify()

    def ping_received(self) -> None:
        self._last_ping = time.monotonic()

    def check_pings(self, patience: float) -> None:
        """Give it no jobs while its last ping is older than `patience` seconds."""
        self.unresponsive = self.ready_after is not None and time.monotonic() - self._last_ping > patience
        if self.unresponsive:
            self._fleet.work.withdraw(self.id)

    async def start(self, variables: Mapping[str, str]) -> None:
        """Start the process, in a session of its own. variables: what the platform sets."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RUNPOD_")}
        env = {**inherited, **variables, **self.env}
        if isinstance(self.command, Container):
            command = self.command.command(self.id, {*variables, *self.env})
        else:
            command = list(self.command)
        read, write = os.pipe()
        # Not the subprocess's own pipe: its wait() lasts until every grandchild has closed it.
        self._log = _Log(self._line)
        self._pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: self._log, os.fdopen(read, "rb", 0)
        )
        try:
            self._started = time.monotonic()
            self._process = await asyncio.create_subprocess_exec(
                *command,
                cwd=self.cwd,
                env=env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write,
                stderr=write,
                start_new_session=True,
            )
            # If this process is killed and cannot clean up, its workers end too.
            numbers = [str(number) for number in (os.getpid(), self.pid, self._fleet.rules.grace)]
            self._guard = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", reaper.__file__, *numbers,
                stdin=asyncio.subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except BaseException:
            if self._process is not None:
                self._signal_group()
            self._pipe.close()
            raise
        finally:
            os.close(write)

    async def wait(self) -> None:
        """Wait for its exit, and end the processes that it leaves, such as the SDK's heartbeat."""
        assert self._process is not None
        code = await self._process.wait()
        self._signal_group()
        self._guard.kill()
        await self._guard.wait()
        if isinstance(self.command, Container):
            await self.command.remove(self.id)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._log.closed.wait(), 5)
        self._pipe.close()
        self.returncode = code

    def _drain(self) -> None:
        # Its long polls end first: a job that they bring after SIGTERM may never be started.
        self._fleet.work.withdraw(self.id)
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            self._fleet.loop.call_later(self._fleet.rules.grace, self.kill)

    def _signal_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _line(self, line: str) -> None:
        self._lines.append(line)
        if match := _PHASE.search(line):
            self.phases[match[1]] = float(match[2])
        if self._fleet.echo:
            print(f"[{self.id[:4]}] {_readable(line)}", file=sys.stderr, flush=True)


def _readable(line: str) -> str:
    """The message of a line in the SDK's JSON; any other line as it is."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        entry = json.loads(line)
        return f"{entry['level']:<7} {entry['message']}"
    return line


class _Log(asyncio.Protocol):
    """Cuts what comes through a pipe into lines."""

    def __init__(self, line: Callable[[str], None]) -> None:
        self.closed = asyncio.Event()
        self._line = line
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = re.split(rb"[\r\n]+", self._rest + data)
        if len(self._rest) > _LINE_LENGTH:
            lines.append(self._rest)
            self._rest = b""
        for line in filter(None, lines):
            self._line(line[:_LINE_LENGTH].decode(errors="replace"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.data_received(b"\n")
        self.closed.set()
