"""The boundary between the SDK and a worker.

JSON comes in and a typed request goes through; plain JSON or one clear error comes out.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import json
import math
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from shared.errors import JobError, whole
from shared.logs import job_id, log
from shared.settings import WorkerSettings
from shared.streaming import error_event

Job = dict[str, Any]
"""A job as the platform sends it: `id`, `input`, and what else the client gave (`webhook`, `s3Config`)."""

ENGINE_DIED = "engine_died"
"""The code of a JobError after which the worker can answer no job any more, and asks to be replaced."""

current_job: ContextVar[Job] = ContextVar("current_job")
"""The job that the running task serves."""

Work = TypeVar("Work", bound=Callable[[Any], Any])

_serving: set[asyncio.Task[Any]] = set()


class Request(BaseModel):
    """Base of a worker's own requests: JSON's types as they are, and a typo is an error, not a default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


# ---- requests ------------------------------------------------------------------------------------------


def parse(job: Job, requests: Sequence[type[BaseModel]], routes: Mapping[str, type[BaseModel]]) -> BaseModel:
    """The typed request of `job`: `routes[openai_route]` where the input has one, else one of `requests`.

    Raises JobError that names the field, what was wrong with it and what is allowed.
    """
    payload = job.get("input")
    if not isinstance(payload, dict):
        kind = "missing" if payload is None else f"of type {_json_type(payload)}"
        raise JobError(
            f'input is {kind}. Send an object: {{"input": {{...}}}}.', param="input", code="invalid_input"
        )
    if "openai_route" not in payload and "openai_input" not in payload:
        return validate(closest(requests, payload), payload)
    route = payload.get("openai_route")
    path = route.partition("?")[0].rstrip("/") if isinstance(route, str) else ""
    if path not in routes:
        raise JobError(
            f"openai_route: {_show(route)} is not served here. Use {_either(routes)}.",
            param="openai_route",
            code="unknown_route",
        )
    body = payload.get("openai_input")
    if body is None:
        body = {}
    if not isinstance(body, dict):
        raise JobError(
            f"openai_input must be an object, not of type {_json_type(body)}.",
            param="openai_input",
            code="invalid_input",
        )
    return validate(routes[path], body)


def closest(requests: Sequence[type[BaseModel]], payload: dict[str, Any]) -> type[BaseModel]:
    """The one of `requests` that has most of the payload's fields; the first, where several do."""
    return max(requests, key=lambda request: len(request.model_fields.keys() & payload.keys()))


def validate(model: type[BaseModel], payload: dict[str, Any]) -> BaseModel:
    """`payload` as `model`; raises JobError about the first thing that is wrong with it.

    An unknown field comes first of all: a missing one is often the same field, misspelt.
    """
    try:
        return model.model_validate(payload)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
        raise _explain((unknown or problems)[0], model) from None


def _explain(problem: ErrorDetails, model: type[BaseModel]) -> JobError:
    param = ".".join(str(part) for part in problem["loc"]) or None
    if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
        names = list(model.model_fields)
        close = difflib.get_close_matches(str(param)[:100], names, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        return JobError(
            f"{param}: unknown field. {hint}Allowed: {', '.join(names)}.", param=param, code="unknown_field"
        )
    if problem["type"] == "missing":
        return JobError(f"{param}: this field is required.", param=param, code="missing_field")
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("model_type", "model_attributes_type"):  # its text has the name of the class
        text = "Input should be an object"
    got = f", got {_show(problem['input'])}" if param and problem["type"] != "value_error" else ""
    return JobError(f"{param}: {text}{got}." if param else f"{text}.", param=param, code="invalid_value")


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


def _show(value: Any) -> str:
    """`value` as JSON when that is short, else its type: a message must not carry megabytes."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    if len(text) <= 60:
        return text
    return f"{_json_type(value)} of {len(value)}" if hasattr(value, "__len__") else f"{text[:60]}..."


def _either(names: Mapping[str, Any]) -> str:
    return " or ".join(names) if names else "this worker's own input: it has no OpenAI routes"


# ---- results -------------------------------------------------------------------------------------------


class Result(dict[str, Any]):
    """A finished result. The SDK formats whole results for its debug log even when that log is off."""

    def __init__(self, content: Mapping[str, Any], size: int) -> None:
        super().__init__(content)
        self.size = size

    def __repr__(self) -> str:
        return f"<result of {self.size} bytes>"


def plain(result: Any) -> tuple[Any, str]:
    """`result` as plain JSON objects and as JSON text: models dumped, numpy turned into numbers and lists.

    Raises JobError(type="server_error") for what JSON has no form for: NaN, infinities, bytes, objects.
    """
    if isinstance(result, BaseModel):
        result = result.model_dump(mode="python")
    converted = False

    def convert(value: Any) -> Any:
        nonlocal converted
        converted = True
        if isinstance(value, BaseModel):
            return value.model_dump(mode="python")
        if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
            return value.tolist()
        raise TypeError(f"{type(value).__name__} at {_find(result, lambda v: v is value)}")

    try:
        text = json.dumps(result, ensure_ascii=False, allow_nan=False, default=convert)
    except ValueError:
        where = _find(result, lambda v: isinstance(v, float) and not math.isfinite(v))
        raise not_finite(f"at {where}") from None
    except TypeError as error:
        raise JobError(
            f"The result holds what JSON cannot: {error}.", code="not_json", type="server_error"
        ) from None
    try:
        text.encode()
    except UnicodeEncodeError:
        text, converted = whole(text), True  # the SDK would not send it
    return (json.loads(text) if converted else result), text


def not_finite(where: str) -> JobError:
    """What is said of NaN and infinities, `where` in the answer they were."""
    return JobError(
        f"The model gave a number that is not finite, {where}. Try another DTYPE, such as float32.",
        code="not_finite",
        type="server_error",
    )


def _find(value: Any, wanted: Callable[[Any], bool], path: str = "output") -> str | None:
    """The dotted path of the first value in `value` that is `wanted`."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist") and not wanted(value):
        value = value.tolist()
    if wanted(value):
        return path
    pairs: Any = ()
    if isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    for key, item in pairs:
        if found := _find(item, wanted, f"{path}.{key}"):
            return found
    return None


