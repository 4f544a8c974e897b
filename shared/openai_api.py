"""OpenAI's requests and responses, for the workers that serve them on `/openai/v1/*`.

Source of the shapes: OpenAI's API reference (embeddings, models) and what the `openai` Python client parses.
Unknown fields of a request are ignored, as servers of this API do: clients send fields of their own.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from shared.errors import JobError


class OpenAIRequest(BaseModel):
    """Base of the requests on OpenAI routes."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, protected_namespaces=())


# ---- /v1/models ----------------------------------------------------------------------------------------


class ModelsRequest(OpenAIRequest):
    """GET /v1/models has no body."""


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


_started = int(time.time())


def model_list(*names: str) -> ModelList:
    """The answer of /v1/models. `created` is when this worker started."""
    return ModelList(
        data=[
            Model(id=name, created=_started, owned_by=name.rpartition("/")[0] or "runpod") for name in names
        ]
    )


def check_model(asked: str | None, *served: str) -> None:
    """Raise JobError(code="model_not_found") for a model that this worker does not serve."""
    if asked is not None and asked.casefold() not in {name.casefold() for name in served}:
        raise JobError(
            f"model: {asked!r} is not served here. Use {served[0]!r}.", param="model", code="model_not_found"
        )


# ---- /v1/embeddings ------------------------------------------------------------------------------------

Inputs = list[str] | list[list[int]]

MAX_INPUTS = 16384


def _as_list(value: Any) -> Any:
    """OpenAI takes a text, a list of texts, one array of token ids, or a list of such arrays."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise ValueError("must be a text, a list of texts, an array of token ids or a list of such arrays")
    if value and all(type(token) is int for token in value):
        return [value]
    texts = bool(value) and all(isinstance(text, str) for text in value)
    arrays = bool(value) and all(
        isinstance(array, list) and array and all(type(token) is int for token in array) for array in value
    )
    if not (texts or arrays):
        raise ValueError("must hold at least one text, or only non-empty arrays of token ids")
    if "" in value:
        raise ValueError(f"must not hold an empty text (number {value.index('')})")
    if len(value) > MAX_INPUTS:
        raise ValueError(f"must hold at most {MAX_INPUTS} texts or arrays, not {len(value)}")
    return value


def _or_float(value: Any) -> Any:
    """Some clients write out what they leave to the server."""
    return "float" if value is None else value


class EmbeddingsRequest(OpenAIRequest):
    """The body of POST /v1/embeddings."""

    input: Annotated[Inputs, BeforeValidator(_as_list)] = Field(
        description="A text, a list of texts, an array of the model's own token ids, or a list of such arrays"
    )
    model: str | None = Field(None, description="The served model's name")
    encoding_format: Annotated[Literal["float", "base64"], BeforeValidator(_or_float)] = Field(
        "float", description="Lists of numbers, or base64 of little-endian float32"
    )
    dimensions: int | None = Field(None, ge=1, description="Keep this many leading dimensions")
    user: str | None = Field(None, description="Accepted and not used")


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


# ---- /v1/chat/completions ------------------------------------------------------------------------------


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


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Tokens that the model read: text, marks and images")
    completion_tokens: int = Field(description="Tokens that it made, the one that ended the answer included")
    total_tokens: int = Field(description="The sum of both")


def usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


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


def sse(event: BaseModel) -> str:
    """`event` as one server-sent event."""
    return f"data: {event.model_dump_json()}\n\n"


DONE = "data: [DONE]\n\n"
"""The end of a stream."""
