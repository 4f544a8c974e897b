"""RunPod's job queue in memory: states, deadlines, leases, retries, fair dispatch. No HTTP, no processes.

State changes inside calls only; deadlines are applied in `expire()`. Not thread-safe.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from local.jobs import Job, Refused, Rules, State, read_job, split_chunk


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
        self._leases: dict[str, dict[str, Job]] = {}
        self._polls: dict[str, tuple[int, Callable[[list[Job]], None]]] = {}
        self._stops: dict[str, list[str]] = {}
        self._stop_polls: dict[str, Callable[[list[str]], None]] = {}

    # ---- clients ---------------------------------------------------------------------------------------

    def submit(self, body: Any, *, sync: bool, workers: int = 1) -> Job:
        """Queue the job of a request body, see `read_job`. Raises Refused.

        workers: how many the endpoint has at most, which limits the queue.
        """
        job = read_job(body, self.rules, sync=sync, created=self._clock())
        if len(self._waiting) > max(50, self.rules.queue_per_worker * workers):
            raise Refused(f"{len(self._waiting)} jobs are waiting", 429)
        self.jobs[job.id] = self._waiting[job.id] = job
        self._dispatch()
        return job

    def get(self, name: str) -> Job:
        """The job of this id. Raises Refused (404) when it never existed, or is past its retention."""
        if name not in self.jobs:
            raise Refused("request does not exist", 404)
        return self.jobs[name]

    def cancel(self, job: Job) -> None:
        """End a job that has not ended; its worker receives a stop signal."""
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
        """Cancel every queued job; returns how many."""
        jobs = list(self._waiting.values())
        for job in jobs:
            self._end(job, State.CANCELLED)
        return len(jobs)

    def health(self) -> dict[str, int]:
        """The `jobs` of /health."""
        running = sum(map(len, self._leases.values()))
        return {**self.counts, "inProgress": running, "inQueue": len(self._waiting)}

    # ---- workers ---------------------------------------------------------------------------------------

    def poll(self, worker: str, limit: int, deliver: Callable[[list[Job]], None]) -> None:
        """Long poll: call `deliver` with up to `limit` jobs, now or as soon as there is one.

        Jobs go to the worker with the fewest leases, then to the one that has polled for longest, and no
        worker gets more than its even share of the queue.
        """
        self._leases.setdefault(worker, {})
        self._polls.pop(worker, None)
        self._polls[worker] = (limit, deliver)
        self._dispatch()

    def cancel_poll(self, worker: str, deliver: Callable[[list[Job]], None]) -> None:
        """Forget a `poll`."""
        if worker in self._polls and self._polls[worker][1] is deliver:
            del self._polls[worker]

    def requeue(self, jobs: Iterable[Job]) -> None:
        """Return jobs that never reached their worker to the head of the queue."""
        for job in jobs:
            if job.state is State.IN_PROGRESS:
                self._requeue(job, first=True)
        self._dispatch()

    def poll_stops(self, worker: str, deliver: Callable[[list[str]], None]) -> None:
        """Long poll: call `deliver` with the ids of jobs to stop, now or as soon as there is one."""
        self._stop_polls[worker] = deliver
        self._send_stops(worker)

    def cancel_stop_poll(self, worker: str, deliver: Callable[[list[str]], None]) -> None:
        """Forget a `poll_stops`."""
        if self._stop_polls.get(worker) is deliver:
            del self._stop_polls[worker]

    def withdraw(self, worker: str) -> None:
        """Answer the worker's open polls with nothing."""
        if worker in self._polls:
            self._polls.pop(worker)[1]([])
        if worker in self._stop_polls:
            self._stop_polls.pop(worker)([])

    def ping(self, worker: str, jobs: Iterable[str]) -> None:
        """Renew the worker's leases of `jobs`, and stop those of which it has none.

        A stop signal may have been in vain: the SDK ignores those for jobs that it has not started yet.
        """
        for name in jobs:
            job = self.jobs.get(name)
            if job is None or job.worker != worker or job.state in (State.CANCELLED, State.TIMED_OUT):
                self._stop(worker, name)
            else:
                job.last_ping = self._clock()

    def stream(self, worker: str, name: str, chunk: Any) -> None:
        """Append a chunk for /stream. Raises Refused without a lease."""
        job = self._reported(worker, name)
        if job.state is State.IN_PROGRESS:
            job.chunks.extend(split_chunk(chunk, self.rules.chunk_bytes))
            job.changed()

    def report(self, worker: str, name: str, report: dict[str, Any]) -> None:
        """A progress update or the end of a job, from its worker. Raises Refused as `stream` does.

        A text as `error` fails the job. Any other error is dropped and the job counts as completed, which is
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

    def in_flight(self, worker: str) -> int:
        """How many jobs the worker has leased."""
        return len(self._leases.get(worker, {}))

    def drop_worker(self, worker: str) -> None:
        """End the polls and the leases of a worker that has exited."""
        self.withdraw(worker)
        for job in list(self._leases.get(worker, {}).values()):
            self._lease_lost(job)
        self._leases.pop(worker, None)
        self._stops.pop(worker, None)
        self._dispatch()

    # ---- time ------------------------------------------------------------------------------------------

    def expire(self) -> None:
        """Apply what is due by now: deadlines, expired leases, results past their retention."""
        now, rules = self._clock(), self.rules
        for job in list(self.jobs.values()):
            if job.state.final:
                if now - job.ended >= (rules.runsync_retention if job.sync else rules.run_retention):
                    del self.jobs[job.id]
            elif now - job.created >= job.ttl:
                self._end(job, State.TIMED_OUT, "ttl exceeded")
                del self.jobs[job.id]
            elif job.state is State.IN_PROGRESS:
                if now - job.started >= job.execution_timeout:
                    self._end(job, State.TIMED_OUT, "executionTimeout exceeded")
                elif now - job.last_ping >= rules.missed_pings * rules.ping_interval:
                    self._stop(job.worker, job.id)
                    self._lease_lost(job)
        self._dispatch()

    # ---- inside ----------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        while self._waiting and self._polls:
            worker = min(self._polls, key=self.in_flight)
            limit, deliver = self._polls.pop(worker)
            share = math.ceil(len(self._waiting) / len(self._leases))
            jobs = [self._waiting.popitem(last=False)[1] for _ in range(min(limit, share))]
            for job in jobs:
                job.state, job.worker = State.IN_PROGRESS, worker
                job.started = job.last_ping = self._clock()
                self._leases[worker][job.id] = job
            deliver(jobs)
            for job in jobs:
                job.changed()

    def _reported(self, worker: str, name: str) -> Job:
        job = self.jobs.get(name)
        if job is None or job.worker != worker:
            raise Refused("this worker has no lease of this job")
        return job

    def _release(self, job: Job) -> None:
        self._waiting.pop(job.id, None)
        if job.worker is not None:
            self._leases.get(job.worker, {}).pop(job.id, None)

    def _requeue(self, job: Job, *, first: bool) -> None:
        self._release(job)
        job.state, job.worker, job.result = State.IN_QUEUE, None, {}
        job.chunks.clear()
        self._waiting[job.id] = job
        if first:
            self._waiting.move_to_end(job.id, last=False)
        job.changed()

    def _lease_lost(self, job: Job) -> None:
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
            self._send_stops(worker)

    def _send_stops(self, worker: str) -> None:
        if self._stops.get(worker) and worker in self._stop_polls:
            self._stop_polls.pop(worker)(self._stops.pop(worker))
