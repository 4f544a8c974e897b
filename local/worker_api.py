"""The platform's routes for workers, as the SDK calls them."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from local.bodies import json_response, read_json
from local.fleet import Fleet
from local.jobs import Job, Refused
from local.queue import Queue
from local.workers import WorkerProcess


class WorkerApi:
    """job-take, job-stop, ping, stream and done, as the SDK (1.12) calls them.

    The SDK also sends the job's id in `X-Request-ID`, in a header that all its jobs share: only the id in
    the URL can be trusted.
    """

    def __init__(self, queue: Queue, fleet: Fleet) -> None:
        self._queue, self._fleet, self._rules = queue, fleet, queue.rules

    async def take(self, request: web.Request) -> web.StreamResponse:
        jobs = await self._take(self._worker(request), 1)
        return json_response(jobs[0]) if jobs else web.Response(status=204)

    async def take_batch(self, request: web.Request) -> web.StreamResponse:
        jobs = await self._take(self._worker(request), int(request.query.get("batch_size", "1")))
        return json_response(jobs) if jobs else web.Response(status=204)

    async def _take(self, worker: WorkerProcess, limit: int) -> list[dict[str, Any]]:
        worker.mark_ready()
        if worker.draining or worker.unresponsive:
            await asyncio.sleep(0.2)
            return []
        answer: asyncio.Future[list[Job]] = asyncio.get_running_loop().create_future()
        deliver = answer.set_result
        self._queue.poll(worker.id, limit, deliver)
        try:
            await asyncio.wait({answer}, timeout=self._rules.poll_timeout)
        except asyncio.CancelledError:
            if answer.done():
                self._queue.requeue(answer.result())
            raise
        finally:
            self._queue.cancel_poll(worker.id, deliver)
        jobs = answer.result() if answer.done() else []
        worker.jobs_taken += len(jobs)
        return [job.payload for job in jobs]

    async def stop(self, request: web.Request) -> web.StreamResponse:
        worker = self._worker(request)
        answer: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        deliver = answer.set_result
        self._queue.poll_stops(worker.id, deliver)
        try:
            await asyncio.wait({answer}, timeout=0.2 if worker.draining else self._rules.poll_timeout)
        finally:
            self._queue.cancel_stop_poll(worker.id, deliver)
        jobs = answer.result() if answer.done() else []
        # After an empty answer the SDK sleeps for a second: an id that is no job's lets it leave at once.
        return json_response({"jobsToStop": jobs or [""] * worker.draining})

    async def ping(self, request: web.Request) -> web.StreamResponse:
        worker = self._worker(request)
        worker.ping_received()
        self._queue.ping(worker.id, filter(None, request.query.get("job_id", "").split(",")))
        return web.Response()

    async def stream(self, request: web.Request) -> web.StreamResponse:
        worker, name = self._worker(request), request.match_info["job"]
        self._queue.stream(worker.id, name, (await self._report(request, name)).get("output"))
        return web.Response()

    async def done(self, request: web.Request) -> web.StreamResponse:
        """A result that is too big is refused and its job completes without output (runpod-python issue
        309); so, by assumption, is one that is no JSON, such as NaN.
        """
        worker, name = self._worker(request), request.match_info["job"]
        try:
            report = await self._report(request, name)
        except Refused:
            self._queue.report(worker.id, name, {})
            raise
        self._queue.report(worker.id, name, report)
        if worker.replace_on_exit and (worker.draining or report.get("stopPod")):
            worker.refresh()
        return web.Response()

    def _worker(self, request: web.Request) -> WorkerProcess:
        worker = self._fleet.get(request.match_info["worker"])
        if worker is None:
            raise Refused("no such worker", 404)
        return worker

    async def _report(self, request: web.Request, name: str) -> dict[str, Any]:
        job = self._queue.jobs.get(name)
        report = await read_json(
            request, self._rules.runsync_bytes if job and job.sync else self._rules.run_bytes
        )
        return report if isinstance(report, dict) else {}
