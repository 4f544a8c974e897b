"""The platform's HTTP: what the SDK in a worker speaks, and what RunPod's clients speak.

Where RunPod documents nothing, this does what people report of the live platform ("observed"), and where
nobody does, an assumption is made; both are noted where they apply.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, web

from local.queue import MIB, Job, Queue, Refused, State
from local.workers import Fleet, WorkerProcess

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(queue: Queue, fleet: Fleet, *, endpoint_id: str, require_key: bool) -> web.Application:
    """All routes of one endpoint, under `/v2/<endpoint_id>`."""

    def public(handler: Handler) -> Handler:
        """Clients need a key, as on RunPod; any will do, with or without "Bearer"."""

        async def checked(request: web.Request) -> web.StreamResponse:
            if require_key and not request.headers.get("Authorization", "").strip():
                raise Refused("unauthorized", 401)
            return await handler(request)

        return checked

    workers, clients = WorkerSide(queue, fleet), ClientSide(queue, fleet)
    app = web.Application(middlewares=[_answer_refused])
    routes: dict[str, Handler] = {
        "GET /job-take/{worker}": workers.take,
        "GET /job-take-batch/{worker}": workers.take_batch,
        "GET /job-stop/{worker}": workers.stop,
        "GET /ping/{worker}": workers.ping,
        "POST /job-stream/{worker}/{job}": workers.stream,
        "POST /job-done/{worker}/{job}": workers.done,
        "POST /run": public(clients.run),
        "POST /runsync": public(clients.runsync),
        "* /status/{job}": public(clients.status),
        "* /stream/{job}": public(clients.stream),
        "* /cancel/{job}": public(clients.cancel),
        "POST /retry/{job}": public(clients.retry),
        "POST /purge-queue": public(clients.purge),
        "GET /health": public(clients.health),
        "* /openai/{route:v1/.+}": public(clients.openai),
    }
    for route, handler in routes.items():
        methods, path = route.split()
        for method in ("GET", "POST") if methods == "*" else (methods,):
            app.router.add_route(method, f"/v2/{endpoint_id}{path}", handler)
    return app


@web.middleware
async def _answer_refused(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refused as refused:
        return _json({"error": str(refused)}, refused.status)


class WorkerSide:
    """job-take, job-stop, ping, stream and done, as the SDK (1.12) calls them.

    The SDK also sends the job's id in `X-Request-ID`, in a header that all its jobs share: only the id in
    the URL can be trusted.
    """

    def __init__(self, queue: Queue, fleet: Fleet) -> None:
        self._queue, self._fleet, self._rules = queue, fleet, queue.rules

    async def take(self, request: web.Request) -> web.StreamResponse:
        jobs = await self._take(self._worker(request), 1)
        return _json(jobs[0]) if jobs else web.Response(status=204)

    async def take_batch(self, request: web.Request) -> web.StreamResponse:
        jobs = await self._take(self._worker(request), int(request.query.get("batch_size", "1")))
        return _json(jobs) if jobs else web.Response(status=204)

    async def _take(self, worker: WorkerProcess, limit: int) -> list[dict[str, Any]]:
        worker.polled()
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
        return _json({"jobsToStop": jobs or [""] * worker.draining})

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
        report = await _body(
            request, self._rules.runsync_bytes if job and job.sync else self._rules.run_bytes
        )
        return report if isinstance(report, dict) else {}


class ClientSide:
    """run, runsync, status, stream, cancel, retry, purge-queue, health and the OpenAI routes."""

    def __init__(self, queue: Queue, fleet: Fleet) -> None:
        self._queue, self._fleet, self._rules = queue, fleet, queue.rules

    async def run(self, request: web.Request) -> web.StreamResponse:
        job = self._submit(await _body(request, self._rules.run_bytes), sync=False)
        return _json({"id": job.id, "status": State.IN_QUEUE})

    async def runsync(self, request: web.Request) -> web.StreamResponse:
        """Waits for `?wait=` milliseconds, clamped to the allowed range (an assumption). A client that
        disconnects leaves the job running.
        """
        low, high = self._rules.wait_range
        try:
            wait = float(request.query.get("wait", 1000 * self._rules.wait)) / 1000
        except ValueError:
            raise Refused("wait must be a number of milliseconds") from None
        job = self._submit(await _body(request, self._rules.runsync_bytes), sync=True)
        await _wait(job, lambda: job.state.final, min(max(low, wait), high))  # NaN is low
        return _json(job.describe())

    async def status(self, request: web.Request) -> web.StreamResponse:
        return _json(self._job(request).describe())

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """The chunks since the last call; waits up to 5 s for one (an assumption: its client waits 10 s)."""
        job = self._job(request)
        await _wait(job, lambda: bool(job.chunks) or job.state.final, 5)
        chunks = [{"output": chunk} for chunk in job.chunks]
        job.chunks.clear()
        return _json({"status": job.state, "stream": chunks})

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        job = self._job(request)
        self._queue.cancel(job)
        return _json({"id": job.id, "status": job.state})

    async def retry(self, request: web.Request) -> web.StreamResponse:
        job = self._job(request)
        self._queue.retry(job)
        return _json({"id": job.id, "status": State.IN_QUEUE})

    async def purge(self, request: web.Request) -> web.StreamResponse:
        """Queued jobs count as cancelled (an assumption), so that their clients get an answer."""
        return _json({"removed": self._queue.purge(), "status": "completed"})

    async def health(self, request: web.Request) -> web.StreamResponse:
        return _json({"jobs": self._queue.health(), "workers": self._fleet.health()})

    async def openai(self, request: web.Request) -> web.StreamResponse:
        """`/openai/v1/...` as a job `{"openai_route": "/v1/...", "openai_input": body}`; a GET has no body.

        A list of one, which is what a generator's single yield becomes, is unwrapped. An error has HTTP
        status 200 (worker-vllm issue 57) and is `{"error": ...}` with the object whose JSON the job's `error`
        is, or else with its text.

        With `"stream": true` the answer is an event stream: text goes out as it comes, anything else as a
        `data:` event, an error as the last one (an assumption; OpenAI's client raises it). A client that
        disconnects cancels the job; without a stream the job runs on.
        """
        work: dict[str, Any] = {"openai_route": "/" + request.match_info["route"]}
        if request.method == "POST":
            work["openai_input"] = await _body(request, self._rules.runsync_bytes)
        job = self._submit({"input": work}, sync=True)
        body = work.get("openai_input")
        streaming = isinstance(body, dict) and body.get("stream") is True

        def ready() -> bool:
            return job.state.final or (streaming and bool(job.chunks))

        try:
            if not await _wait(job, ready, self._rules.edge_timeout):
                raise Refused("a timeout occurred", 524)
            if streaming:
                return await self._send_events(request, job)
        except (asyncio.CancelledError, ConnectionError):
            if streaming:
                self._queue.cancel(job)
            raise
        if job.state is not State.COMPLETED:
            return _json({"error": _openai_error(job)})
        output = job.result.get("output")
        if isinstance(output, list) and len(output) == 1:
            output = output[0]
        return _json_text(output) if isinstance(output, str) else _json(output)

    async def _send_events(self, request: web.Request, job: Job) -> web.StreamResponse:
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        async for event in _events(job):
            text = event if isinstance(event, str) else f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
            await response.write(text.encode())
        await response.write_eof()
        return response

    def _submit(self, body: Any, *, sync: bool) -> Job:
        return self._queue.submit(body, sync=sync, workers=len(self._fleet.workers))

    def _job(self, request: web.Request) -> Job:
        return self._queue.get(request.match_info["job"])


async def call_webhook(session: ClientSession, job: Job, retries: int, delay: float) -> None:
    """POST what /status shows to the job's webhook; again after `delay` seconds until it answers 200."""
    for attempt in range(retries + 1):
        if attempt:
            await asyncio.sleep(delay)
        with contextlib.suppress(ClientError, TimeoutError):
            post = session.post(job.payload["webhook"], json=job.describe(), timeout=ClientTimeout(total=30))
            async with post as response:
                if response.status == 200:
                    return


async def _body(request: web.Request, limit: int) -> Any:
    """The JSON of the body. Raises Refused (as observed) when it has more than `limit` bytes."""
    body = bytearray()
    if (request.content_length or 0) <= limit:
        async for chunk in request.content.iter_any():
            body += chunk
            if len(body) > limit:
                break
        else:
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(body, parse_constant=_refuse_constant)
            raise Refused("bad request: body: it must be JSON")
    raise Refused(f"bad request: body: exceeded max body size of {limit / MIB:g}MiB")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON outside Python")


async def _wait(job: Job, condition: Callable[[], bool], seconds: float | None) -> bool:
    """Whether `condition` holds, after waiting for it for up to `seconds`."""
    changed = asyncio.Event()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not condition():
                changed.clear()
                job.listeners.append(changed.set)
                await changed.wait()
    return condition()


async def _events(job: Job) -> AsyncIterator[Any]:
    """What the job streams; then its error, or its output if it has streamed nothing."""
    streamed = False
    while job.chunks or not job.state.final:
        while job.chunks:
            streamed = True
            yield job.chunks.popleft()
        await _wait(job, lambda: bool(job.chunks) or job.state.final, None)
    if job.state is not State.COMPLETED:
        yield {"error": _openai_error(job)}
    elif not streamed and "output" in job.result:
        yield job.result["output"]


def _openai_error(job: Job) -> Any:
    error = job.result.get("error", f"the job is {job.state}")
    with contextlib.suppress(ValueError):
        value = json.loads(error)
        return value if isinstance(value, dict) else error
    return error


def _json(body: Any, status: int = 200) -> web.Response:
    text = json.dumps(body, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(body)  # a lone surrogate, which JSON can escape and UTF-8 cannot encode
    return _json_text(text, status)


def _json_text(text: str, status: int = 200) -> web.Response:
    return web.Response(text=text, status=status, content_type="application/json")
