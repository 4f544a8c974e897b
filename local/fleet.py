"""The workers of an endpoint: started, supervised, and started again by the rules."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from local.containers import Container
from local.jobs import Rules
from local.workers import WorkerFailed, WorkerProcess


class Work(Protocol):
    """Where the workers' work comes from: a queue's jobs, or a load balancer's requests."""

    def in_flight(self, worker: str) -> int:
        """How many jobs or requests the worker has."""

    def withdraw(self, worker: str) -> None:
        """Give the worker no more, as far as it does not ask again."""

    def drop_worker(self, worker: str) -> None:
        """The worker has exited."""


class Fleet:
    """The workers of an endpoint, each kept alive by the rules.

    variables: the endpoint type's environment variables for the worker of an id. loop: set before the first
    worker is added. workers: the processes that live, and those that have failed and are not (yet) replaced.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        work: Work,
        rules: Rules,
        *,
        endpoint_id: str,
        variables: Callable[[str], Mapping[str, str]],
        echo: bool = False,
    ) -> None:
        self.work, self.rules, self.endpoint_id, self.echo = work, rules, endpoint_id, echo
        self._variables = variables
        self.workers: list[WorkerProcess] = []
        self._supervisors: set[asyncio.Task[None]] = set()
        self._change = asyncio.Event()
        self._stop = asyncio.Event()

    async def add(
        self, command: Sequence[str] | Container, cwd: Path, env: Mapping[str, str]
    ) -> WorkerProcess:
        """Start a worker and keep it alive."""
        worker = WorkerProcess(self, command, cwd, env)
        await worker.start(self._environment(worker.id))
        self.workers.append(worker)
        supervisor = asyncio.create_task(self._supervise(worker))
        self._supervisors.add(supervisor)
        supervisor.add_done_callback(self._supervisors.discard)
        return worker

    def get(self, worker_id: str) -> WorkerProcess | None:
        """The living worker of this id."""
        return next((worker for worker in self.workers if worker.id == worker_id and worker.alive), None)

    def health(self) -> dict[str, int]:
        """The `workers` of /health. `ready` equals `idle`, as on RunPod (observed)."""
        states = [worker.state for worker in self.workers]
        names = ("idle", "initializing", "ready", "running", "throttled", "unhealthy")
        counts = {name: states.count(name) for name in names}
        return counts | {"ready": counts["idle"], "running": counts["running"] + states.count("draining")}

    async def ready(self, count: int) -> None:
        """Wait until `count` workers are ready. Raises WorkerFailed."""
        while sum(worker.alive and worker.ready_after is not None for worker in self.workers) < count:
            for worker in self.workers:
                if worker.state == "unhealthy" and worker.ready_after is None:
                    raise WorkerFailed(
                        f"The worker exited with status {worker.returncode} before it was ready."
                        f" Its last lines:\n{worker.tail()}"
                    )
            await self._change.wait()

    def notify(self) -> None:
        """Wake the waiters in `ready`."""
        self._change.set()
        self._change = asyncio.Event()

    def check_pings(self) -> None:
        """Mark the workers whose pings have stopped as unresponsive."""
        for worker in self.workers:
            worker.check_pings(self.rules.missed_pings * self.rules.ping_interval)

    async def stop(self) -> None:
        """End all workers, with grace, and wait for it."""
        self._stop.set()
        for worker in self.workers:
            worker.terminate()
        await asyncio.gather(*self._supervisors)

    async def _supervise(self, worker: WorkerProcess) -> None:
        failures = 0
        while True:
            await worker.wait()
            self.work.drop_worker(worker.id)
            self.notify()
            if worker.returncode == 0 and worker.ready_after is not None:
                failures = 0
            else:
                failures = 1 if worker.jobs_taken else failures + 1
            if worker.replace_on_exit and failures:
                if failures > self.rules.restarts:
                    return
                with contextlib.suppress(TimeoutError):
                    delay = self.rules.restart_delay * 2 ** (failures - 1)
                    await asyncio.wait_for(self._stop.wait(), delay)
            if not worker.replace_on_exit:
                self.workers.remove(worker)
                return
            successor = WorkerProcess(self, worker.command, worker.cwd, worker.env)
            await successor.start(self._environment(successor.id))
            self.workers[self.workers.index(worker)] = worker = successor
            if self._stop.is_set():
                worker.terminate()

    def _environment(self, worker_id: str) -> dict[str, str]:
        """What RunPod sets, and the endpoint's type."""
        # The heartbeat goes through the environment's proxy otherwise.
        no_proxy = ",".join(
            filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"])
        )
        return {
            "no_proxy": no_proxy,
            "NO_PROXY": no_proxy,
            "RUNPOD_POD_ID": worker_id,
            "RUNPOD_POD_HOSTNAME": worker_id,
            "RUNPOD_ENDPOINT_ID": self.endpoint_id,
            "RUNPOD_AI_API_KEY": worker_id,
            **self._variables(worker_id),
        }
