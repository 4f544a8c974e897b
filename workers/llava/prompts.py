"""A request as the generator takes it: the processor's inputs for its text and images, and parameters."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from jinja2 import TemplateError
from PIL.Image import Image

from serving.continuous_batching.generator import Generator
from serving.continuous_batching.request_params import sampling_params
from serving.continuous_batching.sampling import SamplingParams
from serving.generation_fields import UNSERVED, refuse_lone_surrogates, refuse_unserved
from serving.image import load_image
from serving.openai_chat import ChatCompletionRequest, ChatMessage, prompt_end
from shared.decoding import load_bytes
from shared.errors import invalid

from .schemas import DEFAULT_MAX_TOKENS, MAX_IMAGES, UNSERVED_HERE, GenerationRequest

MAX_IMAGE_BYTES = 20 * 2**20
# Pixels. Processors take an image of one or three lines for one with its channels first, and some refuse
# images smaller than a patch.
MIN_SIDE = 28


@dataclass(frozen=True)
class ImageSource:
    """An image of a request. param: the field that has it."""

    source: str
    param: str


@dataclass(frozen=True)
class Conversation:
    """The messages of a request of either form: roles, and text and images in their order.

    param: the field that has the texts.
    """

    messages: Sequence[tuple[str, Sequence[str | ImageSource]]]
    param: str

    @property
    def images(self) -> list[ImageSource]:
        return [part for _, parts in self.messages for part in parts if isinstance(part, ImageSource)]


def read_conversation(request: GenerationRequest) -> Conversation:
    """The conversation of a request. Raises JobError for fields that cannot be served."""
    if isinstance(request, ChatCompletionRequest):
        refuse_unserved(request, **UNSERVED, **UNSERVED_HERE)
    for name in ("messages", "prompt", "system"):
        refuse_lone_surrogates(getattr(request, name, None), name)
    if request.messages is not None:
        conversation = Conversation(_read_messages(request.messages), "messages")
    else:
        sources = [("image", request.image)] if request.image is not None else []
        sources += [(f"images.{number}", source) for number, source in enumerate(request.images)]
        user: list[str | ImageSource] = [
            *(ImageSource(source, param) for param, source in sources),
            request.prompt,
        ]
        messages: list[tuple[str, Sequence[str | ImageSource]]] = [("user", user)]
        if request.system is not None:
            messages.insert(0, ("system", [request.system]))
        conversation = Conversation(messages, "prompt")
    if (count := len(conversation.images)) > MAX_IMAGES:
        raise invalid(
            conversation.param, f"{count} images, and the limit is {MAX_IMAGES}.", "too_many_images"
        )
    return conversation


def _read_messages(messages: Sequence[ChatMessage]) -> list[tuple[str, list[str | ImageSource]]]:
    result: list[tuple[str, list[str | ImageSource]]] = []
    for message_number, message in enumerate(messages):
        parts: list[str | ImageSource] = []
        for part_number, part in enumerate(message.content):
            param = f"messages.{message_number}.content.{part_number}"
            if part.image_url is None:
                parts.append(part.text or "")
            elif message.role == "user":
                parts.append(ImageSource(part.image_url.url, f"{param}.image_url.url"))
            else:
                raise invalid(param, "only messages with the role user may have images.")
        result.append(("system" if message.role == "developer" else message.role, parts))
    return result


def template_takes_parts(processor: Any) -> bool:
    """Whether the chat template takes lists of content parts for every role, not only for users."""

    def message(role: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": "hello"}]}

    try:
        text = processor.apply_chat_template([message("user"), message("assistant"), message("user")])
        with suppress(TemplateError):  # some templates have no system messages
            text += processor.apply_chat_template([message("system"), message("user")])
    except (TemplateError, TypeError):
        return False
    return "'type'" not in text  # a list in place of a string prints as Python


class PromptReader:
    """Turns requests into the inputs of one model."""

    def __init__(self, generator: Generator, processor: Any) -> None:
        self._generator, self._processor = generator, processor
        self._takes_parts = template_takes_parts(processor)
        tokens = [value for name, value in vars(processor).items() if name.endswith("_token")]
        self._image_tokens = [str(token) for token in tokens if token]  # reserved for images in prompts
        # Decoding and preprocessing run beside the model. Each thread holds the images of one request.
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="images")

    async def read(self, request: GenerationRequest) -> tuple[dict[str, Any], SamplingParams]:
        """The model's inputs, tensors with a first dimension of one, and the sampling parameters.

        Raises JobError for what the model cannot take.
        """
        conversation = read_conversation(request)
        try:
            async with asyncio.TaskGroup() as group:
                loads = [
                    group.create_task(load_bytes(image.source, param=image.param, max_bytes=MAX_IMAGE_BYTES))
                    for image in conversation.images
                ]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        data = [load.result() for load in loads]
        loop = asyncio.get_running_loop()
        encode = partial(self.encode, conversation, data, **prompt_end(request))
        inputs = await loop.run_in_executor(self._threads, encode)
        params = sampling_params(
            request,
            self._generator,
            prompt_tokens=inputs["input_ids"].shape[1],
            default_max_tokens=DEFAULT_MAX_TOKENS,
            default_temperature=0.0,
            prompt_param=conversation.param,
        )
        return inputs, params

    def encode(
        self, conversation: Conversation, images: Sequence[bytes], **prompt_end: bool
    ) -> dict[str, Any]:
        """The model's inputs for a conversation. images: the files, in order. prompt_end: of the template."""
        files = zip(conversation.images, images, strict=True)
        messages: list[dict[str, Any]] = []
        for role, parts in conversation.messages:
            content = [self._content_part(part, conversation.param, files) for part in parts]
            if role == "user" or self._takes_parts:
                messages.append({"role": role, "content": content})
            else:
                messages.append({"role": role, "content": "".join(part["text"] for part in content)})
        try:
            # Decoded images only: the processor would open URLs and paths by itself.
            inputs = self._processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_tensors="pt", **prompt_end
            )
        except (TemplateError, ValueError) as error:
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            message = f"the model cannot take this prompt: {cause}"
            raise invalid(conversation.param, message, "bad_prompt") from None
        return dict(inputs)

    def _content_part(
        self, part: str | ImageSource, param: str, files: Iterator[tuple[ImageSource, bytes]]
    ) -> dict[str, Any]:
        if isinstance(part, ImageSource):
            image, data = next(files)
            return {"type": "image", "image": _enlarge(load_image(data, param=image.param))}
        for token in self._image_tokens:
            if token in part:
                message = (
                    f"{token!r} is reserved for images in this model's prompts. Remove it from the text."
                )
                raise invalid(param, message, "reserved_text")
        return {"type": "text", "text": part}


def _enlarge(image: Image) -> Image:
    """`image` with sides of at least MIN_SIDE pixels."""
    width, height = image.size
    if min(width, height) >= MIN_SIDE:
        return image
    return image.resize((max(width, MIN_SIDE), max(height, MIN_SIDE)))
