"""Settings, requests and responses of embedding workers: their own and OpenAI's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from shared.openai import OpenAIRequest
from shared.requests import Request, as_list
from shared.settings import WorkerSettings

MAX_INPUTS = 16384
Vectors = list[list[float]] | list[str]
"""Embeddings as numbers or as base64. A list of unions would take pydantic three times as long to dump."""


class EmbeddingSettings(WorkerSettings):
    max_concurrency: int = Field(
        128, ge=1, le=1024, description="Jobs that one worker takes at a time; constant while it lives"
    )
    max_batch_tokens: int | None = Field(
        None, ge=1, description="Tokens in one padded batch; unset: 16384 on a GPU, 1024 on CPU"
    )
    accept_token_ids: bool = Field(
        False,
        description="Take arrays of the model's own token ids on /v1/embeddings; false: refuse arrays",
    )


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Tokens that the model read, special tokens included")
    total_tokens: int = Field(description="The same: there is no completion")


# ---- the worker's own ----------------------------------------------------------------------------------


_Texts = Annotated[list[str], Field(max_length=MAX_INPUTS)]


class EmbedRequest(Request):
    texts: Annotated[list[str], BeforeValidator(as_list, json_schema_input_type=str | _Texts)] = Field(
        default=[], max_length=MAX_INPUTS, description="The texts, or one text; an empty text is a text"
    )
    text: str | None = Field(None, description="A single text, used when `texts` is missing or empty")
    batch_size: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="At most this many texts of the job in one batch; unset: limited by tokens alone",
    )
    normalize: bool = Field(True, description="Scale each embedding to length 1")
    dimensions: int | None = Field(
        None, ge=1, description="Keep this many leading dimensions (Matryoshka), before normalising"
    )
    prompt_name: str | None = Field(
        None, description="Name of a prompt in the model's files, put before each text"
    )
    prompt: str | None = Field(None, description="A prompt to put before each text; instead of `prompt_name`")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="Lists of numbers, or base64 of little-endian float32"
    )
    truncate: bool = Field(True, description="Cut texts that are too long for the model; false: refuse them")


class EmbedResponse(BaseModel):
    embeddings: Vectors = Field(description="One for each text, in their order")
    model: str = Field(description="The model, as MODEL_NAME gives it")
    revision: str | None = Field(description="Its commit, where known")
    dimensions: int = Field(description="Length of each embedding")
    count: int = Field(description="Number of embeddings")
    truncated: int = Field(description="How many texts were cut to the model's length")
    usage: Usage = Field(description="Counts of tokens")


# ---- OpenAI's ------------------------------------------------------------------------------------------

_Text = Annotated[str, Field(min_length=1)]
_Lists = list[_Text] | list[int] | list[Annotated[list[int], Field(min_length=1)]]
_Inputs = _Text | Annotated[_Lists, Field(min_length=1, max_length=MAX_INPUTS)]


def _as_inputs(value: Any) -> Any:
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


class EmbeddingsRequest(OpenAIRequest):
    """The body of POST /v1/embeddings."""

    input: Annotated[
        list[str] | list[list[int]], BeforeValidator(_as_inputs, json_schema_input_type=_Inputs)
    ] = Field(
        description="A text or a list of texts; with ACCEPT_TOKEN_IDS also an array of the model's own token "
        "ids, or a list of such arrays"
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


class EmbeddingsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
