"""OpenAI's chat completions: requests, responses and chunks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from shared.errors import JobError
from shared.openai import OpenAIRequest, Usage


class ImageUrl(OpenAIRequest):
    url: str = Field(description="A `data:` URI, base64 or an http(s) URL")
    detail: str | None = Field(None, description="Accepted and not used")


def _as_object(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ContentPart(OpenAIRequest):
    type: Literal["text", "image_url"] = Field(description="What the part is")
    text: str | None = Field(None, description="The text, where `type` is text")
    image_url: Annotated[ImageUrl | None, BeforeValidator(_as_object)] = Field(
        None, description="The image, where `type` is image_url; a text is its `url`"
    )

    @model_validator(mode="after")
    def _has_what_it_says(self) -> ContentPart:
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type} needs the field {self.type}")
        return self


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class ChatMessage(OpenAIRequest):
    role: Literal["system", "developer", "user", "assistant"] = Field(description="Whose message it is")
    content: Annotated[list[ContentPart], BeforeValidator(_as_parts)] = Field(
        description="A text, or a list of parts"
    )

    def text(self) -> str:
        """Its text parts, one after another."""
        return "".join(part.text or "" for part in self.content)


Messages = Annotated[list[ChatMessage], Field(min_length=1)]


def _as_stops(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=200)]],
    BeforeValidator(_as_stops),
    Field(max_length=4),
]
"""A text, or up to four: the answer ends before the first of them that comes."""


class StreamOptions(OpenAIRequest):
    include_usage: bool = Field(False, description="End the stream with a chunk that has the usage")


class ChatCompletionRequest(OpenAIRequest):
    """The body of POST /v1/chat/completions. What a worker does not have is told by `refuse_unserved`."""

    # Other fields are kept, so that a worker can refuse those that would change its answer.
    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())

    messages: Messages = Field(description="The conversation so far")
    model: str | None = Field(None, description="The served model's name")
    max_completion_tokens: int | None = Field(None, ge=1, description="The most tokens of the answer")
    max_tokens: int | None = Field(None, ge=1, description="The older name of `max_completion_tokens`")
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1, description="Draw from the likeliest tokens of this sum")
    seed: int | None = Field(None, description="The same seed gives the same answer")
    stop: Stop = Field(default=[], description="The answer ends before the first of these, at most four")
    stream: bool | None = Field(None, description="Send the answer in pieces")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`")


def refuse_unserved(request: OpenAIRequest, **neutral: Any) -> None:
    """Raise JobError for a field that asks for what this worker does not have.

    neutral: each such field's value that asks for nothing (`n=1`); null and empty always do not.
    """
    for name, value in (request.model_extra or {}).items():
        if name in neutral and value and value != neutral[name]:
            raise JobError(
                f"{name}: this worker does not have it. Leave it out.", param=name, code="unsupported"
            )


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]


class ChatChoice(BaseModel):
    index: int = 0
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int = 0
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
