"""RunPod's job queue in memory: states, deadlines, retries, fair dispatch. No HTTP, processes or tasks in it.

Everything happens inside calls; time passes in `expire()`. Not thread-safe: one event loop owns a queue.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True)
class Rules:
    """The platform's limits and intervals, in seconds and bytes, with RunPod's own values as defaults.

    Those marked "observed" are not documented: people report them of the live platform.
    """

    run_bytes: int = 10 * MIB
    """Largest body of a /run, and largest result of such a job."""
    runsync_bytes: int = 20 * MIB
    """The same for /runsync and the OpenAI routes."""
    chunk_bytes: int = MIB
    """Largest piece of a stream; larger ones are split."""
    execution_timeout: float = 600.0
    execution_timeout_range: tuple[float, float] = (5.0, 7 * 86400.0)
    ttl: float = 86400.0
    """A job's whole life, queue and run; after it the job is gone without a trace."""
    ttl_range: tuple[float, float] = (10.0, 7 * 86400.0)
    run_retention: float = 1800.0
    runsync_retention: float = 60.0
    wait: float = 90.0
    """How long a /runsync waits before it answers with the job's state."""
    wait_range: tuple[float, float] = (1.0, 300.0)
    edge_timeout: float = 100.0
    """Time to the first byte of an OpenAI route, then 524 (observed)."""
    retries: int = 1
    """How often a job that its worker lost is run again before it fails (observed)."""
    ping_interval: float = 10.0
    """Whole seconds: the SDK drops the rest."""
    missed_pings: int = 4
    """A job that its worker's pings have not named for so many intervals is lost (observed)."""
    queue_per_worker: int = 500
    """A queue longer than 50 and than so many jobs a worker takes no more."""
    webhook_retries: int = 2
    webhook_delay: float = 10.0
    poll: float = 30.0
    """How long a worker's request for jobs or stop signals is held open."""
    restarts: int = 3
    """How often in a row a worker is started again that ended without having taken a job."""
    restart_delay: float = 1.0
    """Pause before the first of these, doubled for each further one."""
    grace: float = 30.0
    """From SIGTERM to SIGKILL."""

    def __post_init__(self) -> None:
        if self.ping_interval < 1 or self.ping_interval % 1:
            raise ValueError("ping_interval must be whole seconds, at least 1")


class State(StrEnum):
    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"

    @property
    def final(self) -> bool:
        return self not in (State.IN_QUEUE, State.IN_PROGRESS)


