"""Questions about images, answered by any image-text-to-text model of transformers, LLaVA by default.

Request:  {"input": {"image": "<base64, data: URI or http(s) URL>", "prompt": "What is on the table?",
                     "max_tokens": 200}}
Response: {"response": "A bowl of oranges.", "finish_reason": "stop",
           "usage": {"prompt_tokens": 593, "completion_tokens": 8, "total_tokens": 601},
           "model": "llava-hf/llava-1.5-7b-hf", "revision": "b234b80..."}

With "stream": true the text is sent in parts, {"response": "A bowl"}, ..., and the last part is the object
above with an empty `response`.

OpenAI:   /v1/chat/completions, streamed or not, and /v1/models, as {"openai_route": ..., "openai_input":
          ...} or through the endpoint's own /openai/v1 address.

Jobs share the model's decode steps (continuous batching). A worker that streams is a generator, so RunPod
returns the answer of a job that does not stream as a list of one object; with STREAMING=false it is the
object itself.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serving.openai_chat import (
    ChatChunks,
    ChatCompletionRequest,
    ResponseHead,
    chat_choice,
    chat_completion,
)
from serving.streaming import merge_streams, relay
from shared import prewarm, startup
from shared.jobs import Job, job_handler
from shared.openai import ModelsRequest, Usage, check_model, model_list, usage
from shared.settings import read_settings

from .schemas import ANSWERS, ROUTES, Answer, GenerationRequest, LlavaRequest, LlavaResponse, Settings

if TYPE_CHECKING:
    from serving.continuous_batching.generator import Generator, TextDelta

    from .prompts import PromptReader


# ---- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """The loaded model. served: names that a request may call it by."""

    generator: Generator
    prompts: PromptReader
    name: str
    served: tuple[str, ...]
    revision: str | None


engine: Engine


def load(settings: Settings) -> Engine:
    model_path = startup.resolve(settings, settings.model_name)
    with startup.phase("import"):
        from serving.continuous_batching.generator import Generator

        from .loading import load_model
        from .prompts import PromptReader
    with startup.phase("load") as phase:
        model, processor = load_model(
            model_path.path,
            name=settings.model_name,
            device=settings.device,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
        )
        phase.bytes = sum(weight.nbytes for weight in model.parameters())
    generator = Generator(
        model,
        processor.tokenizer,
        max_batch_size=settings.max_batch_size,
        max_cache_tokens=settings.max_batch_tokens,
        max_model_len=settings.max_model_len,
        processor=processor,
    )
    served = (settings.public_name, settings.model_name)
    prompts = PromptReader(generator, processor)
    return Engine(generator, prompts, settings.public_name, served, model_path.revision)


# ---- handle --------------------------------------------------------------------------------------------


@job_handler(LlavaRequest, routes=ROUTES, answers=ANSWERS)
async def handler(request: LlavaRequest | ChatCompletionRequest | ModelsRequest, job: Job) -> Answer:
    if isinstance(request, ModelsRequest):
        return model_list(engine.name)
    prompt_tokens, deltas = await begin(request, each=False)
    async with aclosing(deltas):
        delta = await anext(deltas)
    total, reason = usage(prompt_tokens, delta.num_tokens), delta.finish_reason or "stop"
    if isinstance(request, LlavaRequest):
        return response(delta.text, reason, total)
    head = ResponseHead.of("chatcmpl", job.id, engine.name)
    return chat_completion(head, [chat_choice(0, delta.text, reason)], total)


@handler.streamed
async def stream(request: GenerationRequest, job: Job) -> AsyncIterator[LlavaResponse | dict[str, str] | str]:
    if isinstance(request, ChatCompletionRequest):
        async for events in relay(stream_openai(request, job)):
            yield events
        return
    prompt_tokens, deltas = await begin(request, each=True)
    async with aclosing(merge_streams([deltas])) as batches:
        async for batch in batches:
            if text := "".join(delta.text for _, delta in batch):
                yield {"response": text}
            last = batch[-1][1]
    yield response("", last.finish_reason or "stop", usage(prompt_tokens, last.num_tokens))


async def stream_openai(request: ChatCompletionRequest, job: Job) -> AsyncIterator[str]:
    prompt_tokens, deltas = await begin(request, each=True)
    chunks = ChatChunks(ResponseHead.of("chatcmpl", job.id, engine.name))
    async with aclosing(merge_streams([deltas])) as batches:
        async for batch in batches:
            yield "".join(chunks.delta(0, delta.text) for _, delta in batch)
            last = batch[-1][1]
    yield chunks.finish(0, last.finish_reason or "stop")
    yield chunks.end(usage(prompt_tokens, last.num_tokens) if request.wants_usage else None)


async def begin(request: GenerationRequest, *, each: bool) -> tuple[int, AsyncGenerator[TextDelta]]:
    """The number of the prompt's tokens and the deltas of the answer; each: token by token, else one."""
    if isinstance(request, ChatCompletionRequest):
        check_model(request.model, *engine.served)
    inputs, params = await engine.prompts.read(request)
    return inputs["input_ids"].shape[1], engine.generator.stream(inputs, params, each=each)


def response(text: str, finish_reason: str, total: Usage) -> LlavaResponse:
    return LlavaResponse(
        response=text, finish_reason=finish_reason, usage=total, model=engine.name, revision=engine.revision
    )


# ---- start ---------------------------------------------------------------------------------------------


def prepare() -> Settings:
    global engine
    settings = read_settings(Settings)
    engine = load(settings)
    if settings.prewarm:
        from PIL import Image

        from serving.image import encode_image

        image = encode_image(Image.new("RGB", (640, 480), "grey"))
        request = {"image": image, "prompt": "warm", "max_tokens": 8}
        prewarm.run(handler, [request, {**request, "temperature": 0.5}])
    return settings


def main() -> None:
    startup.serve(handler, prepare, worker="llava")


if __name__ == "__main__":
    main()
