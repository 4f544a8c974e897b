"""OpenAI's requests and responses, for the workers that serve them on `/openai/v1/*`.

Source of the shapes: OpenAI's API reference (embeddings, models) and what the `openai` Python client parses.
Unknown fields of a request are ignored, as servers of this API do: clients send fields of their own.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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
    return value


class EmbeddingsRequest(OpenAIRequest):
    """The body of POST /v1/embeddings."""

    input: Annotated[Inputs, BeforeValidator(_as_list)] = Field(
        description="A text, a list of texts, an array of the model's own token ids, or a list of such arrays"
    )
    model: str | None = Field(None, description="The served model's name")
    encoding_format: Literal["float", "base64"] = Field(
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
