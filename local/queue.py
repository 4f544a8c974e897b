"""RunPod's job queue in memory: states, deadlines, retries and fair dispatch. No HTTP, no processes, no tasks.

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
WEEK = 7 * 86400.0


@dataclass(frozen=True)
class Rules:
    """The platform's limits and intervals, with RunPod's own values. Seconds and bytes.

    Documented by RunPod, save the two marked "observed", which are what people report of the live platform.
    """

    run_bytes: int = 10 * MIB
    """Largest body of a /run, and largest result of such a job."""
    runsync_bytes: int = 20 * MIB
    """The same for /runsync and the OpenAI routes."""
    chunk_bytes: int = MIB
    """Largest piece of a stream; larger ones are split."""
    execution_timeout: float = 600.0
    execution_timeout_range: tuple[float, float] = (5.0, WEEK)
    ttl: float = 86400.0
    """A job's whole life, queue and run; after it the job is gone without a trace."""
    ttl_range: tuple[float, float] = (10.0, WEEK)
    run_retention: float = 1800.0
    runsync_retention: float = 60.0
    wait: float = 90.0
    """How long a /runsync waits before it answers with the job's state."""
    wait_range: tuple[float, float] = (1.0, 300.0)
    edge_timeout: float = 100.0
    """Time to the first byte of an OpenAI route (observed); then the client gets a 524."""
    retries: int = 1
    """How often a job that its worker lost is tried again before it fails (observed)."""
    ping_interval: float = 10.0
    """Whole seconds, at least 1: the SDK knows no other."""
    missed_pings: int = 4
    """A job that no ping of its worker has named for so many intervals is lost."""
    queue_per_worker: int = 500
    """A queue of more than 50 jobs and of more than this a worker answers 429."""
    webhook_retries: int = 2
    webhook_delay: float = 10.0
    poll: float = 30.0
    """How long a worker's request for jobs or stop signals is held open."""
    restarts: int = 3
    """How often in a row a worker that failed without having finished a job is started again."""
    restart_delay: float = 1.0
    """Pause before the first of these, doubled for each further one."""
    grace: float = 30.0
    """From SIGTERM to SIGKILL."""


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


class BadJob(ValueError):
    """A request that cannot become a job."""


class QueueFull(Exception):
    """More jobs wait than the platform keeps for so few workers."""


class NotYours(Exception):
    """A worker reports on a job that it does not hold (any more)."""


@dataclass(eq=False)
class Job:
    """A job and its fate. Times are seconds on the queue's clock."""

    id: str
    work: dict[str, Any]
    """What the worker receives."""
    sync: bool
    created: float
    execution_timeout: float
    ttl: float
    webhook: str | None
    state: State = State.IN_QUEUE
    worker: str | None = None
    taken: float = 0.0
    seen: float = 0.0
    """When its worker last took or named it."""
    ended: float = 0.0
    retries: int = 0
    result: dict[str, Any] = field(default_factory=dict)
    """`output` and `error`, as far as the worker sent them."""
    chunks: deque[Any] = field(default_factory=deque)
    """What was streamed and not yet read."""
    listeners: list[Callable[[], None]] = field(default_factory=list)
    """Called once, and forgotten, at the next change."""

    def describe(self) -> dict[str, Any]:
        """The job as /status shows it; times in milliseconds."""
        body: dict[str, Any] = {"id": self.id, "status": self.state.value}
        if self.worker is not None:
            body["delayTime"] = round(1000 * (self.taken - self.created))
            body["workerId"] = self.worker
            if self.state.final:
                body["executionTime"] = round(1000 * (self.ended - self.taken))
        if self.retries:
            body["retries"] = self.retries
        return body | self.result


Deliver = Callable[[list[Job]], None]
DeliverStops = Callable[[list[str]], None]


