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

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from shared import openai_api, prewarm, startup
from shared.embeddings import (
    EmbedRequest,
    EmbedResponse,
    Encoder,
    answer,
    answer_openai,
    load_encoder,
)
from shared.jobs import job_handler, start_config
from shared.openai_api import EmbeddingsRequest, EmbeddingsResponse, ModelList, ModelsRequest
from shared.settings import WorkerSettings, read_settings

# ---- settings ------------------------------------------------------------------------------------------


class Settings(WorkerSettings):
    model_name: str = Field("all-MiniLM-L6-v2", description="Model id on the Hugging Face Hub, or a folder")
    max_concurrency: int = Field(
        128, ge=1, le=1024, description="Jobs that one worker takes at a time; constant while it lives"
    )
    max_batch_tokens: int | None = Field(
        None, ge=1, description="Tokens in one padded batch; unset: 16384 on a GPU, 1024 on CPU"
    )


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
    found = prewarm.resolve(settings, hub_name)
    encoder = load_encoder(settings, found, budget=settings.max_batch_tokens)
    served = dict.fromkeys([settings.public_name, name, hub_name, hub_name.rpartition("/")[2]])
    return Loaded(encoder, settings.public_name, tuple(served), found.revision)


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
        prompt = engine.encoder.default_prompt or ""
        return await answer_openai(engine.encoder, request, prompt=prompt, model=engine.name)
    encoder = engine.encoder
    prompt = encoder.prompt_for(request.prompt, request.prompt_name)
    fields = await answer(encoder, request, prompt=prompt, model=engine.name, revision=engine.revision)
    return EmbedResponse.model_construct(**fields)


# ---- start ---------------------------------------------------------------------------------------------


def prepare() -> dict[str, Any]:
    global engine
    settings = read_settings(Settings)
    engine = load(settings)
    if settings.prewarm:
        # The shapes that matter: a lone short text, and a batch of texts as long as most models take them.
        prewarm.run(handler, [{"text": "warm"}, {"texts": ["warm " * 600] * 4}])
    return start_config(handler, settings)


def main() -> None:
    config = startup.run(prepare, worker="sentence-transformers")
    import runpod

    runpod.serverless.start(config)


if __name__ == "__main__":
    main()
