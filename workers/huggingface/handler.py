"""Text from any causal language model that transformers loads, with continuous batching across jobs.

Request:  {"input": {"messages": [{"role": "user", "content": "Name three rivers."}], "max_tokens": 200}}
          or {"input": {"prompt": "Three rivers:"}}
Response: {"response": "The Rhine, the Nile and the Volga.", "finish_reason": "stop",
           "usage": {"prompt_tokens": 24, "completion_tokens": 13, "total_tokens": 37},
           "model": "Qwen/Qwen2.5-7B-Instruct", "revision": "a09a354..."}

With "stream": true the text is sent in parts, {"response": "The"}, ..., and the last part is the object above
with an empty `response`.

OpenAI:   /v1/chat/completions and /v1/completions, streamed or not, and /v1/models, as {"openai_route":
          ..., "openai_input": ...} or through the endpoint's own /openai/v1 address.

A worker that streams is a generator, so RunPod returns the answer of a job that does not stream as a list of
one object; with STREAMING=false it is the object itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.streaming import merge_streams, relay
from shared import prewarm, startup
from shared.jobs import Job, job_handler
from shared.openai import ModelsRequest, model_list, usage
from shared.settings import read_settings

from .adapters import resolve_adapters
from .checks import pick_adapter, refuse_unsupported
from .responses import LogprobReader, Writer, writer_for
from .schemas import (
    ANSWERS,
    ROUTES,
    Answer,
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    GenerationRequest,
    Settings,
)

if TYPE_CHECKING:
    from serving.continuous_batching.generator import Generator, TextDelta

    from .prompts import PromptReader, Prompts

# ---- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """The loaded model. served: names that a request may call it by. adapters: names of the LoRA adapters."""

    generator: Generator
    prompts: PromptReader
    logprobs: LogprobReader
    name: str
    served: tuple[str, ...]
    revision: str | None
    adapters: tuple[str, ...]


engine: Engine


def load(settings: Settings) -> Engine:
    model_path = startup.resolve(settings, settings.model_name)
    adapters = resolve_adapters(settings)
    with startup.phase("import"):
        from serving.continuous_batching.generator import Generator
        from serving.continuous_batching.kv_cache import cache_budget

        from .loading import load_model
        from .prompts import PromptReader
    with startup.phase("load") as phase:
        model, tokenizer = load_model(
            model_path.path,
            name=settings.model_name,
            device=settings.device,
            dtype=settings.dtype if settings.dtype != "auto" else settings.torch_dtype or "auto",
            device_map=settings.device_map,
            quantization=settings.quantization,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=settings.trust_remote_code,
        )
        set_adapters = None
        if adapters:
            from .lora import load_adapters

            set_adapters = load_adapters(model, {name: folder.path for name, folder in adapters.items()})
        phase.bytes = sum(weight.nbytes for weight in model.parameters())
    generator = Generator(
        model,
        tokenizer,
        max_batch_size=settings.max_batch_size,
        max_cache_tokens=settings.max_batch_tokens or cache_budget(model, settings.gpu_memory_utilization),
        max_model_len=settings.max_model_len,
        set_adapters=set_adapters,
    )
    return Engine(
        generator=generator,
        prompts=PromptReader(generator, tokenizer, settings.public_name),
        logprobs=LogprobReader(tokenizer),
        name=settings.public_name,
        served=(settings.public_name, settings.model_name),
        revision=model_path.revision,
        adapters=tuple(adapters),
    )


# ---- handle --------------------------------------------------------------------------------------------


@job_handler(GenerateRequest, routes=ROUTES, answers=ANSWERS)
async def handler(
    request: GenerateRequest | ChatRequest | CompletionRequest | ModelsRequest, job: Job
) -> Answer:
    if isinstance(request, ModelsRequest):
        return model_list(engine.name, *engine.adapters)
    writer, prompts, streams = await begin(request, job, each=False)
    outputs: dict[int, TextDelta] = {}  # one delta for each sequence
    async with aclosing(merge_streams(streams)) as batches:
        async for deltas in batches:
            outputs.update(deltas)
    total = usage(prompts.prompt_tokens, sum(delta.num_tokens for delta in outputs.values()))
    in_order = [outputs[index] for index in sorted(outputs)]
    if not in_order[0].logprobs:
        return writer.complete(in_order, total)
    # Thousands of tokens with their log probabilities would block the event loop.
    return await asyncio.to_thread(writer.complete, in_order, total)


@handler.streamed
async def stream(request: GenerationRequest, job: Job) -> AsyncIterator[Any]:
    parts = stream_parts(request, job)
    async for part in parts if isinstance(request, GenerateRequest) else relay(parts):
        yield part


async def stream_parts(request: GenerationRequest, job: Job) -> AsyncGenerator[Any]:
    writer, prompts, streams = await begin(request, job, each=True)
    num_tokens: dict[int, int] = {}  # generated so far, by sequence
    async with aclosing(merge_streams(streams)) as batches:
        async for deltas in batches:
            for part in writer.parts(deltas):
                yield part
            num_tokens |= {index: delta.num_tokens for index, delta in deltas}
    yield await asyncio.to_thread(writer.end, usage(prompts.prompt_tokens, sum(num_tokens.values())))


async def begin(
    request: GenerationRequest, job: Job, *, each: bool
) -> tuple[Writer, Prompts, list[AsyncGenerator[TextDelta]]]:
    """Check the request and prepare its sequences. Raises JobError for what the worker cannot serve."""
    adapter = pick_adapter(request, engine.served, engine.adapters)
    if not isinstance(request, GenerateRequest):
        refuse_unsupported(request)
    prompts = await engine.prompts.read(request)
    writer = writer_for(
        request,
        job_id=job.id,
        model=engine.name,
        revision=engine.revision,
        adapter=adapter,
        n=len(prompts.sequences),
        logprobs=engine.logprobs,
    )
    return writer, prompts, prompts.streams(engine.generator, adapter, each=each)


# ---- start ---------------------------------------------------------------------------------------------


def prepare() -> Settings:
    global engine
    settings = read_settings(Settings)
    engine = load(settings)
    if settings.prewarm:
        request: dict[str, Any] = {"prompt": "Hello", "max_tokens": 4}
        adapters = [{**request, "lora": name} for name in engine.adapters]
        prewarm.run(handler, [{**request, "temperature": 0}, request, *adapters])
    return settings


def main() -> None:
    startup.serve(handler, prepare, worker="huggingface")


if __name__ == "__main__":
    main()
