"""What every OpenAI route has: the base of requests, /v1/models, usage and server-sent events.

The shapes are those of OpenAI's API reference and of the `openai` Python client's parser. Unknown fields of a
request are ignored, as by other servers of this API: clients send extra fields.
"""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.errors import JobError, invalid

MODELS = "/v1/models"


class OpenAIRequest(BaseModel):
    """Base of the requests on OpenAI routes."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, data: Any) -> Any:
        """Clients that dump their models send null for every field that is not set."""
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class ModelsRequest(OpenAIRequest):
    """GET /v1/models has no body."""


class RetrieveModelRequest(ModelsRequest):
    """GET /v1/models/{id}: a worker lists its models, and `find_model` picks the one."""

    id: str


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
    """The answer of /v1/models. `created` is the Unix time at which this worker started."""
    return ModelList(
        data=[
            Model(id=name, created=_started, owned_by=name.rpartition("/")[0] or "runpod") for name in names
        ]
    )


def find_model(listed: dict[str, Any], name: str) -> dict[str, Any]:
    """The model `name` of a worker's plain answer of /v1/models. Raises JobError(code="model_not_found")."""
    models: list[dict[str, Any]] = listed["data"]
    if model := next((each for each in models if each["id"] == name), None):
        return model
    served = ", ".join(each["id"] for each in models)
    message = f"model: {name[:200]!r} is not served here. Use {served}."
    raise JobError(message, param="model", code="model_not_found")


def check_model(name: str | None, *served: str) -> None:
    """Raise JobError(code="model_not_found") for a model that this worker does not serve.

    name: the field `model` of the request; None is accepted. served: the names, compared without case; the
    error advises the first.
    """
    if name is not None and name.casefold() not in {known.casefold() for known in served}:
        raise invalid("model", f"{name!r} is not served here. Use {served[0]!r}.", "model_not_found")


class Usage(BaseModel):
    """Tokens of a completion. An embedding has none to complete: see `serving.embedding.schemas`."""

    prompt_tokens: int = Field(description="Prompt tokens, special and image tokens included")
    completion_tokens: int = Field(description="Generated tokens, the end-of-sequence token included")
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
"""The last event of a stream."""
