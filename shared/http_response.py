"""Runs a job for an HTTP request and sends what comes of it: JSON, server-sent events or bytes."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from contextlib import aclosing, suppress
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from shared import telemetry
from shared.admission import Admission
from shared.errors import ENGINE_DIED, JobError
from shared.http_body import ClientDisconnect, read_fields
from shared.jobs import Job, JobHandler
from shared.requests import parse, validate
from shared.results import Media, to_plain

RETRY_AFTER_S = 2
CLIENT_CLOSED = 499  # nginx's status for a client that hung up: only the metrics see it
EVENTS = "text/event-stream"
_STATUS = {
    "unknown_route": 404,
    "model_not_found": 404,
    "unauthorized": 401,
    "too_large": 413,
    "result_too_large": 413,
    "overloaded": 429,
    "not_ready": 503,
    ENGINE_DIED: 503,
}


def status_of(error: JobError) -> int:
    """The HTTP status of an error: by its code, else 400 for the request's fault and 500 for the worker's."""
    if isinstance(error.code, int) and 400 <= error.code < 600:  # an inference server's own status
        return error.code
    if error.type == "unavailable":
        return 503
    return _STATUS.get(str(error.code), 400 if error.type == "invalid_request_error" else 500)


def error_response(error: JobError, body: dict[str, Any] | None = None) -> JSONResponse:
    """OpenAI's error object, or `body`, with its status; Retry-After where another attempt may succeed."""
    status = status_of(error)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None
    return JSONResponse(body or {"error": error.body()}, status, headers)


class JobResponse(Response):
    """The answer to one request, made while it is sent.

    route: the path, for the metrics. model: of the body; None: the body is `{"input": {...}}`, and the answer
    has the form of a queue endpoint's. The job is cancelled when the client hangs up, which frees its slot.
    """

    def __init__(
        self,
        request: Request,
        handler: JobHandler,
        admission: Admission,
        route: str,
        model: type[BaseModel] | None,
    ) -> None:
        self.status_code, self.background = 200, None
        self.body, self.raw_headers = b"", []
        self._request, self._handler, self._admission = request, handler, admission
        self._route, self._model = route, model
        self._id = request.headers.get("x-request-id", "")[:200] or uuid.uuid4().hex

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with telemetry.record(self._route, "http") as record:
            self._record, self._send, self._started = record, send, False
            try:
                self._admission.check()
                request = self._parse(*await read_fields(self._request))
            except ClientDisconnect:
                record.status = CLIENT_CLOSED
                return
            except JobError as error:
                return await self._fail(error)
            work = asyncio.create_task(self._run(request))
            gone = asyncio.create_task(_disconnected(receive))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                gone.cancel()
                if not work.done():
                    record.status = CLIENT_CLOSED
                    work.cancel()
                with suppress(asyncio.CancelledError):
                    await work

    def _parse(self, fields: dict[str, Any], form: bool) -> BaseModel:
        if self._model is None:
            return parse(fields.get("input"), self._handler.requests, self._handler.routes)
        return validate(self._model, fields, strict=not form)  # the values of a form are text

    async def _run(self, request: BaseModel) -> None:
        record = self._record
        try:
            async with self._admission.slot():
                record.observe("queue", time.perf_counter() - record.begin)
                job = self._handler.begin({"id": self._id, "input": None}, transport="http")
                if self._handler.streams(request, job):
                    await self._stream(request, job)
                else:
                    await self._complete(request, job)
        except Exception as error:
            problem, replace_worker = self._handler.explain(error)
            if replace_worker:
                self._admission.close("dead")
            await self._fail(problem)

    async def _complete(self, request: BaseModel, job: Job) -> None:
        begin = time.perf_counter()
        answer = await self._handler.work(request, job)
        telemetry.observe_answer(answer)
        if isinstance(answer, Media):
            data, media_type = answer.data, answer.media_type
        elif isinstance(answer, str) and self._model is not None:
            data, media_type = answer.encode(), getattr(answer, "media_type", "text/plain; charset=utf-8")
        else:
            data, media_type = (await to_plain(answer))[1], "application/json"
        queued, took = self._record.values["queue"], time.perf_counter() - begin
        if self._model is None:
            head = {"id": job.id, "status": "COMPLETED", "delayTime": _ms(queued), "executionTime": _ms(took)}
            data = json.dumps(head)[:-1].encode() + b', "output": ' + data + b"}"
        headers = {"x-queue-time": str(_ms(queued)), "x-inference-time": str(_ms(took))}
        await self._start(media_type, headers | {"content-length": str(len(data))})
        await self._send({"type": "http.response.body", "body": data})

    async def _stream(self, request: BaseModel, job: Job) -> None:
        assert self._handler.stream_work is not None
        async with aclosing(self._handler.stream_work(request, job)) as parts:
            async for part in parts:
                if isinstance(part, Media):
                    data, media_type = part.data, part.media_type
                elif isinstance(part, str):  # server-sent events already
                    data, media_type = part.encode(), EVENTS
                else:
                    telemetry.observe_answer(part)
                    data, media_type = b"data: " + (await to_plain(part))[1] + b"\n\n", EVENTS
                if not self._started:
                    self._record.first_token()
                    queued = {"x-queue-time": str(_ms(self._record.values["queue"]))}
                    await self._start(media_type, queued | {"cache-control": "no-cache"})
                    self._events = media_type == EVENTS
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
        if not self._started:
            await self._start(EVENTS, {})
        await self._send({"type": "http.response.body", "body": b""})

    async def _start(self, media_type: str, headers: dict[str, str]) -> None:
        self._started = True
        pairs = {"content-type": media_type, "x-request-id": self._id, **headers}
        raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in pairs.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})

    async def _fail(self, error: JobError) -> None:
        """Answer with the error and its status; a stream that has begun ends in an event, or is cut off."""
        self._record.status = status_of(error)
        if self._started:
            if self._events:
                native = f"data: {json.dumps({'error': error.body()})}\n\n"
                event = native if self._model is None else error.event()
                await self._send({"type": "http.response.body", "body": event.encode()})
            return
        body = None
        if self._model is None:
            body = {"id": self._id, "status": "FAILED", "error": error.json()}
        response = error_response(error, body)
        await response(self._request.scope, self._request.receive, self._send)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
