"""Text from LLMs with Hugging Face's Text Generation Inference (TGI), which runs as a child process.

Request:  {"input": {"messages": [{"role": "user", "content": "Name three rivers."}], "max_tokens": 200}}
          or {"input": {"prompt": "Three rivers:"}}
Response: {"response": "The Rhine, the Nile and the Volga.", "finish_reason": "stop",
           "details": {"finish_reason": "eos_token", "generated_tokens": 13, "seed": null},
           "usage": {"prompt_tokens": 24, "completion_tokens": 13, "total_tokens": 37},
           "model": "meta-llama/Llama-3.1-8B-Instruct", "revision": "0e9e39f..."}

With "stream": true the answer comes in parts, {"response": "The"}, ..., and ends with the object above, whose
`response` is then empty.

OpenAI:   /v1/chat/completions and /v1/completions, streamed or not, and /v1/models, as {"openai_route": ...,
          "openai_input": ...} or through the endpoint's own /openai/v1 address.

With STREAMING=true (the default) the worker is a generator, and RunPod returns the answer of a job without
"stream" as a list of one; with STREAMING=false as the object itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from serving.engine_server.process import EngineServer
from serving.streaming import relay
from shared import prewarm, startup
from shared.jobs import Job, job_handler
from shared.logs import log
from shared.openai import ModelList, ModelsRequest, model_list
from shared.settings import read_settings

from . import answers, launcher
from .engine import Engine, describe
from .schemas import ANSWERS, ROUTES, GenerateRequest, GenerateResponse, OpenAICall, Settings

# ---- load ----------------------------------------------------------------------------------------------


engine: Engine


def load(settings: Settings, server: EngineServer, revision: str | None) -> Engine:
    """What TGI says of itself. Raises JobError."""
    info, bos = asyncio.run(describe(server))
    served: dict[str, str | None] = {name.casefold(): name for name in settings.adapter_names}
    for own in (settings.public_name, settings.model_name, info["model_id"], "tgi"):
        served[own.casefold()] = None
    log.info("tgi %s: %s", info["version"], {key: info[key] for key in info if key.startswith("max_")})
    return Engine(
        server,
        settings.public_name,
        revision or info.get("model_sha"),
        served,
        max_total_tokens=info["max_total_tokens"],
        bos=bos,
    )


# ---- handle --------------------------------------------------------------------------------------------


@job_handler(GenerateRequest, routes=ROUTES, answers=ANSWERS)
async def handler(
    request: GenerateRequest | OpenAICall | ModelsRequest, job: Job
) -> GenerateResponse | ModelList | dict[str, Any]:
    if isinstance(request, ModelsRequest):
        return model_list(*engine.names)
    if isinstance(request, GenerateRequest):
        return await answers.generate(request, engine)
    return await answers.complete(request, engine, job.id)


@handler.streamed
async def stream(
    request: GenerateRequest | OpenAICall, job: Job
) -> AsyncIterator[GenerateResponse | dict[str, Any] | str]:
    in_posts = job.transport == "queue"
    if isinstance(request, GenerateRequest):
        async for part in answers.stream_generate(request, engine, in_posts=in_posts):
            yield part
    else:
        events = answers.stream_complete(request, engine, job.id, in_posts=in_posts)
        async with aclosing(relay(events) if in_posts else events) as parts:
            async for text in parts:
                yield text


# ---- start ---------------------------------------------------------------------------------------------


def first_requests(settings: Settings, server: EngineServer, revision: str | None) -> None:
    """Ask TGI what it serves, and prewarm. revision: the model's commit, if known."""
    global engine
    engine = load(settings, server, revision)
    if settings.prewarm:
        prewarm.run(handler, [{"prompt": "Hello", "max_tokens": 4, "temperature": 0}])


def prepare() -> Settings:
    settings = read_settings(Settings)
    server, revision = launcher.start(settings, on_death=lambda error: handler.on_engine_death(error))
    server.prove(lambda: first_requests(settings, server, revision))
    handler.engine_metrics = server.metrics
    return settings


def main() -> None:
    launcher.use_volume_for_tgi()
    startup.serve(handler, prepare, worker="tgi")


if __name__ == "__main__":
    main()