class Queue:
    """All jobs of an endpoint.

    on_end: called with each job that has reached a final state.
    """

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
        self._asking: dict[str, tuple[int, Deliver]] = {}
        self._stops: dict[str, list[str]] = {}
        self._listening: dict[str, DeliverStops] = {}

    # ---- the public side -------------------------------------------------------------------------------

    def submit(self, body: Any, *, sync: bool, workers: int = 1) -> Job:
        """Queue the job of a request body `{"input": ..., "policy": ..., "webhook": ..., "s3Config": ...}`.

        sync: came by /runsync, so that its result is kept for the shorter time.
        workers: how many the endpoint has at most; limits the queue.
        Raises BadJob, QueueFull. `policy.lowPriority` is accepted: it only concerns scaling.
        """
        if not isinstance(body, dict):
            raise BadJob("the body must be a JSON object")
        if "input" not in body:
            raise BadJob("input is required")
        policy = body.get("policy") or {}
        if not isinstance(policy, dict):
            raise BadJob("policy must be an object")
        webhook = body.get("webhook")
        if webhook is not None and not (
            isinstance(webhook, str) and webhook.startswith(("http://", "https://"))
        ):
            raise BadJob("webhook must be an http(s) URL")
        rules = self.rules
        execution_timeout = _seconds(
            policy, "executionTimeout", rules.execution_timeout, rules.execution_timeout_range
        )
        ttl = _seconds(policy, "ttl", rules.ttl, rules.ttl_range)
        if len(self._waiting) > max(50, rules.queue_per_worker * workers):
            raise QueueFull(f"{len(self._waiting)} jobs are waiting")

        name = f"{'sync-' if sync else ''}{uuid.uuid4()}-u1"
        # RunPod leaves an empty input out, and the SDK of a worker without concurrency then drops the job.
        work = {key: body[key] for key in ("input", "webhook", "s3Config") if body.get(key)}
        job = Job(name, {"id": name} | work, sync, self._clock(), execution_timeout, ttl, webhook)
        self.jobs[name] = job
        self._waiting[name] = job
        self._dispatch()
        return job

    def cancel(self, job: Job) -> None:
        """End a job that has not ended; its worker is told to stop it."""
        if not job.state.final:
            self._end(job, State.CANCELLED)

    def retry(self, job: Job) -> None:
        """Queue a job once more. Raises BadJob unless it has FAILED or TIMED_OUT."""
        if job.state not in (State.FAILED, State.TIMED_OUT):
            raise BadJob(f"a job that is {job.state} cannot be retried")
        self.counts["retried"] += 1
        job.retries = 0
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

    # ---- the workers' side -----------------------------------------------------------------------------

    def ask(self, worker: str, limit: int, deliver: Deliver) -> None:
        """Call `deliver` with up to `limit` jobs, now or as soon as there is one.

        Jobs go to the worker that has the fewest, then to the one that has asked for longest. While several
        workers are known nobody gets more than an even share of what waits.
        """
        self._running.setdefault(worker, {})
        self._asking.pop(worker, None)
        self._asking[worker] = (limit, deliver)
        self._dispatch()

    def withdraw(self, worker: str, deliver: Deliver) -> None:
        """Forget an `ask`."""
        if worker in self._asking and self._asking[worker][1] is deliver:
            del self._asking[worker]

    def give_back(self, jobs: Iterable[Job]) -> None:
        """Put back jobs that never reached their worker."""
        for job in jobs:
            if job.state is State.IN_PROGRESS:
                self._requeue(job, first=True)
        self._dispatch()

    def listen(self, worker: str, deliver: DeliverStops) -> None:
        """Call `deliver` with the ids of jobs to stop, now or as soon as there is one."""
        self._listening[worker] = deliver
        self._signal(worker)

    def unlisten(self, worker: str, deliver: DeliverStops) -> None:
        """Forget a `listen`."""
        if self._listening.get(worker) is deliver:
            del self._listening[worker]

    def dismiss(self, worker: str) -> None:
        """Answer what the worker has asked for with nothing, so that it can leave."""
        if worker in self._asking:
            self._asking.pop(worker)[1]([])
        if worker in self._listening:
            self._listening.pop(worker)([])

    def ping(self, worker: str, jobs: Iterable[str]) -> None:
        """Keep the worker's hold on `jobs`."""
        held = self._running.get(worker, {})
        for name in jobs:
            if name in held:
                held[name].seen = self._clock()

    def stream(self, worker: str, name: str, chunk: Any) -> None:
        """Append a chunk for /stream. Raises NotYours."""
        job = self._held(worker, name)
        if job.state is State.IN_PROGRESS:
            job.chunks.extend(_split(chunk, self.rules.chunk_bytes))
            _notify(job)

    def progress(self, worker: str, name: str, output: Any) -> None:
        """Show `output` while the job runs. Raises NotYours."""
        job = self._held(worker, name)
        if job.state is State.IN_PROGRESS:
            job.result = {"output": output}
            _notify(job)

    def finish(self, worker: str, name: str, result: dict[str, Any]) -> None:
        """End a job with what its worker returned; ignored if it has ended meanwhile. Raises NotYours.

        A text as `error` fails the job. Any other error is lost and the job counts as completed (what RunPod
        does, runpod-python issue 299).
        """
        job = self._held(worker, name)
        if job.state is State.IN_PROGRESS:
            error = result.get("error")
            job.result = {key: result[key] for key in ("output", "error") if key in result}
            if not isinstance(error, str):
                job.result.pop("error", None)
            self._end(job, State.FAILED if isinstance(error, str) else State.COMPLETED)

    def held(self, worker: str) -> int:
        """How many jobs the worker runs."""
        return len(self._running.get(worker, {}))

    def leave(self, worker: str) -> None:
        """The worker is gone: its jobs are lost to it."""
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
        patience = rules.missed_pings * rules.ping_interval
        for job in list(self.jobs.values()):
            if job.state.final:
                if now - job.ended >= (rules.runsync_retention if job.sync else rules.run_retention):
                    del self.jobs[job.id]
            elif now - job.created >= job.ttl:
                self._end(job, State.TIMED_OUT, error="ttl exceeded")
                del self.jobs[job.id]
            elif job.state is State.IN_PROGRESS:
                if now - job.taken >= job.execution_timeout:
                    self._end(job, State.TIMED_OUT, error="executionTimeout exceeded")
                elif now - job.seen >= patience:
                    self._stop(job)
                    self._lose(job)
        self._dispatch()

    # ---- inside ----------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        while self._waiting and self._asking:
            worker = min(self._asking, key=self.held)
            limit, deliver = self._asking.pop(worker)
            share = math.ceil(len(self._waiting) / len(self._running))
            jobs = []
            for _ in range(min(limit, share)):
                job = self._waiting.popitem(last=False)[1]
                job.state, job.worker = State.IN_PROGRESS, worker
                job.taken = job.seen = self._clock()
                self._running[worker][job.id] = job
                jobs.append(job)
            deliver(jobs)
            for job in jobs:
                _notify(job)

    def _held(self, worker: str, name: str) -> Job:
        job = self.jobs.get(name)
        if job is None or job.worker != worker:
            raise NotYours(name)
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
        _notify(job)

    def _lose(self, job: Job) -> None:
        if job.retries >= self.rules.retries:
            self._end(job, State.FAILED, error=f"job timed out after {job.retries} retries")
        else:
            job.retries += 1
            self.counts["retried"] += 1
            self._requeue(job, first=True)

    def _end(self, job: Job, state: State, error: str | None = None) -> None:
        if job.state is State.IN_PROGRESS and state in (State.CANCELLED, State.TIMED_OUT):
            self._stop(job)
        self._release(job)
        job.state, job.ended = state, self._clock()
        if error is not None:
            job.result = {"error": error}
        if state is State.COMPLETED:
            self.counts["completed"] += 1
        elif state is not State.CANCELLED:
            self.counts["failed"] += 1
        _notify(job)
        self._on_end(job)

    def _stop(self, job: Job) -> None:
        if job.worker is not None:
            self._stops.setdefault(job.worker, []).append(job.id)
            self._signal(job.worker)

    def _signal(self, worker: str) -> None:
        if self._stops.get(worker) and worker in self._listening:
            self._listening.pop(worker)(self._stops.pop(worker))


def _notify(job: Job) -> None:
    listeners, job.listeners = job.listeners, []
    for listener in listeners:
        listener()


def _seconds(policy: dict[str, Any], key: str, default: float, allowed: tuple[float, float]) -> float:
    """A time of the policy, which is in milliseconds; 0 and null mean the default."""
    value = policy.get(key)
    if not value:
        return default
    low, high = allowed
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value / 1000 <= high:
        raise BadJob(f"policy.{key} must be a number of milliseconds from {low * 1000:g} to {high * 1000:g}")
    return value / 1000


def _split(chunk: Any, limit: int) -> list[Any]:
    """`chunk` in pieces of at most `limit` bytes: text between characters, anything else as pieces of JSON."""
    text = chunk if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False)
    # No character takes more than four bytes, which spares most chunks the encoding.
    if 4 * len(text) <= limit or len(data := text.encode("utf-8", "replace")) <= limit:
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
