"""Runs a job for an HTTP request and sends what comes of it: JSON, server-sent events or bytes."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from asyncio import FIRST_COMPLETED
from contextlib import aclosing, suppress
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from shared import telemetry
from shared.admission import Admission
from shared.errors import ENGINE_DIED, JobError
from shared.http_body import ClientDisconnect, read_fields
from shared.jobs import Job, JobHandler
from shared.requests import parse, validate
from shared.results import EVENTS, JSON, Media, to_plain

RETRY_AFTER_S = 2
STALL_S = 60.0  # a client that takes nothing for so long, or up to twice, counts as gone
LINGER_S = 2.0  # a refused body is read and dropped for so long: its sender reads the answer after it
CLIENT_CLOSED = 499  # nginx's status for a client that hung up: only the metrics see it


def error_response(error: JobError, body: dict[str, Any] | None = None) -> JSONResponse:
    """OpenAI's error object, or `body`, with its status; Retry-After where another attempt may succeed."""
    retry = error.status in (429, 503) and error.type != "unavailable"
    headers = {"Retry-After": str(RETRY_AFTER_S)} if retry else None
    return JSONResponse(body or {"error": error.body()}, error.status, headers)


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
        super().__init__()
        self._request, self._handler, self._admission = request, handler, admission
        self._route, self._model = route, model
        self._id = request.headers.get("x-request-id", "")[:200] or uuid.uuid4().hex
        self._media_type = ""  # of the answer that has begun
        self._body_read = self._answered = False
        self._sending: bytes | None = None  # what the client has not taken yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with telemetry.record(self._route, "http") as record:
            self._record, self._receive, self._send = record, receive, send
            try:
                with self._admission.admit():
                    fields, form = await read_fields(self._request)
                    self._body_read = True
                    await self._run_while_connected(self._parse(fields, form))
            except ClientDisconnect:
                record.status = CLIENT_CLOSED
            except Exception as error:
                await self._fail(self._handler.explain(error)[0])

    def _parse(self, fields: dict[str, Any], form: bool) -> BaseModel:
        if self._model is None:
            return parse(fields.get("input"), self._handler.requests, self._handler.routes)
        return validate(self._model, fields, strict=False if form else None)  # a form's values are text

    async def _run_while_connected(self, request: BaseModel) -> None:
        work = asyncio.create_task(self._run(request))
        gone = asyncio.create_task(self._disconnected())
        stalled = False
        try:
            # Looking at times costs less than a timeout for each part of a stream.
            while not stalled:
                sending = self._sending
                ended, _ = await asyncio.wait({work, gone}, timeout=STALL_S, return_when=FIRST_COMPLETED)
                if ended:
                    break
                stalled = sending is not None and sending is self._sending
        finally:
            gone.cancel()
            if not work.done() and (stalled or not self._answered):
                self._record.status = CLIENT_CLOSED
                work.cancel()
            with suppress(asyncio.CancelledError):
                await work

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _run(self, request: BaseModel) -> None:
        ready = time.perf_counter()
        try:
            async with self._admission.slot():
                self._record.observe("queue", time.perf_counter() - ready)
                job = self._handler.begin({"id": self._id, "input": None}, transport="http")
                if self._handler.streams(request, job):
                    await self._stream(request, job)
                else:
                    await self._complete(request, job)
            self._handler.succeeded()
        except ClientDisconnect:
            self._record.status = CLIENT_CLOSED
        except Exception as error:
            problem, replace_worker = self._handler.explain(error)
            if replace_worker:
                self._admission.close("dead", problem if problem.code == ENGINE_DIED else None)
            await self._fail(problem)

    async def _complete(self, request: BaseModel, job: Job) -> None:
        begin = time.perf_counter()
        answer = await self._handler.work(request, job)
        self._record.observe_answer(answer)
        if isinstance(answer, Media):
            data, media_type = answer.data, answer.media_type
        elif isinstance(answer, str) and self._model is not None:  # a transcript, not a JSON string
            data, media_type = answer.encode(), "text/plain; charset=utf-8"
        else:
            data, media_type = (await to_plain(answer))[1], JSON
        queued, took = self._record.values["queue"], time.perf_counter() - begin
        if self._model is None and not isinstance(answer, Media):
            head = {"id": job.id, "status": "COMPLETED", "delayTime": _ms(queued), "executionTime": _ms(took)}
            data = json.dumps(head)[:-1].encode() + b', "output": ' + data + b"}"
        job.check_size(len(data))
        headers = {"x-queue-time": str(_ms(queued)), "x-inference-time": str(_ms(took))}
        await self._start(media_type, headers | {"content-length": str(len(data))})
        await self._write(data, more=False)

    async def _stream(self, request: BaseModel, job: Job) -> None:
        assert self._handler.stream_work is not None
        async with aclosing(self._handler.stream_work(request, job)) as parts:
            async for part in parts:
                if isinstance(part, str):  # server-sent events already
                    data, media_type = part.encode(), EVENTS
                elif isinstance(part, Media):
                    data, media_type = part.data, part.media_type
                else:
                    self._record.observe_answer(part)
                    data, media_type = b"data: " + (await to_plain(part))[1] + b"\n\n", EVENTS
                if not self._media_type:
                    self._record.first_token()
                    await self._start_stream(media_type)
                if data:  # an empty chunk would end a chunked body
                    await self._write(data, more=True)
        if not self._media_type:
            await self._start_stream(EVENTS)
        await self._write(b"", more=False)

    async def _start_stream(self, media_type: str) -> None:
        queued = str(_ms(self._record.values["queue"]))
        # A proxy that buffers, such as nginx, does not with this header.
        headers = {"x-queue-time": queued, "cache-control": "no-cache", "x-accel-buffering": "no"}
        await self._start(media_type, headers)

    async def _start(self, media_type: str, headers: dict[str, str]) -> None:
        self._media_type = media_type
        pairs = {"content-type": media_type, "x-request-id": self._id, **headers}
        raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in pairs.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})

    async def _write(self, data: bytes, *, more: bool) -> None:
        self._answered, self._sending = not more, data
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._sending = None

    async def _fail(self, error: JobError) -> None:
        """Answer with the error and its status; a stream that has begun ends in an event, or is cut off."""
        self._record.status = error.status
        if self._media_type:
            if self._media_type == EVENTS:
                native = f"data: {json.dumps({'error': error.body()})}\n\n"
                with suppress(ClientDisconnect):
                    event = native if self._model is None else error.event()
                    await self._write(event.encode(), more=False)
            return
        body = None
        if self._model is None:
            body = {"id": self._id, "status": "FAILED", "error": error.json()}
        response = error_response(error, body)
        response.headers["x-request-id"] = self._id
        if self._body_read or _is_small(self._request):
            self._answered = True
            await response(self._request.scope, self._receive, self._send)
        else:
            response.headers["connection"] = "close"
            await response(self._request.scope, self._receive, self._lingering)

    async def _lingering(self, message: Message) -> None:
        """Send the answer to a body that is not read to its end, and close the connection a little later.

        Closed at once, the connection would be reset under a client that still sends, and the answer lost.
        """
        if message["type"] == "http.response.start":
            return await self._send(message)
        await self._send({**message, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (await self._receive()).get("more_body"):
                    pass
        await self._send({"type": "http.response.body", "body": b""})


def _is_small(request: Request) -> bool:
    """Whether the server reads what is left of the body by itself."""
    declared = request.headers.get("content-length", "")
    return (declared.isdecimal() and int(declared) <= 2**16) or (
        not declared and "transfer-encoding" not in request.headers
    )


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
