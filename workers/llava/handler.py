"""Questions about pictures, answered by any image-text-to-text model of transformers, LLaVA by default.

Request:  {"input": {"image": "<base64, data: URI or http(s) URL>", "prompt": "What is on the table?",
                     "max_tokens": 200}}
Response: {"response": "A bowl of oranges.", "finish_reason": "stop",
           "usage": {"prompt_tokens": 593, "completion_tokens": 8, "total_tokens": 601},
           "model": "llava-hf/llava-1.5-7b-hf", "revision": "b234b80..."}

With "stream": true the answer comes in pieces, {"response": "A bowl"}, ..., and ends with the object above,
whose `response` is then empty.

OpenAI:   /v1/chat/completions, streamed and plain, and /v1/models, as {"openai_route": ..., "openai_input":
          ...} or through the endpoint's own /openai/v1 address.

Answers that are made at the same time share the model's steps, and a new job joins them at the next token. A
worker that streams is a generator, so RunPod gives a plain job's answer as a list of one; with
STREAMING=false it is the object itself.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, model_validator

from shared import openai_api, prewarm, startup
from shared.errors import JobError, StartError
from shared.generation import Generator, Piece, SamplingParams
from shared.hardware import pick_device
from shared.jobs import Request, current_job, job_handler, refuse_stream, start_config
from shared.media import encode_image, load_bytes, load_image
from shared.openai_api import (
    ChatCompletion,
    ChatCompletionRequest,
    ChatMessage,
    Messages,
    ModelList,
    ModelsRequest,
    Stop,
    Usage,
)
from shared.settings import WorkerSettings, read_settings
from shared.streaming import coalesce
from shared.volume import resolve_model

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGES = 32
MAX_IMAGE_BYTES = 20 * 2**20
DEFAULT_PROMPT = "Describe this image."
DEFAULT_TOKENS = 512
# Processors take an image of one or three lines for one whose channels come first, and some refuse what is
# smaller than a patch.
MIN_SIDE = 28


# ---- settings ------------------------------------------------------------------------------------------


class Settings(WorkerSettings):
    model_name: str = Field(
        "llava-hf/llava-1.5-7b-hf", description="Model id on the Hugging Face Hub, or a folder"
    )
    streaming: bool = Field(
        True, description="Answer through a generator, which can stream; false: plain answers only"
    )
    max_model_len: int | None = Field(
        None, ge=16, description="Most tokens of a prompt and its answer; unset: the model's own limit"
    )
    max_batch_size: int = Field(32, ge=1, le=1024, description="Most answers that are made at the same time")
    max_batch_tokens: int | None = Field(
        None, ge=16, description="Most tokens in their cache; unset: what the GPU's free memory holds"
    )


# ---- requests and responses ----------------------------------------------------------------------------


class LlavaRequest(Request):
    image: str | None = Field(None, description="A picture: base64, a `data:` URI or an http(s) URL")
    images: list[str] = Field(
        default=[], max_length=MAX_IMAGES, description="Several pictures, instead of `image`"
    )
    prompt: str = Field(DEFAULT_PROMPT, max_length=200_000, description="The question")
    system: str | None = Field(None, max_length=200_000, description="What the model is told beforehand")
    messages: Messages | None = Field(
        None, description="A conversation in OpenAI's form, instead of `prompt`, `image`, `images`, `system`"
    )
    max_tokens: int | None = Field(
        None, ge=1, le=32768, description="Most tokens of the answer; unset: 512, or what there is room for"
    )
    temperature: float = Field(0.0, ge=0, le=2, description="0: always the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the likeliest tokens with this sum")
    seed: int | None = Field(
        None, description="The same seed gives the same answer; unset: another each time"
    )
    stop: Stop = Field(default=[], description="A text, or up to four, before which the answer ends")
    stream: bool = Field(False, description="Send the answer in pieces as it is made")

    @model_validator(mode="after")
    def _fits_together(self) -> LlavaRequest:
        given = self.model_fields_set
        if self.messages is not None:
            for name in ("prompt", "image", "images", "system"):
                if name in given and getattr(self, name):
                    raise _wrong(name, "invalid_value", "give either it or messages.")
        elif self.image is not None and self.images:
            raise _wrong("images", "invalid_value", "give either image or images.")
        elif self.image is None and not self.images and "prompt" not in given:
            raise _wrong("image", "missing_field", "no picture. Give image, or images for several.")
        return self


def _wrong(param: str, code: str, message: str) -> JobError:
    return JobError(f"{param}: {message}", param=param, code=code)


class LlavaResponse(BaseModel):
    response: str = Field(description="The answer, without the prompt")
    finish_reason: str = Field(description="`stop`: it was at its end; `length`: at `max_tokens`")
    usage: Usage
    model: str = Field(description="The model, as MODEL_NAME gives it")
    revision: str | None = Field(description="Its commit, where known")


Asked = LlavaRequest | ChatCompletionRequest | ModelsRequest
Answer = LlavaResponse | ChatCompletion | ModelList
ROUTES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/models": ModelsRequest,
}


@dataclass(frozen=True)
class Picture:
    source: str
    param: str  # the field that it came in


@dataclass(frozen=True)
class Chat:
    """A request of either form. turns: role, and texts and pictures in their order."""

    turns: Sequence[tuple[str, Sequence[str | Picture]]]
    param: str  # the field that the texts came in
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: Sequence[str]

    @property
    def pictures(self) -> list[Picture]:
        return [part for _, parts in self.turns for part in parts if isinstance(part, Picture)]


def read_chat(request: LlavaRequest | ChatCompletionRequest) -> Chat:
    """The request in the form that both have in common. Raises JobError for what does not fit together."""
    if isinstance(request, ChatCompletionRequest):
        openai_api.refuse_unserved(
            request, n=1, logprobs=False, tools=[], functions=[], response_format={"type": "text"},
            presence_penalty=0, frequency_penalty=0, logit_bias={}, modalities=["text"], audio=None,
        )  # fmt: skip
        turns, param = _turns(request.messages), "messages"
        max_tokens = request.max_completion_tokens or request.max_tokens
    else:
        if request.messages is not None:
            turns, param = _turns(request.messages), "messages"
        else:
            sources = [("image", request.image)] if request.image is not None else []
            sources += [(f"images.{number}", source) for number, source in enumerate(request.images)]
            pictures = [Picture(source, name) for name, source in sources if source is not None]
            turns, param = [("user", [*pictures, request.prompt])], "prompt"
            if request.system is not None:
                turns.insert(0, ("system", [request.system]))
        max_tokens = request.max_tokens
    chat = Chat(
        turns, param, max_tokens, request.temperature or 0.0, request.top_p or 1.0, request.seed, request.stop
    )
    if len(chat.pictures) > MAX_IMAGES:
        raise _wrong(
            param, "too_many_images", f"{len(chat.pictures)} pictures, and a job may have {MAX_IMAGES}."
        )
    return chat


def _turns(messages: Sequence[ChatMessage]) -> list[tuple[str, list[str | Picture]]]:
    turns: list[tuple[str, list[str | Picture]]] = []
    for number, message in enumerate(messages):
        parts: list[str | Picture] = []
        for place, part in enumerate(message.content):
            param = f"messages.{number}.content.{place}"
            if part.image_url is None:
                parts.append(part.text or "")
            elif message.role == "user":
                parts.append(Picture(part.image_url.url, f"{param}.image_url.url"))
            else:
                raise _wrong(param, "invalid_value", "only messages of the role user may hold a picture.")
        turns.append(("system" if message.role == "developer" else message.role, parts))
    return turns


# ---- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    generator: Generator
    processor: Any
    name: str
    served: tuple[str, ...]
    revision: str | None
    lists: bool  # see takes_lists
    # Pictures are decoded and measured here, beside the model. As many jobs as it has threads hold whole
    # pictures in memory.
    readers: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="reader")
    )

    @property
    def marks(self) -> list[str]:
        """What stands for a picture in this model's prompts."""
        tokens = [value for name, value in vars(self.processor).items() if name.endswith("_token")]
        return [str(token) for token in tokens if token]

    async def read(self, chat: Chat) -> dict[str, Any]:
        """The model's inputs for `chat`. Raises JobError for pictures and texts that it cannot take."""
        try:
            async with asyncio.TaskGroup() as group:
                loads = [
                    group.create_task(load_bytes(it.source, param=it.param, max_bytes=MAX_IMAGE_BYTES))
                    for it in chat.pictures
                ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        data = [load.result() for load in loads]
        return await asyncio.get_running_loop().run_in_executor(self.readers, self._read, chat, data)

    def _read(self, chat: Chat, data: Sequence[bytes]) -> dict[str, Any]:
        from jinja2 import TemplateError

        pictures = zip(chat.pictures, data, strict=True)
        talk: list[dict[str, Any]] = []
        for role, parts in chat.turns:
            content = [self._part(part, chat.param, pictures) for part in parts]
            if role == "user" or self.lists:
                talk.append({"role": role, "content": content})
            else:
                talk.append({"role": role, "content": "".join(part["text"] for part in content)})
        try:
            # Pictures only: the processor would open addresses and paths itself.
            inputs = self.processor.apply_chat_template(
                talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        except (TemplateError, ValueError) as error:
            cause = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise _wrong(chat.param, "bad_prompt", f"the model cannot take this prompt: {cause}") from None
        return dict(inputs)

    def _part(self, part: str | Picture, param: str, pictures: Any) -> dict[str, Any]:
        if isinstance(part, Picture):
            picture, data = next(pictures)
            return {"type": "image", "image": _at_least(load_image(data, param=picture.param))}
        for mark in self.marks:
            if mark in part:
                message = f"{mark!r} stands for a picture in this model's prompts. Take it out of the text."
                raise _wrong(param, "reserved_text", message)
        return {"type": "text", "text": part}


def takes_lists(processor: Any) -> bool:
    """Whether the model's template takes lists of parts from everybody, not only from users."""
    from jinja2 import TemplateError

    def says(role: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": "hello"}]}

    try:
        shown = processor.apply_chat_template([says("user"), says("assistant"), says("user")])
        with suppress(TemplateError):  # some have no system messages at all
            shown += processor.apply_chat_template([says("system"), says("user")])
    except (TemplateError, TypeError):
        return False
    return "'type'" not in shown


def _at_least(image: Image) -> Image:
    """`image`, its sides stretched to MIN_SIDE pixels where they are shorter."""
    width, height = image.size
    return (
        image
        if min(width, height) >= MIN_SIDE
        else image.resize((max(width, MIN_SIDE), max(height, MIN_SIDE)))
    )


def load(settings: Settings) -> Engine:
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    with prewarm.phase("resolve") as phase:
        found = resolve_model(settings.model_name, settings.model_revision, token=token)
        phase.bytes = found.bytes
    with prewarm.phase("import"):
        from transformers import AutoModelForImageTextToText, AutoProcessor
    with prewarm.phase("load") as phase:
        device, dtype = pick_device(settings)
        trust: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code, "local_files_only": True}
        model = (
            AutoModelForImageTextToText.from_pretrained(found.path, dtype=dtype, **trust).to(device).eval()
        )
        processor = AutoProcessor.from_pretrained(found.path, **trust)
        phase.bytes = sum(weight.nbytes for weight in model.parameters())
    if model.config.is_encoder_decoder:
        raise StartError(
            f"{settings.model_name} is an encoder-decoder, and this worker runs decoders that chat. Use the "
            "florence2 worker for Florence-2, or another model.",
            code="unsupported_architecture",
        )
    if not getattr(processor, "chat_template", None):
        raise StartError(
            f"{settings.model_name} has no chat template. Use a model that is made for chat.",
            code="no_chat_template",
        )
    generator = Generator(
        model,
        processor.tokenizer,
        max_rows=settings.max_batch_size,
        budget=settings.max_batch_tokens,
        max_length=settings.max_model_len,
    )
    served = (settings.public_name, settings.model_name)
    return Engine(generator, processor, settings.public_name, served, found.revision, takes_lists(processor))


engine: Engine


# ---- handle --------------------------------------------------------------------------------------------


@job_handler(LlavaRequest, routes=ROUTES)
async def handler(request: Asked) -> AsyncIterator[Answer | dict[str, str] | str]:
    if isinstance(request, ModelsRequest) or not request.stream:
        yield await answer(request, engine)
    elif isinstance(request, ChatCompletionRequest):
        async for events in coalesce(stream_openai(request, engine)):
            yield events
    else:
        async for part in stream(request, engine):
            yield part


@job_handler(LlavaRequest, routes=ROUTES)
async def plain_handler(request: Asked) -> Answer:
    """The handler where STREAMING is false."""
    refuse_stream(request)
    return await answer(request, engine)


async def begin(
    request: LlavaRequest | ChatCompletionRequest, engine: Engine, *, each: bool
) -> tuple[int, AsyncGenerator[Piece]]:
    """The number of the prompt's tokens, and the answer that then comes."""
    if isinstance(request, ChatCompletionRequest):
        openai_api.check_model(request.model, *engine.served)
    chat = read_chat(request)
    inputs = await engine.read(chat)
    prompt_tokens = inputs["input_ids"].shape[1]
    max_tokens = engine.generator.fit(
        prompt_tokens, chat.max_tokens, default=DEFAULT_TOKENS, param=chat.param
    )
    sampling = SamplingParams(max_tokens, chat.temperature, chat.top_p, chat.seed, tuple(chat.stop))
    return prompt_tokens, engine.generator.stream(inputs, sampling, each=each)


async def answer(request: Asked, engine: Engine) -> Answer:
    if isinstance(request, ModelsRequest):
        return openai_api.model_list(engine.name)
    prompt_tokens, pieces = await begin(request, engine, each=False)
    async with aclosing(pieces):
        piece = await anext(pieces)
    usage = openai_api.usage(prompt_tokens, piece.tokens)
    assert piece.finish_reason is not None
    if isinstance(request, LlavaRequest):
        return _response(piece.text, piece.finish_reason, usage, engine)
    message = openai_api.AnswerMessage(content=piece.text)
    choice = openai_api.ChatChoice(message=message, finish_reason=piece.finish_reason)
    return ChatCompletion(
        id=_id(), created=int(time.time()), model=engine.name, choices=[choice], usage=usage
    )


def _response(text: str, finish_reason: str, usage: Usage, engine: Engine) -> LlavaResponse:
    return LlavaResponse(
        response=text, finish_reason=finish_reason, usage=usage, model=engine.name, revision=engine.revision
    )


async def stream(request: LlavaRequest, engine: Engine) -> AsyncIterator[LlavaResponse | dict[str, str]]:
    prompt_tokens, pieces = await begin(request, engine, each=True)
    last = Piece("", 0)

    async def texts() -> AsyncIterator[str]:
        nonlocal last
        async with aclosing(pieces):
            async for last in pieces:
                yield last.text

    async for text in coalesce(texts()):
        yield {"response": text}
    assert last.finish_reason is not None
    yield _response("", last.finish_reason, openai_api.usage(prompt_tokens, last.tokens), engine)


async def stream_openai(request: ChatCompletionRequest, engine: Engine) -> AsyncIterator[str]:
    prompt_tokens, pieces = await begin(request, engine, each=True)
    head = {"id": _id(), "created": int(time.time()), "model": engine.name}

    def event(delta: openai_api.Delta, finish_reason: str | None = None) -> str:
        choice = openai_api.ChunkChoice(delta=delta, finish_reason=finish_reason)
        return openai_api.sse(openai_api.ChatCompletionChunk(**head, choices=[choice]))

    piece, first = Piece("", 0), True
    async with aclosing(pieces):
        async for piece in pieces:
            if piece.text or first:
                yield event(openai_api.Delta(role="assistant" if first else None, content=piece.text))
                first = False
    yield event(openai_api.Delta(), piece.finish_reason)
    if request.stream_options is not None and request.stream_options.include_usage:
        usage = openai_api.usage(prompt_tokens, piece.tokens)
        yield openai_api.sse(openai_api.ChatCompletionChunk(**head, choices=[], usage=usage))
    yield openai_api.DONE


def _id() -> str:
    return f"chatcmpl-{current_job.get()['id']}"


# ---- start ---------------------------------------------------------------------------------------------


def prepare() -> dict[str, Any]:
    global engine
    from PIL import Image

    settings = read_settings(Settings)
    engine = load(settings)
    serving = handler if settings.streaming else plain_handler
    if settings.prewarm:
        image = encode_image(Image.new("RGB", (640, 480), "grey"))
        asked = {"image": image, "prompt": "warm", "max_tokens": 8}
        prewarm.run(serving, [asked, {**asked, "temperature": 0.5}])
    return start_config(serving, settings)


def main() -> None:
    config = startup.run(prepare, worker="llava")
    import runpod

    runpod.serverless.start(config)


if __name__ == "__main__":
    main()