_max_result_bytes = int(WorkerSettings.model_fields["max_result_mb"].default * 1e6)


async def finish(result: Any, job: Job) -> Any:
    """What the SDK may post for `result`: plain JSON within the platform's limit.

    A larger one goes to the bucket that BUCKET_* or the job's s3Config names and is answered by
    `{"url", "bytes"}`; without a bucket it raises JobError with the size, the limit and what to do.
    """
    content, text = plain(result)
    size = len(text.encode())
    if size > _max_result_bytes:
        content = {"url": await asyncio.to_thread(_upload, text, job), "bytes": size}
    return Result(content, size) if isinstance(content, dict) else content


def has_bucket(job: Job) -> bool:
    """Whether a result of this job that is too large for the platform has somewhere to go."""
    names = ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY")
    return _own_bucket(job) is not None or all(os.environ.get(name) for name in names)


def _own_bucket(job: Job) -> dict[str, Any] | None:
    """The bucket that the job came with, if that is all there."""
    config, keys = job.get("s3Config"), ("endpointUrl", "accessId", "accessSecret")
    return config if isinstance(config, dict) and all(config.get(key) for key in keys) else None


def check_size(at_least: int, job: Job, advice: str = "") -> None:
    """Refuse, before the work is done, a job whose result of `at_least` bytes could not be returned."""
    if at_least > _max_result_bytes and not has_bucket(job):
        raise JobError(
            f"The result would be {at_least / 1e6:.1f} MB, and the platform takes "
            f"{_max_result_bytes / 1e6:g} MB. {advice}Split the job, or set BUCKET_ENDPOINT_URL, "
            "BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY to have large results uploaded.",
            code="result_too_large",
        )


def _upload(text: str, job: Job) -> str:
    data = text.encode()
    check_size(len(data), job)
    from runpod.serverless.utils import rp_upload

    bucket = _own_bucket(job)
    try:
        url: str = rp_upload.upload_in_memory_object(
            f"{job['id']}.json",
            data,
            bucket_creds=bucket,
            bucket_name=(bucket or {}).get("bucketName") or os.environ.get("BUCKET_NAME"),
            prefix="results",
        )
    except Exception as error:
        log.exception("upload failed")
        raise JobError(
            f"The result of {len(data) / 1e6:.1f} MB could not be uploaded ({type(error).__name__}). Check "
            f"{'s3Config' if bucket else 'BUCKET_ENDPOINT_URL, its keys and BUCKET_NAME'}.",
            code="upload_failed",
            type="server_error",
        ) from None
    return url


# ---- engines that fail ---------------------------------------------------------------------------------


