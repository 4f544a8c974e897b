"""From a changed endpoint to a worker that answers: waits, watches the workers, and names what is wrong."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from deploy.api import Api, ApiError, Endpoint, Worker, Workers
from deploy.smoke import Smoke, SmokeFailed

Cause = Literal[
    "crash_loop", "no_capacity", "wrong_image", "missing_secret", "failed", "timeout", "another_deploy"
]

_NO_IMAGE = re.compile(
    r"manifest (for .* )?(unknown|not found)|pull access denied|repository does not exist|unauthorized"
    r"|failed to (pull|resolve)|no matching manifest|invalid reference format",
    re.IGNORECASE,
)
_SECRET = re.compile(r"RUNPOD_SECRET_(\w+)|no RunPod secret (\w+)")
_LAST_LINES = 40


@dataclass(frozen=True)
class Pace:
    """Seconds. poll: between two looks. unhealthy: that a worker may be so. capacity: without any machine."""

    poll: float = 5
    back_off: float = 1
    log_silence: float = 2
    log_every: float = 20
    unhealthy: float = 30
    capacity: float = 600
    total: float = 3600
    ping: float = 20


class RolloutFailed(Exception):
    """The endpoint does not work. The message is one sentence; `log` has the worker's last lines."""

    def __init__(self, cause: Cause, message: str, log: list[str]) -> None:
        super().__init__(message)
        self.cause, self.log = cause, log


@dataclass
class Rollout:
    """One wait for `endpoint`. show: gets a line of progress at each look."""

    api: Api
    endpoint: Endpoint
    smoke: Smoke
    pace: Pace
    show: Callable[[str], None]
    _begin: float = field(default_factory=time.monotonic)
    _log: list[str] = field(default_factory=list)
    _log_at: float = float("-inf")
    _bad_since: float | None = None
    _none_since: float | None = None
    _uptimes: dict[str, int] = field(default_factory=dict)
    _restarts: int = 0

    def wait(self) -> Any:
        """The smoke job's answer. Raises RolloutFailed, ApiError."""
        try:
            while True:
                seen = self.api.workers(self.endpoint.id)
                self.show(self._progress(seen))
                current = [worker for worker in seen.workers if not worker.is_stale]
                self._look(current)
                if _is_for_the_new(seen.workers) and (answer := self.smoke.step()) is not None:
                    return answer
                if self._seconds() > self.pace.total:
                    raise self._failed("timeout", f"No answer within {self.pace.total:.0f} s.")
                time.sleep(self.pace.poll)
        except SmokeFailed as error:
            self._read_log(self.api.workers(self.endpoint.id).workers)
            raise self._failed("failed", str(error)) from None
        finally:
            self.smoke.stop()

    def _look(self, workers: list[Worker]) -> None:
        """Raises RolloutFailed when waiting longer cannot help."""
        unhealthy = [worker for worker in workers if worker.status == "UNHEALTHY"]
        starting = [worker for worker in workers if worker.status == "INITIALIZING"]
        restarted = self._count_restarts(workers, starting)
        if unhealthy or restarted or (starting and self._now() - self._log_at > self.pace.log_every):
            self._read_log([*unhealthy, *starting])
        if any(map(_NO_IMAGE.search, self._log)):
            raise self._failed("wrong_image", f"RunPod cannot pull {self.endpoint.image}.")
        self._bad_since = (self._bad_since or self._now()) if unhealthy else None
        if self._restarts >= 3 or (self._bad_since and self._now() - self._bad_since > self.pace.unhealthy):
            raise self._failed("crash_loop", "The workers do not get ready: they fail and are started again.")
        placed = [worker for worker in workers if worker.status != "THROTTLED"]
        self._none_since = None if placed else (self._none_since or self._now())
        if self._none_since and self._now() - self._none_since > self.pace.capacity:
            pools = ", ".join((self.endpoint.gpu or {}).get("pools", []))
            message = f"No machine is free in {pools}: add pools or data centres to deploy.toml."
            raise self._failed("no_capacity", message)

    def _count_restarts(self, workers: list[Worker], starting: list[Worker]) -> bool:
        """A worker whose uptime begins anew, or one in the place of one that started, was started again."""
        uptimes = {worker.id: worker.uptime_seconds or 0 for worker in starting}
        gone = self._uptimes.keys() - {worker.id for worker in workers}
        restarts = sum(uptimes[name] < self._uptimes.get(name, 0) for name in uptimes)
        restarts += min(len(gone), len(uptimes.keys() - self._uptimes.keys()))
        self._uptimes = uptimes or {name: self._uptimes[name] for name in gone}
        self._restarts += restarts
        return bool(restarts)

    def _read_log(self, workers: list[Worker]) -> None:
        """Keep the last lines: RunPod drops them soon after a container is gone."""
        self._log_at = self._now()
        for worker in workers[:3]:
            try:
                stream = self.api.logs(
                    self.endpoint.id, worker.id, tail=_LAST_LINES, silence=self.pace.log_silence
                )
                lines = [f"{line.source}: {line.line}" for line in stream]
            except ApiError:
                continue  # the container is gone
            self._log = lines[-_LAST_LINES:] or self._log

    def _failed(self, cause: Cause, message: str) -> RolloutFailed:
        if match := _SECRET.search(f"{message} {' '.join(self._log)}"):
            cause, secret = "missing_secret", match[1] or match[2]
            message = (
                f"The account has no RunPod secret {secret}: create it, or correct [secrets] of deploy.toml."
            )
        return RolloutFailed(cause, message, self._log)

    def _progress(self, seen: Workers) -> str:
        counts: dict[str, int] = {}
        for worker in seen.workers:
            state = "old release" if worker.is_stale else worker.status.lower()
            counts[state] = counts.get(state, 0) + 1
        workers = ", ".join(f"{count} {state}" for state, count in counts.items()) or "no worker yet"
        version = self.endpoint.image.rpartition(":")[2]
        return f"{self._seconds():4.0f} s  {version}  {workers}  {self.smoke.state}"

    def _seconds(self) -> float:
        return self._now() - self._begin

    def _now(self) -> float:
        return time.monotonic()


def _is_for_the_new(workers: list[Worker]) -> bool:
    """Whether a job sent now goes to the new release: workers of the earlier one are gone, or busy with a job
    of theirs while one of the new is ready.
    """
    earlier = [worker.status for worker in workers if worker.is_stale]
    ready = any(not worker.is_stale and worker.status in ("IDLE", "RUNNING") for worker in workers)
    return not earlier or (ready and set(earlier) == {"RUNNING"})
