"""The boundary between the SDK and a worker: JSON becomes a typed request, its result JSON or one error.

    @job_handler(EmbedRequest, routes={"/v1/embeddings": EmbeddingsRequest})
    async def handler(request: EmbedRequest | EmbeddingsRequest, job: Job) -> EmbedResponse: ...

    @handler.streamed       # where the worker streams: an async generator for requests with `stream`
    async def stream(request: ..., job: Job) -> AsyncIterator[str]: ...

`await handler(job)` gives the complete answer, `handler.stream(job)` is the generator that the SDK iterates.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import BaseModel

from shared import telemetry
from shared.device import empty_cache, is_cuda_broken, is_out_of_memory
from shared.errors import ENGINE_DIED, JobError, engine_died, invalid
from shared.logs import job_id, log
from shared.openai import RetrieveModelRequest, find_model
from shared.requests import Request, parse
from shared.results import EVENTS, JSON, Result, has_bucket, posted_size, to_plain, too_large, upload
from shared.settings import WorkerSettings

__all__ = ["EVENTS", "JSON", "Answers", "Job", "JobHandler", "Request", "job_handler", "start_config"]


@dataclass(frozen=True, slots=True)
class Job:
    """One job.

    data: as the platform sends it: `id`, `input`, and what else the client gave (`webhook`, `s3Config`).
    max_result_bytes: the largest result that the platform takes. transport: how the answer is sent; HTTP
    carries bytes and text too (`shared.results.Media`), a queue endpoint JSON only.
    """

    data: dict[str, Any]
    max_result_bytes: int
    transport: Literal["queue", "http"] = "queue"

    @property
    def id(self) -> str:
        return str(self.data["id"])

    def check_size(self, at_least: int, advice: str = "") -> None:
        """Refuse a job, before the work is done, whose result of `at_least` bytes could not be returned.

        advice: how to make the result smaller; a sentence that ends in a space.
        """
        uploads = self.transport == "queue" and has_bucket(self.data)
        if at_least > self.max_result_bytes and not uploads:
            raise too_large(at_least, self.max_result_bytes, advice, bucket=self.transport == "queue")


Answers = Mapping[type[BaseModel], Mapping[str, Any]]
"""For each model of a request, the content types of its answers over HTTP and their types in Python.