class Refused(Exception):
    """What was asked for is not done; `status` is the HTTP status for it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(eq=False)
class Job:
    """A job and its fate. Times are seconds on the queue's clock.

    work: what the worker receives. sync: came by /runsync, so that its result is kept for the shorter time.
    seen: when its worker took it or last named it. result: `output` and `error`, as far as there are any.
    chunks: what was streamed and not yet read. listeners: called, and forgotten, at the next change.
    """

    id: str
    work: dict[str, Any]
    sync: bool
    created: float
    execution_timeout: float
    ttl: float
    state: State = State.IN_QUEUE
    worker: str | None = None
    taken: float = 0.0
    seen: float = 0.0
    ended: float = 0.0
    retries: int = 0
    result: dict[str, Any] = field(default_factory=dict)
    chunks: deque[Any] = field(default_factory=deque)
    listeners: list[Callable[[], None]] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """The job as /status shows it; times in milliseconds."""
        body: dict[str, Any] = {"id": self.id, "status": self.state.value}
        if self.worker is not None:
            body |= {"delayTime": round(1000 * (self.taken - self.created)), "workerId": self.worker}
            if self.state.final:
                body["executionTime"] = round(1000 * (self.ended - self.taken))
        if self.retries:
            body["retries"] = self.retries
        return body | self.result

    def changed(self) -> None:
        """Call the listeners."""
        listeners, self.listeners = self.listeners, []
        for listener in listeners:
            listener()


class Queue:
    """All jobs of an endpoint. `on_end` is called with each job that reaches a final state."""

    def __init__(
        self,
        rules: Rules | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_end: Callable[[Job], None] = lambda job: None,
    ) -> None:
        self.rules = rules or Rules()
        self.jobs: dict[str, Job] = {}
        self.counts = {"completed": 0, "failed": 0, "retried": 0}
        self._clock = clock
        self._on_end = on_end
        self._waiting: OrderedDict[str, Job] = OrderedDict()
        self._running: dict[str, dict[str, Job]] = {}
        self._asking: dict[str, tuple[int, Callable[[list[Job]], None]]] = {}
        self._stops: dict[str, list[str]] = {}
        self._listening: dict[str, Callable[[list[str]], None]] = {}

    # ---- clients ---------------------------------------------------------------------------------------

    def submit(self, body: Any, *, sync: bool, workers: int = 1) -> Job:
        """Queue the job of a request body `{"input": ..., "policy": ..., "webhook": ..., "s3Config": ...}`.

        workers: how many the endpoint has at most, which limits the queue. Raises Refused.
        `policy.lowPriority` is accepted and ignored: it only concerns scaling.
        """
        if not isinstance(body, dict) or "input" not in body:
            raise Refused('the body must be a JSON object with the key "input"')
        policy, webhook = body.get("policy") or {}, body.get("webhook")
        if not isinstance(policy, dict):
            raise Refused("policy must be an object")
        if webhook and not (isinstance(webhook, str) and webhook.startswith(("http://", "https://"))):
            raise Refused("webhook must be an http(s) URL")
        rules = self.rules
        timeout = _seconds(policy, "executionTimeout", rules.execution_timeout, rules.execution_timeout_range)
        ttl = _seconds(policy, "ttl", rules.ttl, rules.ttl_range)
        if len(self._waiting) > max(50, rules.queue_per_worker * workers):
            raise Refused(f"{len(self._waiting)} jobs are waiting", 429)
        name = f"{'sync-' if sync else ''}{uuid.uuid4()}-u1"
        # An empty input never arrives on RunPod either: the SDK of a worker that takes single jobs drops
        # such a job, and it fails after its retries (observed).
        work = {key: body[key] for key in ("input", "webhook", "s3Config") if body.get(key)}
        job = Job(name, {"id": name} | work, sync, self._clock(), timeout, ttl)
        self.jobs[name] = self._waiting[name] = job
        self._dispatch()
        return job

    def find(self, name: str) -> Job:
        """The job of this id. Raises Refused (404) when it never was, or is no longer kept."""
        if name not in self.jobs:
            raise Refused("request does not exist", 404)
        return self.jobs[name]

    def cancel(self, job: Job) -> None:
        """End a job that has not ended; its worker is told to stop it."""
        if not job.state.final:
            self._end(job, State.CANCELLED)

    def retry(self, job: Job) -> None:
        """Queue a job once more, its ttl counted anew. Raises Refused unless it has FAILED or TIMED_OUT."""
        if job.state not in (State.FAILED, State.TIMED_OUT):
            raise Refused(f"a job that is {job.state} cannot be retried")
        job.retries, job.created = 0, self._clock()
        self.counts["retried"] += 1
        self._requeue(job, first=False)
        self._dispatch()

    def purge(self) -> int:
        """Cancel every job that waits; returns how many."""
        jobs = list(self._waiting.values())
        for job in jobs:
            self._end(job, State.CANCELLED)
        return len(jobs)

    def health(self) -> dict[str, int]:
        """The `jobs` half of /health."""
        running = sum(map(len, self._running.values()))
        return {**self.counts, "inProgress": running, "inQueue": len(self._waiting)}

    # ---- workers ---------------------------------------------------------------------------------------

    def ask(self, worker: str, limit: int, deliver: Callable[[list[Job]], None]) -> None:
        """Call `deliver` with up to `limit` jobs, now or as soon as there is one.

        Jobs go to the worker that holds the fewest, then to the one that has asked for longest, and no
        worker gets more than its even share of what waits.
        """
        self._running.setdefault(worker, {})
        self._asking.pop(worker, None)
        self._asking[worker] = (limit, deliver)
        self._dispatch()

    def withdraw(self, worker: str, deliver: Callable[[list[Job]], None]) -> None:
        """Forget an `ask`."""
        if worker in self._asking and self._asking[worker][1] is deliver:
            del self._asking[worker]

    def give_back(self, jobs: Iterable[Job]) -> None:
        """Put back jobs that never reached their worker."""
        for job in jobs:
            if job.state is State.IN_PROGRESS:
                self._requeue(job, first=True)
        self._dispatch()

    def listen(self, worker: str, deliver: Callable[[list[str]], None]) -> None:
        """Call `deliver` with the ids of jobs to stop, now or as soon as there is one."""
        self._listening[worker] = deliver
        self._signal(worker)

    def unlisten(self, worker: str, deliver: Callable[[list[str]], None]) -> None:
        """Forget a `listen`."""
        if self._listening.get(worker) is deliver:
            del self._listening[worker]

    def dismiss(self, worker: str) -> None:
        """Answer whatever the worker waits for with nothing."""
        if worker in self._asking:
            self._asking.pop(worker)[1]([])
        if worker in self._listening:
            self._listening.pop(worker)([])

    def ping(self, worker: str, jobs: Iterable[str]) -> None:
        """Keep the worker's hold on `jobs`, and stop those that it should no longer run.

        A stop signal may have been in vain: the SDK ignores those for jobs that it has not started yet.
        """
        for name in jobs:
            job = self.jobs.get(name)
            if job is None or job.worker != worker or job.state in (State.CANCELLED, State.TIMED_OUT):
                self._stop(worker, name)
            else:
                job.seen = self._clock()

    def stream(self, worker: str, name: str, chunk: Any) -> None:
        """Append a chunk for /stream. Raises Refused when another worker holds the job, or none."""
        job = self._reported(worker, name)
        if job.state is State.IN_PROGRESS:
            job.chunks.extend(_split(chunk, self.rules.chunk_bytes))
            job.changed()

    def report(self, worker: str, name: str, report: dict[str, Any]) -> None:
        """Take what a worker says of its job: a progress update or its end. Raises Refused as `stream` does.

        A text as `error` fails the job. Any other error is lost and the job counts as completed, which is
        what RunPod does (runpod-python issue 299). What comes for a job that has ended is ignored.
        """
        job = self._reported(worker, name)
        if job.state is not State.IN_PROGRESS:
            return
        job.result = {key: report[key] for key in ("output", "error") if key in report}
        if report.get("status") == State.IN_PROGRESS:
            job.changed()
        elif isinstance(report.get("error"), str):
            self._end(job, State.FAILED)
        else:
            job.result.pop("error", None)
            self._end(job, State.COMPLETED)

    def held(self, worker: str) -> int:
        """How many jobs the worker runs."""
        return len(self._running.get(worker, {}))

    def leave(self, worker: str) -> None:
        """The worker is gone, and its jobs are lost."""
        self.dismiss(worker)
        for job in list(self._running.get(worker, {}).values()):
            self._lose(job)
        self._running.pop(worker, None)
        self._stops.pop(worker, None)
        self._dispatch()

    # ---- time ------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """Do what is due by now: deadlines, lost jobs, results that are no longer kept."""
        now, rules = self._clock(), self.rules
        for job in list(self.jobs.values()):
            if job.state.final:
                if now - job.ended >= (rules.runsync_retention if job.sync else rules.run_retention):
                    del self.jobs[job.id]
            elif now - job.created >= job.ttl:
                self._end(job, State.TIMED_OUT, "ttl exceeded")
                del self.jobs[job.id]
            elif job.state is State.IN_PROGRESS:
                if now - job.taken >= job.execution_timeout:
                    self._end(job, State.TIMED_OUT, "executionTimeout exceeded")
                elif now - job.seen >= rules.missed_pings * rules.ping_interval:
                    self._stop(job.worker, job.id)
                    self._lose(job)
        self._dispatch()

    # ---- inside ----------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        while self._waiting and self._asking:
            worker = min(self._asking, key=self.held)
            limit, deliver = self._asking.pop(worker)
            share = math.ceil(len(self._waiting) / len(self._running))
            jobs = [self._waiting.popitem(last=False)[1] for _ in range(min(limit, share))]
            for job in jobs:
                job.state, job.worker = State.IN_PROGRESS, worker
                job.taken = job.seen = self._clock()
                self._running[worker][job.id] = job
            deliver(jobs)
            for job in jobs:
                job.changed()

    def _reported(self, worker: str, name: str) -> Job:
        job = self.jobs.get(name)
        if job is None or job.worker != worker:
            raise Refused("this worker does not hold this job")
        return job

    def _release(self, job: Job) -> None:
        self._waiting.pop(job.id, None)
        if job.worker is not None:
            self._running.get(job.worker, {}).pop(job.id, None)

    def _requeue(self, job: Job, *, first: bool) -> None:
        self._release(job)
        job.state, job.worker, job.result = State.IN_QUEUE, None, {}
        job.chunks.clear()
        self._waiting[job.id] = job
        if first:
            self._waiting.move_to_end(job.id, last=False)
        job.changed()

    def _lose(self, job: Job) -> None:
        if job.retries >= self.rules.retries:
            self._end(job, State.FAILED, f"job timed out after {job.retries} retries")
        else:
            job.retries += 1
            self.counts["retried"] += 1
            self._requeue(job, first=True)

    def _end(self, job: Job, state: State, error: str | None = None) -> None:
        if state in (State.CANCELLED, State.TIMED_OUT):
            self._stop(job.worker, job.id)
        self._release(job)
        job.state, job.ended = state, self._clock()
        if error is not None:
            job.result = {"error": error}
        if state is not State.CANCELLED:
            self.counts["completed" if state is State.COMPLETED else "failed"] += 1
        job.changed()
        self._on_end(job)

    def _stop(self, worker: str | None, name: str) -> None:
        if worker is not None and name not in (stops := self._stops.setdefault(worker, [])):
            stops.append(name)
            self._signal(worker)

    def _signal(self, worker: str) -> None:
        if self._stops.get(worker) and worker in self._listening:
            self._listening.pop(worker)(self._stops.pop(worker))


def _seconds(policy: dict[str, Any], key: str, default: float, allowed: tuple[float, float]) -> float:
    """A time of the policy, which is in milliseconds; 0 and null mean the default. Raises Refused.

    That a time out of bounds is refused, not held to them, is an assumption.
    """
    value = policy.get(key)
    if not value:
        return default
    low, high = allowed
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value / 1000 <= high:
        raise Refused(f"policy.{key} must be milliseconds from {low * 1000:.0f} to {high * 1000:.0f}")
    return value / 1000


def _split(chunk: Any, limit: int) -> list[Any]:
    """`chunk` in pieces of up to `limit` bytes: text between characters, anything else as its JSON's text."""
    text = chunk if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False)
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return [chunk]
    pieces = []
    start = 0
    while start < len(data):
        end = min(start + limit, len(data))
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end -= 1
        pieces.append(data[start:end].decode())
        start = end
    return pieces
