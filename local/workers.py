"""Worker processes: started with the platform's environment, watched, replaced, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from local.queue import Queue, Rules

_PHASE = re.compile(r"phase=(\S+) seconds=(\d+(?:\.\d+)?)")
_LINES = 5000
_LINE_LENGTH = 10_000


class WorkerFailed(RuntimeError):
    """A worker has died before it was ready; the message ends with its last log lines."""


class WorkerProcess:
    """One process of a worker. A replacement is a new WorkerProcess, with a new id.

    id: what RunPod calls the worker's (pod's) id.
    phases: seconds by name, from log lines that hold `phase=<name> seconds=<float>`.
    ready_after: seconds from the process's start to its first request for a job; None before that.
    """

    def __init__(self, command: Sequence[str], cwd: Path, env: Mapping[str, str]) -> None:
        self.id = uuid.uuid4().hex[:14]
        self.command = list(command)
        self.cwd = cwd
        self.env = dict(env)
        self.phases: dict[str, float] = {}
        self.ready_after: float | None = None
        self.returncode: int | None = None
        self.finished_jobs = 0
        self.leaving = False
        """It gets no more jobs: it was told to terminate, or asked to be refreshed."""
        self.wanted = True
        """A new one takes its place when it ends."""
        self.missing = False
        """Its pings have stopped."""
        self._last_ping = 0.0
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._killed = False
        self._started = 0.0
        self._fleet: Fleet | None = None
        self._process: asyncio.subprocess.Process | None = None

    def __repr__(self) -> str:
        return f"<WorkerProcess {self.id} pid={self.pid} {self.state}>"

    @property
    def pid(self) -> int:
        """The process's id, which is its group's too."""
        if self._process is None:
            raise RuntimeError("The worker has not been started.")
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self.returncode is None and not self._killed

    @property
    def lines(self) -> list[str]:
        """The last lines of its standard output and error."""
        return list(self._lines)

    @property
    def state(self) -> str:
        """initializing, idle, running, draining, exited or unhealthy (it failed, or its pings have stopped)."""
        if not self.alive:
            return "exited" if self.returncode == 0 or self._killed or not self.wanted else "unhealthy"
        if self.leaving:
            return "draining"
        if self.missing:
            return "unhealthy"
        if self.ready_after is None:
            return "initializing"
        return "running" if self._fleet and self._fleet.queue.held(self.id) else "idle"

    @property
    def failed_to_start(self) -> bool:
        """It ended by itself without having asked for a job."""
        return self.returncode is not None and self.ready_after is None and self.wanted and not self._killed

    def kill(self) -> None:
        """SIGKILL to the process and all it has started. It is replaced, as after a crash."""
        if self.returncode is None:
            self._killed = True
            self._signal_group(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM, and SIGKILL after the time of grace: it finishes its jobs, gets no new one, is not replaced."""
        self.wanted = False
        self._leave()

    # ---- what the fleet and the server tell it ---------------------------------------------------------

    def asked(self) -> None:
        """It has asked for a job."""
        if self.ready_after is None:
            self.ready_after = time.monotonic() - self._started
            self.pinged()
            if self._fleet:
                self._fleet.changed()

    def pinged(self) -> None:
        self._last_ping = time.monotonic()
        self.missing = False

    def refresh(self) -> None:
        """It asked to be replaced: once its other jobs have ended."""
        self.leaving = True
        if self._fleet and not self._fleet.queue.held(self.id):
            self._leave()

    def check_pings(self, patience: float) -> None:
        """Give it no jobs while it has not pinged for `patience` seconds."""
        self.missing = self.ready_after is not None and time.monotonic() - self._last_ping > patience

    async def start(self, fleet: Fleet, env: Mapping[str, str]) -> None:
        """Start the process in a session of its own."""
        self._fleet = fleet
        command = self.command
        if setpriv := shutil.which("setpriv"):
            # Linux: should this process die without a chance to clean up, its workers end too.
            command = [setpriv, "--pdeathsig", "TERM", *command]
        read, write = os.pipe()
        try:
            self._started = time.monotonic()
            self._process = await asyncio.create_subprocess_exec(
                *command,
                cwd=self.cwd,
                env={**env, **self.env},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write,
                stderr=write,
                start_new_session=True,
            )
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        self._log = _Log(self._line)
        # Not the subprocess's own pipe: its wait() would last until every grandchild has closed it.
        self._pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: self._log, os.fdopen(read, "rb", 0)
        )

    async def ended(self) -> None:
        """Wait for its end, and end what it has left behind."""
        assert self._process is not None
        code = await self._process.wait()
        self._signal_group(signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._log.closed.wait(), 5)
        self._pipe.close()
        self.returncode = code

    def _leave(self) -> None:
        self.leaving = True
        if self._fleet and self._process and self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            self._fleet.loop.call_soon_threadsafe(self._fleet.see_off, self)

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _line(self, line: str) -> None:
        self._lines.append(line)
        if match := _PHASE.search(line):
            self.phases[match[1]] = float(match[2])
        if self._fleet and self._fleet.echo:
            print(f"[{self.id[:4]}] {line}", file=sys.stderr, flush=True)


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
        for line in lines:
            if line:
                self._line(line[:_LINE_LENGTH].decode(errors="replace"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._rest:
            self._line(self._rest.decode(errors="replace"))
        self.closed.set()


class Fleet:
    """The workers of an endpoint, each kept alive by the rules.

    url: the endpoint's base, `http://127.0.0.1:PORT/v2/<endpoint>`; set before the first worker is added.
    workers: the processes that live, and those that have failed and are not (yet) replaced.
    """

    def __init__(self, queue: Queue, rules: Rules, *, endpoint_id: str, echo: bool = False) -> None:
        self.queue = queue
        self.rules = rules
        self.endpoint_id = endpoint_id
        self.echo = echo
        self.url = ""
        self.workers: list[WorkerProcess] = []
        self.loop: asyncio.AbstractEventLoop
        self._keepers: dict[asyncio.Task[None], None] = {}
        self._change = asyncio.Event()
        self._stopping = False

    async def add(self, command: Sequence[str], cwd: Path, env: Mapping[str, str]) -> WorkerProcess:
        """Start a worker and keep it alive."""
        self.loop = asyncio.get_running_loop()
        worker = WorkerProcess(command, cwd, env)
        await worker.start(self, self._environment(worker.id))
        self.workers.append(worker)
        keeper = asyncio.create_task(self._keep(worker))
        self._keepers[keeper] = None
        keeper.add_done_callback(lambda task: self._keepers.pop(task, None))
        return worker

    def get(self, worker_id: str) -> WorkerProcess | None:
        """The living worker of this id."""
        return next((worker for worker in self.workers if worker.id == worker_id and worker.alive), None)

    def health(self) -> dict[str, int]:
        """The `workers` half of /health. `ready` equals `idle`, as on RunPod."""
        states = [worker.state for worker in self.workers]
        idle = states.count("idle")
        return {
            "idle": idle,
            "initializing": states.count("initializing"),
            "ready": idle,
            "running": states.count("running") + states.count("draining"),
            "throttled": 0,
            "unhealthy": states.count("unhealthy"),
        }

    async def ready(self, count: int) -> None:
        """Wait until `count` workers have asked for a job. Raises WorkerFailed."""
        while True:
            failed = [worker for worker in self.workers if worker.failed_to_start]
            ready = [worker for worker in self.workers if worker.alive and worker.ready_after is not None]
            if len(ready) >= count:
                return
            if failed:
                raise WorkerFailed(
                    f"Worker {failed[0].id} exited with status {failed[0].returncode} before it was ready."
                    f" Its last lines:\n{tail(failed[0])}"
                )
            await self._change.wait()

    def changed(self) -> None:
        """Wake who waits in `ready`."""
        self._change.set()
        self._change = asyncio.Event()

    def check_pings(self) -> None:
        for worker in self.workers:
            worker.check_pings(self.rules.missed_pings * self.rules.ping_interval)

    def see_off(self, worker: WorkerProcess) -> None:
        """Help a worker that was sent SIGTERM to leave: answer its long polls, kill it when its time is up."""
        # A moment later, so that the signal's handler has run when the worker reads the answer.
        self.loop.call_later(0.05, self.queue.dismiss, worker.id)
        self.loop.call_later(self.rules.grace, lambda: worker.alive and worker.kill())

    async def stop(self) -> None:
        """End all workers, with grace, and wait for it."""
        self._stopping = True
        for worker in self.workers:
            if worker.returncode is None:
                worker.terminate()
        for keeper in list(self._keepers):
            with contextlib.suppress(asyncio.CancelledError):
                await keeper

    async def _keep(self, worker: WorkerProcess) -> None:
        failures = 0
        while True:
            await worker.ended()
            self.queue.leave(worker.id)
            self.changed()
            if not worker.wanted or self._stopping:
                self.workers.remove(worker)
                return
            if worker.returncode == 0 and worker.ready_after is not None:
                failures = 0
            else:
                failures = 1 if worker.finished_jobs else failures + 1
                if failures > self.rules.restarts:
                    return
                await self._pause(self.rules.restart_delay * 2 ** (failures - 1))
            if self._stopping:
                return
            successor = WorkerProcess(worker.command, worker.cwd, worker.env)
            await successor.start(self, self._environment(successor.id))
            self.workers[self.workers.index(worker)] = successor
            worker = successor
            if self._stopping:
                worker.terminate()

    async def _pause(self, seconds: float) -> None:
        deadline = self.loop.time() + seconds
        while not self._stopping and (left := deadline - self.loop.time()) > 0:
            await asyncio.sleep(min(left, 0.2))

    def _environment(self, worker_id: str) -> dict[str, str]:
        """What RunPod sets, on top of this process's own environment."""
        env = {key: value for key, value in os.environ.items() if not key.startswith("RUNPOD_")}
        url = self.url
        return env | {
            "RUNPOD_POD_ID": worker_id,
            "RUNPOD_POD_HOSTNAME": worker_id,
            "RUNPOD_ENDPOINT_ID": self.endpoint_id,
            "RUNPOD_AI_API_KEY": worker_id,
            "RUNPOD_PING_INTERVAL": str(round(1000 * self.rules.ping_interval)),
            "RUNPOD_WEBHOOK_GET_JOB": f"{url}/job-take/$ID?gpu=local",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{url}/job-done/$RUNPOD_POD_ID/$ID?gpu=local",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{url}/job-stream/$RUNPOD_POD_ID/$ID?gpu=local",
            "RUNPOD_WEBHOOK_PING": f"{url}/ping/$RUNPOD_POD_ID?gpu=local",
            # They demand 4 GB of memory, the internet and a GPU.
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }


def tail(worker: WorkerProcess, lines: int = 20) -> str:
    """The last lines of a worker's log."""
    return "\n".join(f"  {line}" for line in worker.lines[-lines:]) or "  (it wrote nothing)"