def engine_stopped(error: BaseException) -> JobError:
    """What the jobs of an engine thread are told that `error` has ended; it is logged with its traceback."""
    log.critical("the engine stopped", exc_info=error)
    return JobError(
        f"The engine of this worker stopped ({type(error).__name__}). Send the job again: the worker is "
        "being replaced.",
        code=ENGINE_DIED,
        type="server_error",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the GPU, or this process, has no memory left."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    marks = ("DefaultCPUAllocator: can't allocate memory", "CUDA failed with error out of memory")
    return isinstance(error, MemoryError) or any(mark in str(error) for mark in marks)


def is_cuda_broken(error: BaseException) -> bool:
    """Whether `error`, torch's or CTranslate2's, is one of CUDA after which every other call fails too."""
    marks = ("CUDA error", "CUDA failed with error")
    return any(mark in str(error) for mark in marks) and not is_out_of_memory(error)


def empty_cache() -> None:
    """Give the GPU memory that torch holds without using it back to the driver."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


class _MemoryWatch:
    """Counts jobs in a row that ended for want of memory; the second asks for a fresh worker."""

    def __init__(self) -> None:
        self.failures = 0
        self.config: dict[str, Any] = {}


_memory = _MemoryWatch()


# ---- the handler ---------------------------------------------------------------------------------------


def job_handler(
    *requests: type[BaseModel], routes: Mapping[str, type[BaseModel]] | None = None
) -> Callable[[Work], Callable[[Job], Any]]:
    """Turn a typed coroutine or async generator into the `handler(job)` that the SDK calls.

    requests: the model of the worker's own input; with several, the one whose fields the input has.
    routes: OpenAI paths (`/v1/embeddings`) and the model of each one's body.

    The decorated function takes the request (`current_job` has the rest of the job) and returns or yields
    pydantic models or plain objects. It raises JobError for what is the client's to change; any other
    exception is logged with its traceback and answered without it.
    """
    table = dict(routes or {})

    def decorate(work: Work) -> Callable[[Job], Any]:
        if inspect.isasyncgenfunction(work):
            return _stream_handler(work, requests, table)
        return _plain_handler(work, requests, table)

    return decorate


def _plain_handler(
    work: Callable[[Any], Awaitable[Any]],
    requests: Sequence[type[BaseModel]],
    routes: dict[str, type[BaseModel]],
) -> Callable[[Job], Awaitable[Any]]:
    @wraps(work)
    async def handler(job: Job) -> Any:
        _serve(job)
        try:
            result = await finish(await work(parse(job, requests, routes)), job)
        except Exception as error:
            problem, refresh = _explain_failure(error)
            return {"error": problem.json(), **({"refresh_worker": True} if refresh else {})}
        _memory.failures = 0
        return result

    return handler


def _stream_handler(
    work: Callable[[Any], AsyncIterator[Any]],
    requests: Sequence[type[BaseModel]],
    routes: dict[str, type[BaseModel]],
) -> Callable[[Job], AsyncIterator[Any]]:
    @wraps(work)
    async def handler(job: Job) -> AsyncIterator[Any]:
        _serve(job)
        part = None
        try:
            async for part in work(parse(job, requests, routes)):
                yield part if isinstance(part, str) else await finish(part, job)
        except Exception as error:
            problem, refresh = _explain_failure(error)
            if refresh:
                # The SDK reads this wish from its configuration when the handler is a generator.
                _memory.config["refresh_worker"] = True
            # The SDK ends a stream at an `error` without sending it, so who reads the stream gets this first.
            if isinstance(part, str):
                yield error_event(problem)
            elif part is not None:
                yield {"event": "error", "detail": problem.body()}
            yield {"error": problem.json()}
            return
        _memory.failures = 0

    return handler


def refuse_stream(request: BaseModel) -> None:
    """Raise JobError where `request` asks for a stream: for handlers that are no generators."""
    if getattr(request, "stream", None):
        message = "stream: this endpoint has STREAMING=false. Leave stream out."
        raise JobError(message, param="stream", code="unsupported")


def _serve(job: Job) -> None:
    """Mark the running task, which the SDK made for this job alone, as serving it."""
    job_id.set(job["id"])
    current_job.set(job)
    if task := asyncio.current_task():
        _serving.add(task)
        task.add_done_callback(_serving.discard)


def serving() -> int:
    """Jobs that the SDK has in hand: being worked on, or their results being posted."""
    return len(_serving)


def _explain_failure(error: Exception) -> tuple[JobError, bool]:
    """What the client is told of `error`, and whether the worker should be replaced after this job."""
    if isinstance(error, JobError):
        return error, error.code == ENGINE_DIED
    if is_out_of_memory(error):
        log.error("out of memory: %s", error)
        empty_cache()
        _memory.failures += 1
        problem = JobError(
            "The worker ran out of memory on this job. Send a smaller job, or lower the worker's batch size.",
            code="out_of_memory",
            type="server_error",
        )
        return problem, _memory.failures >= 2
    if is_cuda_broken(error):
        return engine_stopped(error), True
    log.exception("job failed")
    problem = JobError(
        f"The worker failed on this job ({type(error).__name__}). Its log has the details under the job id.",
        code="internal_error",
        type="server_error",
    )
    return problem, False


def start_config(handler: Callable[[Job], Any], settings: WorkerSettings) -> dict[str, Any]:
    """The configuration for `runpod.serverless.start`.

    The concurrency is constant: whenever it changes, the SDK stops taking jobs until all in flight are done,
    and without one it serves about one job a second.
    """
    global _max_result_bytes
    _max_result_bytes = int(settings.max_result_mb * 1e6)
    _memory.config = {
        "handler": handler,
        "concurrency_modifier": lambda _: settings.max_concurrency,
        "return_aggregate_stream": True,
    }
    return _memory.config
