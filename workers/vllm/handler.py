"""Text from any model that vLLM serves, with `vllm serve` as a child process.

Request:  {"input": {"messages": [{"role": "user", "content": "Name three rivers."}], "max_tokens": 200}}
          or {"input": {"prompt": "Three rivers:"}}
Response: OpenAI's object, chat.completion or text_completion, with the job's id:
          {"id": "chatcmpl-<job id>", "object": "chat.completion", "model": "Qwen/Qwen2.5-7B-Instruct",
           "choices": [{"index": 0, "message": {"role": "assistant", "content": "The Rhine, ..."},
                        "finish_reason": "stop", ...}],
           "usage": {"prompt_tokens": 24, "completion_tokens": 13, "total_tokens": 37}, ...}

With "stream": true the answer comes in parts: OpenAI's server-sent events, several in one text, the usage in
the last one before `data: [DONE]`.

A request may have every other field of vLLM's own requests: tools, response_format, logprobs, n, seed, min_p,
structured_outputs, chat_template_kwargs, `model` with the name of a LoRA adapter, ...

OpenAI:   the routes of ROUTES, as {"openai_route": ..., "openai_input": ...} or through the endpoint's own
/openai/v1 address; the official worker's {"route": ..., "body": ...} is the same. Their bodies and answers
are vLLM's, untouched.

With STREAMING=true (the default) the worker is a generator, and RunPod returns the answer of a job without
"stream" as a list of one; with STREAMING=false as the object itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from serving.engine_server.process import EngineServer
from serving.streaming import relay
from shared import prewarm, startup
from shared.errors import JobError, invalid
from shared.jobs import Job, job_handler
from shared.logs import log
from shared.openai import ModelsRequest
from shared.settings import read_settings

from . import launcher
from .answers import ANSWERS
from .schemas import ROUTES, Call, GenerateRequest, RouteRequest, Settings, without_nulls

DEFAULT_TOKENS = 512
DEFAULT_SEQS = 256  # vLLM's own max_num_seqs; on GPUs of 70 GiB and more it is 1024


# ---- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """vllm serve. default_tokens: the max_tokens of a request that gives none."""

    server: EngineServer
    default_tokens: int = DEFAULT_TOKENS


engine: Engine


def load(settings: Settings) -> tuple[Engine, int]:
    """Start vLLM; the engine, and how many jobs to take at a time. Raises StartError, EngineFailed."""
    server, command = launcher.start(settings, on_death=lambda error: handler.on_engine_death(error))
    jobs = settings.max_concurrency or concurrency(
        server.get("/metrics")[1], command.number("max-num-seqs") or DEFAULT_SEQS
    )
    log.info("concurrency=%d", jobs)
    return Engine(server, max_default_tokens(server.get("/v1/models")[1])), jobs


def max_default_tokens(models: str) -> int:
    """DEFAULT_TOKENS, or the context length where that is less: vLLM refuses more, whatever the prompt.

    models: the engine's answer at /v1/models.
    """
    return min([DEFAULT_TOKENS, *map(int, re.findall(r'"max_model_len": ?(\d+)', models))])


def concurrency(metrics: str, max_num_seqs: int) -> int:
    """The jobs to take at a time: four times as many as the KV cache holds at full length, at least 8.

    Requests are seldom of full length, and those that do not fit wait in the engine's own queue. Far more
    than the engine can run would keep jobs from the endpoint's other workers.
    """
    full_length = [float(n) for n in re.findall(r'kv_cache_max_concurrency="([\d.]+)"', metrics)]
    return min(max_num_seqs, max(8, int(4 * sum(full_length))) if full_length else 64)


# ---- handle --------------------------------------------------------------------------------------------


AnyRequest = GenerateRequest | RouteRequest | Call | ModelsRequest


@job_handler(GenerateRequest, RouteRequest, routes=ROUTES, answers=ANSWERS)
async def handler(request: AnyRequest, job: Job) -> dict[str, Any]:
    method, path, body = engine_request(request)
    try:
        answer: dict[str, Any] = await engine.server.request(method, path, body, headers=_headers(job))
    except JobError as error:
        raise _explain(error, path) from None
    return answer


@handler.streamed
async def stream(request: AnyRequest, job: Job) -> AsyncIterator[str]:
    _, path, body = engine_request(request)
    in_posts = job.transport == "queue"
    events = engine.server.stream(path, body, headers=_headers(job), in_posts=in_posts)
    try:
        async with aclosing(relay(events) if in_posts else events) as parts:
            async for part in parts:
                yield part
    except JobError as error:
        raise _explain(error, path) from None


def engine_request(request: AnyRequest) -> tuple[str, str, dict[str, Any] | None]:
    """Method, path and body of the engine's request."""
    if isinstance(request, RouteRequest):
        request = request.call
    if isinstance(request, ModelsRequest):
        return "GET", "/v1/models", None
    if isinstance(request, Call):
        return "POST", request.path, request.body
    body: dict[str, Any] = without_nulls(request.model_dump())
    if request.max_tokens is None and "max_completion_tokens" not in body:
        body["max_tokens"] = engine.default_tokens
    if request.stream:
        body["stream_options"] = {"include_usage": True, **(body.get("stream_options") or {})}
    return "POST", "/v1/completions" if request.messages is None else "/v1/chat/completions", body


def _headers(job: Job) -> dict[str, str]:
    """vLLM makes its answer's id from this header."""
    return {"X-Request-Id": job.id}


def _explain(error: JobError, path: str) -> JobError:
    if error.code == 404 and error.message == "Not Found":
        message = f"the model does not serve {path}: it is of another kind."
        return invalid("openai_route", message, "unknown_route")
    return error


# ---- prewarm -------------------------------------------------------------------------------------------


def prewarm_inputs(openapi: str) -> list[dict[str, Any]]:
    """Small requests that the model can answer. openapi: the engine's list of its routes."""
    if '"/v1/completions"' in openapi:
        return [{"prompt": "Hello", "max_tokens": 4, "temperature": 0}]
    for route, body in (("/v1/embeddings", {"input": "Hello"}), ("/score", {"text_1": "a", "text_2": "b"})):
        if f'"{route}"' in openapi:
            return [{"openai_route": route, "openai_input": body}]
    return []


# ---- main ----------------------------------------------------------------------------------------------


def prepare() -> Settings:
    global engine
    settings = read_settings(Settings)
    engine, jobs = load(settings)
    server = engine.server

    def first_requests() -> None:
        if settings.prewarm:
            prewarm.run(handler, prewarm_inputs(server.get("/openapi.json")[1]))

    server.prove(first_requests)
    handler.engine_metrics = server.metrics
    return settings.model_copy(update={"max_concurrency": jobs})


def main() -> None:
    if base := os.environ.get("BASE_PATH"):  # the official worker's name
        os.environ.setdefault("RUNPOD_VOLUME_PATH", base)
    startup.serve(handler, prepare, worker="vllm")


if __name__ == "__main__":
    main()
