"""The HTTP face of the platform: what the SDK in a worker speaks, and what RunPod's clients speak.

Where RunPod's behaviour is not documented, this is what people report of the live platform, and where nobody
does, an assumption, each said where it is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, web

from local.queue import MIB, BadJob, Job, NotYours, Queue, QueueFull, Rules, State
from local.workers import Fleet, WorkerProcess

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(
    queue: Queue, fleet: Fleet, rules: Rules, *, endpoint_id: str, require_key: bool
) -> web.Application:
    """All routes of one endpoint, under `/v2/<endpoint_id>`."""
    workers, public = _Workers(queue, fleet, rules), _Public(queue, fleet, rules)

    @web.middleware
    async def check_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        """Any key will do. RunPod wants one, with or without "Bearer"."""
        internal = getattr(request.match_info.handler, "__self__", None) is workers
        if require_key and not internal and not request.headers.get("Authorization", "").strip():
            return web.json_response({"error": "unauthorized"}, status=401)
        return await handler(request)

    app = web.Application(middlewares=[check_key], client_max_size=0)
    base = f"/v2/{endpoint_id}"
    both = ("GET", "POST")
    routes: list[tuple[tuple[str, ...], str, Handler]] = [
        (("GET",), "/job-take/{worker}", workers.take),
        (("GET",), "/job-take-batch/{worker}", workers.take_batch),
        (("GET",), "/job-stop/{worker}", workers.stops),
        (("GET",), "/ping/{worker}", workers.ping),
        (("POST",), "/job-stream/{worker}/{job}", workers.stream),
        (("POST",), "/job-done/{worker}/{job}", workers.done),
        (("POST",), "/run", public.run),
        (("POST",), "/runsync", public.runsync),
        (both, "/status/{job}", public.status),
        (both, "/stream/{job}", public.stream),
        (both, "/cancel/{job}", public.cancel),
        (("POST",), "/retry/{job}", public.retry),
        (("POST",), "/purge-queue", public.purge),
        (("GET",), "/health", public.health),
        (both, "/openai/{route:v1/.+}", public.openai),
    ]
    for methods, path, handler in routes:
        for method in methods:
            app.router.add_route(method, base + path, handler)
    return app


class _Workers:
    """job-take, job-stop, ping, stream, done: what the SDK (1.12) calls.

    The SDK sends the job's id in `X-Request-ID` too, but on a header that all its jobs share: only the id in
    the URL can be trusted.
    """

    def __init__(self, queue: Queue, fleet: Fleet, rules: Rules) -> None:
        self._queue, self._fleet, self._rules = queue, fleet, rules

    def _worker(self, request: web.Request) -> WorkerProcess:
        worker = self._fleet.get(request.match_info["worker"])
        if worker is None:
            raise web.HTTPNotFound(text="no such worker")
        return worker

    async def take(self, request: web.Request) -> web.StreamResponse:
        jobs = await self._take(self._worker(request), 1)
        return web.json_response(jobs[0]) if jobs else web.Response(status=204)

    async def take_batch(self, request: web.Request) -> web.StreamResponse:
        jobs = await self._take(self._worker(request), max(1, int(request.query.get("batch_size", "1"))))
        return web.json_response(jobs) if jobs else web.Response(status=204)

    async def _take(self, worker: WorkerProcess, limit: int) -> list[dict[str, Any]]:
        worker.asked()
        if worker.leaving or worker.missing:
            await asyncio.sleep(0.2 if not worker.wanted else 1)
            return []
        answer: asyncio.Future[list[Job]] = asyncio.get_running_loop().create_future()
        deliver = answer.set_result
        self._queue.ask(worker.id, limit, deliver)
        try:
            await asyncio.wait({answer}, timeout=self._rules.poll)
        except asyncio.CancelledError:
            if answer.done():
                self._queue.give_back(answer.result())
            raise
        finally:
            self._queue.withdraw(worker.id, deliver)
        return [job.work for job in answer.result()] if answer.done() else []

    async def stops(self, request: web.Request) -> web.StreamResponse:
        worker = self._worker(request)
        answer: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        deliver = answer.set_result
        if not worker.leaving:
            self._queue.listen(worker.id, deliver)
            try:
                await asyncio.wait({answer}, timeout=self._rules.poll)
            finally:
                self._queue.unlisten(worker.id, deliver)
        jobs = answer.result() if answer.done() else []
        if worker.leaving and not jobs:
            # The SDK sleeps for a second after an answer without ids; one that is no job's spares it that.
            await asyncio.sleep(0.05)
            jobs = [""]
        return web.json_response({"jobsToStop": jobs})

    async def ping(self, request: web.Request) -> web.StreamResponse:
        worker = self._worker(request)
        worker.pinged()
        self._queue.ping(worker.id, request.query.get("job_id", "").split(","))
        return web.Response()

    async def stream(self, request: web.Request) -> web.StreamResponse:
        return await self._report(request, final=False)

    async def done(self, request: web.Request) -> web.StreamResponse:
        return await self._report(request, final=True)

    async def _report(self, request: web.Request, *, final: bool) -> web.StreamResponse:
        """A result too big, or no JSON, is refused with 400 and the job completes without output: what
        happens on RunPod to the first (runpod-python issue 309), and assumed of the second.
        """
        worker, name = self._worker(request), request.match_info["job"]
        job = self._queue.jobs.get(name)
        limit = self._rules.runsync_bytes if job and job.sync else self._rules.run_bytes
        try:
            result = _strict_json(await _read(request, limit))
            if not isinstance(result, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if final:
                with contextlib.suppress(NotYours):
                    self._finish(worker, name, {})
            return web.Response(status=400, text=str(error))
        try:
            if not final:
                self._queue.stream(worker.id, name, result.get("output"))
            elif result.get("status") == State.IN_PROGRESS:
                self._queue.progress(worker.id, name, result.get("output"))
            else:
                self._finish(worker, name, result)
        except NotYours:
            return web.Response(status=400, text="this worker does not hold this job")
        return web.Response()

    def _finish(self, worker: WorkerProcess, name: str, result: dict[str, Any]) -> None:
        self._queue.finish(worker.id, name, result)
        worker.finished_jobs += 1
        if result.get("stopPod") or worker.leaving:
            worker.refresh()


class _Public:
    """run, runsync, status, stream, cancel, retry, purge-queue, health and the OpenAI routes."""

    def __init__(self, queue: Queue, fleet: Fleet, rules: Rules) -> None:
        self._queue, self._fleet, self._rules = queue, fleet, rules

    async def run(self, request: web.Request) -> web.StreamResponse:
        try:
            job = await self._submit(request, sync=False)
        except _Refused as refused:
            return refused.answer
        return web.json_response({"id": job.id, "status": job.state})

    async def runsync(self, request: web.Request) -> web.StreamResponse:
        """Waits for `?wait=` milliseconds (held to the allowed range, an assumption); a client that hangs up
        leaves the job running.
        """
        try:
            job = await self._submit(request, sync=True)
            wait = float(request.query.get("wait", 1000 * self._rules.wait)) / 1000
        except _Refused as refused:
            return refused.answer
        except ValueError:
            return _error(400, "wait must be a number of milliseconds")
        low, high = self._rules.wait_range
        await _wait(job, lambda: job.state.final, min(max(wait, low), high))
        return _json(job.describe())

    async def status(self, request: web.Request) -> web.StreamResponse:
        return _json(self._job(request).describe())

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """The chunks that came since the last call; waits up to 5 s for one (an assumption: RunPod's own
        client gives up after 10 s).
        """
        job = self._job(request)
        await _wait(job, lambda: bool(job.chunks) or job.state.final, 5)
        chunks = [{"output": chunk} for chunk in job.chunks]
        job.chunks.clear()
        return _json({"status": job.state, "stream": chunks})

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        job = self._job(request)
        self._queue.cancel(job)
        return web.json_response({"id": job.id, "status": job.state})

    async def retry(self, request: web.Request) -> web.StreamResponse:
        job = self._job(request)
        try:
            self._queue.retry(job)
        except BadJob as error:
            return _error(400, str(error))
        return web.json_response({"id": job.id, "status": job.state})

    async def purge(self, request: web.Request) -> web.StreamResponse:
        """What was queued counts as cancelled (an assumption), so that whoever waits for it is told."""
        return web.json_response({"removed": self._queue.purge(), "status": "completed"})

    async def health(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"jobs": self._queue.health(), "workers": self._fleet.health()})

    async def openai(self, request: web.Request) -> web.StreamResponse:
        """`/openai/v1/...` as a job `{"openai_route": "/v1/...", "openai_input": body}`; a GET has no body.

        A list with one element, which is what a generator's single yield becomes, is unwrapped. Errors come
        with HTTP 200 and `{"error": ...}` (worker-vllm issue 57): the object that the job's `error` holds as
        JSON, or else its text.

        With `"stream": true` the answer is an event stream: text goes out as it comes, anything else as a
        `data:` event, an error as a last event `data: {"error": ...}` (an assumption), which is what the
        official client raises. A client that hangs up cancels the job, since nobody could read the rest;
        without a stream the job runs on.
        """
        work: dict[str, Any] = {"openai_route": "/" + request.match_info["route"]}
        try:
            if request.method == "POST":
                work["openai_input"] = _strict_json(await self._body(request, self._rules.runsync_bytes))
            job = self._queue.submit({"input": work}, sync=True, workers=len(self._fleet.workers))
        except _Refused as refused:
            return refused.answer
        except QueueFull as error:
            return _error(429, str(error))
        except ValueError:
            return _error(400, "the body must be JSON")
        body = work.get("openai_input")
        if isinstance(body, dict) and body.get("stream") is True:
            try:
                return await self._events(request, job)
            except (asyncio.CancelledError, ConnectionError):
                self._queue.cancel(job)
                raise
        if not await _wait(job, lambda: job.state.final, self._rules.edge_timeout):
            return _error(524, "a timeout occurred")
        if job.state is not State.COMPLETED:
            return _json({"error": _openai_error(job)})
        output = job.result.get("output")
        if isinstance(output, list) and len(output) == 1:
            output = output[0]
        if isinstance(output, str):
            return web.Response(text=output, content_type="application/json")
        return _json(output)

    async def _events(self, request: web.Request, job: Job) -> web.StreamResponse:
        def moved() -> bool:
            return bool(job.chunks) or job.state.final

        if not await _wait(job, moved, self._rules.edge_timeout):
            return _error(524, "a timeout occurred")
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        streamed = False
        while True:
            while job.chunks:
                streamed = True
                await response.write(_event(job.chunks.popleft()))
            if job.state.final:
                break
            await _wait(job, moved, None)
        if job.state is not State.COMPLETED:
            await response.write(_event({"error": _openai_error(job)}))
        elif not streamed and "output" in job.result:
            await response.write(_event(job.result["output"]))
        await response.write_eof()
        return response

    async def _submit(self, request: web.Request, *, sync: bool) -> Job:
        try:
            body = _strict_json(
                await self._body(request, self._rules.runsync_bytes if sync else self._rules.run_bytes)
            )
            return self._queue.submit(body, sync=sync, workers=len(self._fleet.workers))
        except BadJob as error:
            raise _Refused(_error(400, str(error))) from None
        except ValueError as error:
            raise _Refused(_error(400, f"the body must be JSON: {error}")) from None
        except QueueFull as error:
            raise _Refused(_error(429, str(error))) from None

    async def _body(self, request: web.Request, limit: int) -> bytes:
        try:
            return await _read(request, limit)
        except ValueError as error:
            raise _Refused(_error(400, f"bad request: body: {error}")) from None

    def _job(self, request: web.Request) -> Job:
        job = self._queue.jobs.get(request.match_info["job"])
        if job is None:
            raise web.HTTPNotFound(
                text=json.dumps({"error": "request does not exist"}), content_type="application/json"
            )
        return job


class _Refused(Exception):
    """A request that gets `answer` and becomes no job."""

    def __init__(self, answer: web.Response) -> None:
        self.answer = answer


async def call_webhook(session: ClientSession, job: Job, rules: Rules) -> None:
    """POST what /status shows to the job's webhook until it answers 200 or the tries are used up."""
    assert job.webhook is not None
    body = json.dumps(job.describe())
    for attempt in range(rules.webhook_retries + 1):
        if attempt:
            await asyncio.sleep(rules.webhook_delay)
        with contextlib.suppress(ClientError, TimeoutError):
            headers = {"Content-Type": "application/json"}
            async with session.post(
                job.webhook, data=body, headers=headers, timeout=ClientTimeout(total=30)
            ) as response:
                if response.status == 200:
                    return


