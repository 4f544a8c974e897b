"""The platform's routes for clients: RunPod's API and OpenAI's, and the webhook."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, web

from local.bodies import json_response, json_text_response, read_json
from local.fleet import Fleet
from local.jobs import Job, Refused, State
from local.queue import Queue


class ClientApi:
    """run, runsync, status, stream, cancel, retry, purge-queue, health and the OpenAI routes."""

    def __init__(self, queue: Queue, fleet: Fleet) -> None:
        self._queue, self._fleet, self._rules = queue, fleet, queue.rules

    async def run(self, request: web.Request) -> web.StreamResponse:
        job = self._submit(await read_json(request, self._rules.run_bytes), sync=False)
        return json_response({"id": job.id, "status": State.IN_QUEUE})

    async def runsync(self, request: web.Request) -> web.StreamResponse:
        """Waits for `?wait=` milliseconds, clamped to the allowed range (an assumption). A client that
        disconnects leaves the job running.
        """
        low, high = self._rules.wait_range
        try:
            wait = float(request.query.get("wait", 1000 * self._rules.wait)) / 1000
        except ValueError:
            raise Refused("wait must be a number of milliseconds") from None
        job = self._submit(await read_json(request, self._rules.runsync_bytes), sync=True)
        await _wait(job, lambda: job.state.final, min(max(low, wait), high))  # NaN is low
        return json_response(job.describe())

    async def status(self, request: web.Request) -> web.StreamResponse:
        return json_response(self._job(request).describe())

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """The chunks since the last call; waits up to 5 s for one (an assumption: its client waits 10 s)."""
        job = self._job(request)
        await _wait(job, lambda: bool(job.chunks) or job.state.final, 5)
        chunks = [{"output": chunk} for chunk in job.chunks]
        job.chunks.clear()
        return json_response({"status": job.state, "stream": chunks})

    async def cancel(self, request: web.Request) -> web.StreamResponse:
        job = self._job(request)
        self._queue.cancel(job)
        return json_response({"id": job.id, "status": job.state})

    async def retry(self, request: web.Request) -> web.StreamResponse:
        job = self._job(request)
        self._queue.retry(job)
        return json_response({"id": job.id, "status": State.IN_QUEUE})

    async def purge(self, request: web.Request) -> web.StreamResponse:
        """Queued jobs count as cancelled (an assumption), so that their clients get an answer."""
        return json_response({"removed": self._queue.purge(), "status": "completed"})

    async def health(self, request: web.Request) -> web.StreamResponse:
        return json_response({"jobs": self._queue.health(), "workers": self._fleet.health()})

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
            work["openai_input"] = await read_json(request, self._rules.runsync_bytes)
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
            return json_response({"error": _openai_error(job)})
        output = job.result.get("output")
        if isinstance(output, list) and len(output) == 1:
            output = output[0]
        return json_text_response(output) if isinstance(output, str) else json_response(output)

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
