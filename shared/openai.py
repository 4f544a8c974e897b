"""What every OpenAI route has: the base of requests, /v1/models, usage and server-sent events.

Source of the shapes: OpenAI's API reference and what the `openai` Python client parses. Unknown fields of a
request are ignored, as servers of this API do: clients send fields of their own.
"""

from __future__ import annotations

import time
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from shared.errors import JobError


class OpenAIRequest(BaseModel):
    """Base of the requests on OpenAI routes."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, protected_namespaces=())


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


def sse(event: BaseModel) -> str:
    """`event` as one server-sent event."""
    return f"data: {event.model_dump_json()}\n\n"


DONE = "data: [DONE]\n\n"
"""The end of a stream."""
