"""Sentence embeddings with sentence-transformers.

Request:  {"input": {"texts": ["A man is eating.", "Someone eats a meal."]}}
Response: {"embeddings": [[0.03, ...], ...], "model": "all-MiniLM-L6-v2", "revision": null, "dimensions": 384,
           "count": 2, "truncated": 0, "usage": {"prompt_tokens": 12, "total_tokens": 12}}

OpenAI:   /v1/embeddings and /v1/models, as {"openai_route": ..., "openai_input": ...} or through the
          endpoint's own /openai/v1 address.

Every model that sentence-transformers loads works; MODEL_NAME picks it. Jobs that wait together run together,
packed by tokens and sorted by length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from shared import openai_api, prewarm, startup
from shared.embeddings import Encoder, load_encoder
from shared.errors import JobError
from shared.jobs import Request, job_handler, start_config
from shared.openai_api import EmbeddingsRequest, EmbeddingsResponse, ModelList, ModelsRequest
from shared.settings import WorkerSettings, read_settings

MAX_TEXTS = 16384


# ---- settings ------------------------------------------------------------------------------------------


class Settings(WorkerSettings):
    model_name: str = Field("all-MiniLM-L6-v2", description="Model id on the Hugging Face Hub, or a folder")
    max_concurrency: int = Field(
        256, ge=1, le=4096, description="Jobs that one worker takes at a time; constant while it lives"
    )
    max_batch_tokens: int | None = Field(
        None, ge=1, description="Tokens in one padded batch; unset: 16384 on a GPU, 1024 on CPU"
    )


# ---- requests and responses ----------------------------------------------------------------------------


class EmbedRequest(Request):
    texts: list[str] = Field(
        default=[], max_length=MAX_TEXTS, description="The texts, or one text; an empty text is a text"
    )
    text: str | None = Field(None, description="A single text, used when `texts` is missing or empty")
    batch_size: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="At most this many texts of the job in one batch; unset: by tokens alone",
    )
    normalize: bool = Field(True, description="Scale each embedding to length 1")
    dimensions: int | None = Field(
        None, ge=1, description="Keep this many leading dimensions (Matryoshka), before normalising"
    )
    prompt_name: str | None = Field(
        None, description="A prompt that the model's files define, put before each text"
    )
    prompt: str | None = Field(None, description="A prompt to put before each text; instead of `prompt_name`")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="Lists of numbers, or base64 of little-endian float32"
    )
    truncate: bool = Field(True, description="Cut texts that are too long for the model; false: refuse them")

    @field_validator("texts", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Tokens that the model read, special ones included")
    total_tokens: int = Field(description="The same: embeddings have no completion")


class EmbedResponse(BaseModel):
    embeddings: Sequence[list[float] | str] = Field(description="One for each text, in their order")
    model: str = Field(description="The model, as MODEL_NAME gives it")
    revision: str | None = Field(description="Its commit, where known")
    dimensions: int = Field(description="Length of each embedding")
    count: int = Field(description="Number of embeddings")
    truncated: int = Field(description="How many texts were cut to the model's length")
    usage: Usage


# ---- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    encoder: Encoder
    name: str
    served: tuple[str, ...]
    revision: str | None


def load(settings: Settings) -> Loaded:
    name = settings.model_name
    # The library's own rule: a bare name is a model of its own organisation.
    hub_name = name if "/" in name else f"sentence-transformers/{name}"
    encoder, revision = load_encoder(settings, hub_name, budget=settings.max_batch_tokens)
    served = dict.fromkeys([settings.public_name, name, hub_name, hub_name.rpartition("/")[2]])
    return Loaded(encoder, settings.public_name, tuple(served), revision)


engine: Loaded


# ---- handle --------------------------------------------------------------------------------------------


@job_handler(EmbedRequest, routes={"/v1/embeddings": EmbeddingsRequest, "/v1/models": ModelsRequest})
async def handler(
    request: EmbedRequest | EmbeddingsRequest | ModelsRequest,
) -> EmbedResponse | EmbeddingsResponse | ModelList:
    if isinstance(request, ModelsRequest):
        return openai_api.model_list(engine.name)
    if isinstance(request, EmbeddingsRequest):
        openai_api.check_model(request.model, *engine.served)
        return await embed_openai(request, engine)
    return await embed(request, engine)


async def embed(request: EmbedRequest, engine: Loaded) -> EmbedResponse:
    inputs = request.texts or ([] if request.text is None else [request.text])
    if not inputs:
        raise JobError(
            "texts: no texts. Give texts, a list of at least one, or text.", param="texts", code="empty"
        )
    prompt = engine.encoder.prompt_for(request.prompt, request.prompt_name)
    texts, rows = await engine.encoder.embed(
        inputs, prompt=prompt, param="texts" if request.texts else "text", truncate=request.truncate,
        batch_size=request.batch_size, dimensions=request.dimensions, normalize=request.normalize,
        encoding_format=request.encoding_format,
    )  # fmt: skip
    tokens = sum(len(text.tokens) for text in texts)
    return EmbedResponse.model_construct(
        embeddings=rows,
        model=engine.name,
        revision=engine.revision,
        dimensions=request.dimensions or engine.encoder.dimensions,
        count=len(rows),
        truncated=sum(text.truncated for text in texts),
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
    )


async def embed_openai(request: EmbeddingsRequest, engine: Loaded) -> EmbeddingsResponse:
    texts, rows = await engine.encoder.embed(
        request.input, prompt=engine.encoder.default_prompt or "", param="input", truncate=True,
        batch_size=None, dimensions=request.dimensions, normalize=True,
        encoding_format=request.encoding_format,
    )  # fmt: skip
    tokens = sum(len(text.tokens) for text in texts)
    return EmbeddingsResponse(
        data=[openai_api.Embedding.model_construct(index=i, embedding=row) for i, row in enumerate(rows)],
        model=engine.name,
        usage=openai_api.EmbeddingsUsage(prompt_tokens=tokens, total_tokens=tokens),
    )


# ---- start ---------------------------------------------------------------------------------------------


def prepare() -> dict[str, Any]:
    global engine
    settings = read_settings(Settings)
    engine = load(settings)
    if settings.prewarm:
        # The shapes that matter: a lone short text, and a batch of texts at the model's full length.
        prewarm.run(handler, [{"text": "warm"}, {"texts": ["warm " * 600] * 4}])
    return start_config(handler, settings)


def main() -> None:
    config = startup.run(prepare, worker="sentence-transformers")
    import runpod

    runpod.serverless.start(config)


if __name__ == "__main__":
    main()