async def _read(request: web.Request, limit: int) -> bytes:
    """The body; raises ValueError when it is larger than `limit` bytes, without reading all of it."""
    body = bytearray()
    if (request.content_length or 0) <= limit:
        async for chunk in request.content.iter_any():
            body += chunk
            if len(body) > limit:
                break
        else:
            return bytes(body)
    raise ValueError(f"exceeded max body size of {limit / MIB:g}MiB")


async def _wait(job: Job, condition: Callable[[], bool], seconds: float | None) -> bool:
    """Whether `condition` holds, after waiting for it for up to `seconds`."""
    changed = asyncio.Event()
    try:
        async with asyncio.timeout(seconds):
            while not condition():
                changed.clear()
                job.listeners.append(changed.set)
                await changed.wait()
    except TimeoutError:
        return False
    return True


def _strict_json(text: bytes) -> Any:
    """RunPod's side is not Python: NaN and Infinity are no JSON there. Raises ValueError."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def _openai_error(job: Job) -> Any:
    error = job.result.get("error", f"the job is {job.state}")
    with contextlib.suppress(ValueError):
        value = json.loads(error)
        if isinstance(value, dict):
            return value
    return error


def _event(chunk: Any) -> bytes:
    return (
        chunk if isinstance(chunk, str) else f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
    ).encode()


def _json(body: Any) -> web.Response:
    return web.Response(text=json.dumps(body, ensure_ascii=False), content_type="application/json")


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)