`JSON: EmbedResponse`, `"text/vtt": str`, `"audio/mpeg": bytes`; for EVENTS the type of an event's data. What
/openapi.json states, and nothing else, comes from it.
"""
Work = Callable[[Any, Job], Awaitable[Any]]
StreamWork = Callable[[Any, Job], AsyncGenerator[Any, None]]


def job_handler(
    *requests: type[BaseModel],
    routes: Mapping[str, type[BaseModel]] | None = None,
    answers: Answers | None = None,
) -> Callable[[Work], JobHandler]:
    """Turn a typed coroutine function into a JobHandler.

    requests: the models of the worker's own input; with several, the one whose fields the input has.
    routes: OpenAI paths (`/v1/embeddings`) and the model of each one's body. answers: see `Answers`.

    The decorated function takes the request and its Job, and returns a pydantic model or a plain object. It
    raises JobError for what the client can change; any other exception is logged with its traceback, and the
    client receives an error without it.
    """
    return lambda work: JobHandler(work, requests, dict(routes or {}), answers or {})


class JobHandler:
    """A worker's handler, in the two forms that the SDK knows: a coroutine and an async generator.

    requests, routes, answers: see `job_handler`. work, stream_work: the decorated functions; stream_work is
    None where the worker does not stream. engine_metrics: an engine's own, for /metrics of HTTP mode.
    on_engine_death: ends the worker when its engine, a process, has died; `shared.startup.serve` sets it.
    """

    def __init__(
        self,
        work: Work,
        requests: tuple[type[BaseModel], ...],
        routes: dict[str, type[BaseModel]],
        answers: Answers,
    ) -> None:
        self.work = work
        self.stream_work: StreamWork | None = None
        self.engine_metrics: Callable[[], Awaitable[bytes]] | None = None
        self.on_engine_death: Callable[[JobError], None] = lambda _: None
        self.requests, self.routes, self.answers = requests, routes, answers
        self.max_result_bytes = int(WorkerSettings.model_fields["max_result_mb"].default * 1e6)
        self.config: dict[str, Any] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._out_of_memory = 0  # jobs in a row that ran out of memory

    def streamed(self, work: Callable[[Any, Job], AsyncIterator[Any]]) -> StreamWork:
        """Register the async generator function for requests whose field `stream` is true."""
        self.stream_work = cast(StreamWork, work)  # as it is usually annotated, an AsyncIterator
        return self.stream_work

    @property
    def in_flight(self) -> int:
        """Jobs whose tasks have not ended: they run, or their results are being posted."""
        return len(self._tasks)

    async def __call__(self, data: dict[str, Any]) -> Any:
        """The complete answer of a job, or `{"error": ...}`."""
        job = self.begin(data)
        with telemetry.record(self._route(data), "queue") as record:
            try:
                request = parse(data.get("input"), self.requests, self.routes)
                if self.streams(request, job):
                    message = "this endpoint has STREAMING=false. Leave stream out."
                    raise invalid("stream", message, "unsupported")
                answer = await self._complete(request, job)
                record.observe_answer(answer)
                result = await self.finish(answer, job)
            except Exception as error:
                problem, replace_worker = self.explain(error)
                record.status = problem.status
                return {"error": problem.json(), **({"refresh_worker": True} if replace_worker else {})}
        self.succeeded()
        return result

    async def stream(self, data: dict[str, Any]) -> AsyncIterator[Any]:
        """The parts of a job's answer; a request that does not stream has one, the complete answer.

        An answer that fails ends in `{"error": ...}`, after an event with the error where parts were sent.
        """
        job = self.begin(data)
        part = None
        with telemetry.record(self._route(data), "queue") as record:
            try:
                request = parse(data.get("input"), self.requests, self.routes)
                if not self.streams(request, job) or self.stream_work is None:
                    answer = await self._complete(request, job)
                    record.observe_answer(answer)
                    yield await self.finish(answer, job)
                else:
                    # Closed with this generator, so that a reader who leaves frees what the work holds.
                    async with aclosing(self.stream_work(request, job)) as parts:
                        async for part in parts:
                            record.first_token()
                            record.observe_answer(part)
                            yield part if isinstance(part, str) else await self.finish(part, job)
            except Exception as error:
                problem, replace_worker = self.explain(error)
                record.status = problem.status
                if replace_worker:
                    # The SDK reads this flag from its configuration when the handler is a generator.
                    self.config["refresh_worker"] = True
                # The SDK ends a stream at an `error` without sending it: the reader receives an event first.
                if isinstance(part, str):
                    yield problem.event()
                elif part is not None:
                    yield {"event": "error", "detail": problem.body()}
                yield {"error": problem.json()}
                return
        self.succeeded()

    async def _complete(self, request: BaseModel, job: Job) -> Any:
        answer = await self.work(request, job)
        if isinstance(request, RetrieveModelRequest):
            return find_model((await to_plain(answer))[0], request.id)
        return answer

    def succeeded(self) -> None:
        """A job has ended well: those that ran out of memory before it are not in a row with a later one."""
        self._out_of_memory = 0

    def _route(self, data: dict[str, Any]) -> str:
        """The OpenAI path of a job, or `native`."""
        payload = data.get("input")
        route = payload.get("openai_route") if isinstance(payload, dict) else None
        return route if isinstance(route, str) and route in self.routes else "native"

    def streams(self, request: BaseModel, job: Job) -> bool:
        """Whether the request asks for parts: by its `stream`, over HTTP also by `stream_over_http`."""
        fields = ("stream", "stream_over_http") if job.transport == "http" else ("stream",)
        return self.stream_work is not None and any(getattr(request, name, None) for name in fields)

    def begin(self, data: dict[str, Any], transport: Literal["queue", "http"] = "queue") -> Job:
        """Count the running task, which serves this job alone, as in flight, and name the job in the log."""
        job_id.set(data["id"])
        if task := asyncio.current_task():
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return Job(data, self.max_result_bytes, transport)

    async def finish(self, result: Any, job: Job) -> Any:
        """`result` as the SDK may post it: plain JSON within the platform's limit.

        A larger result is uploaded to the bucket that BUCKET_* or the job's s3Config names, and becomes
        `{"url", "bytes"}`. Raises JobError(code="result_too_large") without a bucket.
        """
        content, data = await to_plain(result)
        size = posted_size(data)
        if size > self.max_result_bytes:
            job.check_size(size)
            content = {"url": await asyncio.to_thread(upload, data, job.data), "bytes": len(data)}
        return Result(content, size) if isinstance(content, dict) else content

    def explain(self, error: Exception) -> tuple[JobError, bool]:
        """The client's error, and whether the worker should be replaced after this job.

        The second job in a row that runs out of memory asks for a new worker.
        """
        if isinstance(error, JobError):
            return error, error.code == ENGINE_DIED
        if is_out_of_memory(error):
            log.error("out of memory: %s", error)
            empty_cache()
            self._out_of_memory += 1
            problem = JobError(
                "The worker ran out of memory on this job. Send a smaller job, or lower the worker's batch "
                "size.",
                code="out_of_memory",
                type="server_error",
            )
            return problem, self._out_of_memory >= 2
        if is_cuda_broken(error):
            log.critical("the GPU cannot be used any more", exc_info=error)
            return engine_died(error), True
        log.exception("job failed")
        problem = JobError(
            f"The worker failed on this job ({type(error).__name__}). Its log has the details under the job "
            "id.",
            code="internal_error",
            type="server_error",
        )
        return problem, False


def start_config(handler: JobHandler, settings: WorkerSettings) -> dict[str, Any]:
    """The configuration for `runpod.serverless.start`.

    The concurrency is constant: whenever it changes, the SDK stops taking jobs until all in flight are done,
    and without one it serves about one job a second.
    """
    streams = handler.stream_work is not None and getattr(settings, "streaming", False)
    handler.max_result_bytes = int(settings.max_result_mb * 1e6)
    handler.config = {
        "handler": handler.stream if streams else handler.__call__,
        "concurrency_modifier": lambda _: settings.max_concurrency,
        "return_aggregate_stream": True,
    }
    return handler.config
