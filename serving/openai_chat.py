"""OpenAI's chat completions: requests, responses, and the chunks of a stream.

head = ResponseHead.of("chatcmpl", job.id, "org/model")
chat_completion(head, [ChatChoice(...)], usage)             # the complete response
chunks = ChatChunks(head)                                   # the same, streamed
chunks.delta(0, "Hello") + chunks.finish(0, "stop") + chunks.end(usage)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SkipValidation, model_validator
from typing_extensions import TypedDict

from serving.generation_fields import SamplingFields
from shared.errors import invalid
from shared.openai import DONE, OpenAIRequest, Usage, sse

# ---- requests ------------------------------------------------------------------------------------------


class ImageUrl(OpenAIRequest):
    url: str = Field(description="A `data:` URI, base64 or an http(s) URL")
    detail: str | None = Field(None, description="Accepted and not used")


def _as_object(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ContentPart(OpenAIRequest):
    type: Literal["text", "image_url"] = Field(description="Type of the content part")
    text: str | None = Field(None, description="The text; required for type `text`")
    image_url: Annotated[
        ImageUrl | None, BeforeValidator(_as_object, json_schema_input_type=str | ImageUrl | None)
    ] = Field(None, description="The image; required for type `image_url`. A string is taken as its `url`")

    @model_validator(mode="after")
    def _has_content_of_type(self) -> ContentPart:
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type} needs the field {self.type}")
        return self


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ChatMessage(OpenAIRequest):
    role: Literal["system", "developer", "user", "assistant"] = Field(description="Role of the author")
    content: Annotated[
        list[ContentPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[ContentPart])
    ] = Field(description="A string, or a list of content parts")


Messages = Annotated[list[ChatMessage], Field(min_length=1)]


class StreamOptions(OpenAIRequest):
    include_usage: bool = Field(False, description="Send a last chunk with the usage of the request")


class OpenAIGenerationRequest(SamplingFields, OpenAIRequest):
    """What /v1/chat/completions and /v1/completions have in common.

    Unknown fields are kept: `refuse_unserved` finds those there that would change the answer.
    """

    model_config = ConfigDict(extra="allow")

    model: str | None = Field(None, description="Name of the served model")
    stream: bool | None = Field(None, description="Stream the response as server-sent events")
    stream_options: StreamOptions | None = Field(None, description="Options of a stream")

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


ADD_GENERATION_PROMPT = "false: the prompt ends after the last message, without the start of an answer"
CONTINUE_FINAL_MESSAGE = "The answer continues the last message, which the prompt leaves open"


class ChatCompletionRequest(OpenAIGenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: Messages = Field(description="The conversation so far")
    max_completion_tokens: int | None = Field(None, ge=1, description="Maximum number of generated tokens")
    max_tokens: int | None = Field(None, ge=1, description="Older name of `max_completion_tokens`")
    add_generation_prompt: bool | None = Field(None, description=ADD_GENERATION_PROMPT)
    continue_final_message: bool | None = Field(None, description=CONTINUE_FINAL_MESSAGE)


def prompt_end(request: Any) -> dict[str, bool]:
    """How the chat template ends the prompt, as arguments of `apply_chat_template`."""
    if request.continue_final_message and request.add_generation_prompt:
        message = "cannot be combined with add_generation_prompt. Send one of them."
        raise invalid("continue_final_message", message)
    continues = bool(request.continue_final_message)
    starts = not continues and request.add_generation_prompt is not False
    return {"continue_final_message": continues, "add_generation_prompt": starts}


# ---- responses -----------------------------------------------------------------------------------------


def is_none(value: object) -> bool:
    """For `Field(exclude_if=is_none)`: OpenAI leaves fields without a value out of its responses."""
    return value is None


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None


class TopLogprob(TypedDict):
    """A dictionary, not a model: an answer may have a hundred thousand of them."""

    token: Annotated[str, Field(description="Text of the token")]
    logprob: Annotated[float, Field(description="Natural logarithm of its probability")]
    bytes: Annotated[list[int] | None, Field(description="Its UTF-8 bytes; null for a part of a character")]


class TokenLogprob(TopLogprob):
    top_logprobs: Annotated[list[TopLogprob], Field(description="The most likely tokens at this position")]


TokenLogprobs = Annotated[list[TokenLogprob], SkipValidation]


class ChoiceLogprobs(BaseModel):
    content: TokenLogprobs


class ChatChoice(BaseModel):
    index: int = 0
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = Field(None, exclude_if=is_none)
    finish_reason: str


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = Field(None, exclude_if=is_none)
    content: str | None = Field(None, exclude_if=is_none)


class ChunkChoice(BaseModel):
    index: int = 0
    delta: Delta
    logprobs: ChoiceLogprobs | None = Field(None, exclude_if=is_none)
    finish_reason: str | None = None  # null until the last chunk of a choice


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = Field(None, exclude_if=is_none)


@dataclass(frozen=True)
class ResponseHead:
    """What the response of a request, and every chunk of it, has in common. created: seconds since 1970."""

    id: str
    created: int
    model: str

    @classmethod
    def of(cls, prefix: Literal["chatcmpl", "cmpl"], job_id: str, model: str) -> ResponseHead:
        return cls(f"{prefix}-{job_id}", int(time.time()), model)


def chat_choice(
    index: int, text: str, finish_reason: str, logprobs: list[TokenLogprob] | None = None
) -> ChatChoice:
    return ChatChoice(
        index=index,
        message=AnswerMessage(content=text),
        logprobs=None if logprobs is None else ChoiceLogprobs(content=logprobs),
        finish_reason=finish_reason,
    )


def chat_completion(head: ResponseHead, choices: Sequence[ChatChoice], usage: Usage) -> ChatCompletion:
    return ChatCompletion(**vars(head), choices=list(choices), usage=usage)


class ChatChunks:
    """The server-sent events of one streamed chat completion.

    The first chunk of a choice has the role, the last one the finish_reason and an empty delta.
    """

    def __init__(self, head: ResponseHead) -> None:
        self._head = vars(head)
        self._started: set[int] = set()  # indices of the choices whose role has been sent

    def delta(self, index: int, text: str, logprobs: list[TokenLogprob] | None = None) -> str:
        """New text of the choice `index`; "" where the chunk would be empty."""
        first = index not in self._started
        if not (first or text or logprobs):
            return ""
        self._started.add(index)
        delta = Delta(role="assistant" if first else None, content=text)
        return self._chunk(index, delta, logprobs=ChoiceLogprobs(content=logprobs) if logprobs else None)

    def finish(self, index: int, finish_reason: str) -> str:
        """The last chunk of the choice `index`."""
        return self._chunk(index, Delta(), finish_reason=finish_reason)

    def end(self, usage: Usage | None = None) -> str:
        """The end of the stream, after a chunk with the usage where that is given."""
        if usage is None:
            return DONE
        return sse(ChatCompletionChunk(**self._head, choices=[], usage=usage)) + DONE

    def _chunk(self, index: int, delta: Delta, **fields: Any) -> str:
        choice = ChunkChoice(index=index, delta=delta, **fields)
        return sse(ChatCompletionChunk(**self._head, choices=[choice]))
