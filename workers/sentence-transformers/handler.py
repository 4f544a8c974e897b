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
from typing import TYPE_CHECKING

from serving.embedding import answers
from shared import prewarm, startup
from shared.jobs import JSON, Job, job_handler
from shared.openai import ModelList, ModelsRequest, check_model, model_list
from shared.settings import read_settings

from .schemas import EmbeddingsRequest, EmbeddingsResponse, EmbedRequest, EmbedResponse, Settings

if TYPE_CHECKING:
    from serving.embedding.encoder import Encoder


# ---- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """The loaded model. served: every name that a request may call it by."""

    encoder: Encoder
    name: str
    served: tuple[str, ...]
    revision: str | None
    accept_token_ids: bool


engine: Engine


def load(settings: Settings) -> Engine:
    name = settings.model_name
    # sentence-transformers' own rule: a name without an organisation is a model of its own.
    hub_name = name if "/" in name else f"sentence-transformers/{name}"
    model = startup.resolve(settings, hub_name)
    with startup.phase("import"):
        from serving.embedding.encoder import load_encoder
    encoder = load_encoder(
        model.path,
        device=settings.device,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        budget=settings.max_batch_tokens,
    )
    served = dict.fromkeys([settings.public_name, name, hub_name, hub_name.rpartition("/")[2]])
    name = settings.public_name
    return Engine(encoder, name, tuple(served), model.revision, settings.accept_token_ids)


# ---- handle --------------------------------------------------------------------------------------------


@job_handler(
    EmbedRequest,
    routes={"/v1/embeddings": EmbeddingsRequest, "/v1/models": ModelsRequest},
    answers={EmbedRequest: {JSON: EmbedResponse}, EmbeddingsRequest: {JSON: EmbeddingsResponse}},
)
async def handler(
    request: EmbedRequest | EmbeddingsRequest | ModelsRequest, job: Job
) -> EmbedResponse | EmbeddingsResponse | ModelList:
    encoder = engine.encoder
    if isinstance(request, ModelsRequest):
        return model_list(engine.name)
    if isinstance(request, EmbeddingsRequest):
        check_model(request.model, *engine.served)
        prompt = answers.Prompt(encoder.default_prompt or "", "input")
        return await answers.embed_openai(
            request, job, encoder, prompt, model=engine.name, accept_token_ids=engine.accept_token_ids
        )
    prompt = answers.Prompt(encoder.prompt_for(request.prompt, request.prompt_name))
    return await answers.embed(request, job, encoder, prompt, model=engine.name, revision=engine.revision)


# ---- start ---------------------------------------------------------------------------------------------


def prepare() -> Settings:
    global engine
    settings = read_settings(Settings)
    engine = load(settings)
    if settings.prewarm:
        # The shapes that matter: one short text, and a batch of texts of the length that most models take.
        prewarm.run(handler, [{"text": "warm"}, {"texts": ["warm " * 600] * 4}])
    return settings


def main() -> None:
    startup.serve(handler, prepare, worker="sentence-transformers")


if __name__ == "__main__":
    main()
