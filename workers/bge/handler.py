"""Embeddings for retrieval, and reranking: BGE, E5, GTE, Qwen3-Embedding, and cross-encoders.

Request:  {"input": {"texts": ["what is a panda?"], "input_type": "query"}}
Response: {"embeddings": [[0.03, ...]], "model": "BAAI/bge-large-en-v1.5", "revision": "d4aa69...",
           "dimensions": 1024, "count": 1, "truncated": 0, "usage": {"prompt_tokens": 16, "total_tokens": 16},
           "pooling": "cls", "prompt": "Represent this sentence for searching relevant passages: "}

Request:  {"input": {"query": "what is a panda?", "documents": ["A bear from China.", "A dish."], "top_n": 1}}
Response: {"results": [{"index": 0, "relevance_score": 0.83}], "model": "BAAI/bge-reranker-v2-m3",
           "revision": "953dc6...", "method": "cross-encoder", "truncated": 0,
           "usage": {"prompt_tokens": 31, "total_tokens": 31}}

OpenAI:   /v1/embeddings (with input_type), /v1/rerank and /v2/rerank in the shape of Cohere and Jina, and
          /v1/models, as {"openai_route": ..., "openai_input": ...} or through the endpoint's own /openai/v1
          address, and in HTTP mode as real paths.

MODEL_NAME picks the model. An embedding model reranks by the cosine of query and document; a cross-encoder
reads each pair and gives no embeddings. Jobs that wait together run together.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from serving.embedding import answers
from serving.embedding.schemas import Usage
from shared import prewarm, startup
from shared.errors import JobError
from shared.jobs import Job, job_handler
from shared.openai import ModelsRequest, check_model, model_list
from shared.settings import read_settings

from .families import choose_prompts, find_family, is_cross_encoder, set_pooling
from .schemas import (
    ANSWERS,
    ROUTES,
    Answer,
    CohereRerankRequest,
    CohereRerankResponse,
    OpenAIRerankRequest,
    PromptFields,
    RerankFields,
    RerankRequest,
    RerankResponse,
    RetrievalCall,
    RetrievalRequest,
    RetrievalResponse,
    Settings,
)

if TYPE_CHECKING:
    from serving.embedding.encoder import Encoder

    from .reranker import Scores

# ---- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """The loaded model: one that embeds, and ranks by cosine, or a cross-encoder, which only ranks.

    served: every name that a request may call it by.
    """

    name: str
    served: tuple[str, ...]
    revision: str | None
    score: Callable[..., Awaitable[Scores]]  # as Reranker.score and score_by_cosine
    embedder: Encoder | None = None
    pooling: str | None = None
    accept_token_ids: bool = False

    @property
    def encoder(self) -> Encoder:
        """Raises JobError(code="no_embeddings") when the model is a reranker."""
        if self.embedder is None:
            raise JobError(
                f"{self.name} is a reranker, which gives no embeddings. Send query and documents, or use an "
                "embedding model.",
                code="no_embeddings",
            )
        return self.embedder


engine: Engine


def load(settings: Settings) -> Engine:
    name, public_name = settings.model_name, settings.public_name
    model = startup.resolve(settings, name)
    served = tuple(dict.fromkeys([public_name, name, name.rpartition("/")[2]]))
    options: dict[str, Any] = {
        "device": settings.device,
        "dtype": settings.dtype,
        "trust_remote_code": settings.trust_remote_code,
        "budget": settings.max_batch_tokens,
    }
    if is_cross_encoder(model.path, name):
        with startup.phase("import"):
            from .reranker import load_reranker
        reranker = load_reranker(model.path, **options)
        return Engine(public_name, served, model.revision, reranker.score)
    with startup.phase("import"):
        from serving.embedding.encoder import load_encoder

        from .reranker import score_by_cosine
    encoder = load_encoder(model.path, **options)
    family = find_family(settings.served_model_name, name)
    encoder.prompts |= choose_prompts(encoder.prompts, encoder.default_prompt, family)
    pooling = set_pooling(encoder.model, family, own=(model.path / "modules.json").exists())
    score = partial(score_by_cosine, encoder)
    return Engine(public_name, served, model.revision, score, encoder, pooling, settings.accept_token_ids)


# ---- handle --------------------------------------------------------------------------------------------


@job_handler(RetrievalRequest, RerankRequest, routes=ROUTES, answers=ANSWERS)
async def handler(request: RetrievalCall, job: Job) -> Answer:
    if isinstance(request, ModelsRequest):
        return model_list(engine.name)
    if isinstance(request, RetrievalRequest):
        return await embed(request, job)
    if isinstance(request, RerankRequest):
        return await rerank(request)
    check_model(request.model, *engine.served)
    if isinstance(request, CohereRerankRequest):
        ranked = await rerank(request)
        return CohereRerankResponse(**dict(ranked), id=job.id, meta={"api_version": {"version": "2"}})
    if isinstance(request, OpenAIRerankRequest):
        return await rerank(request)
    return await answers.embed_openai(
        request,
        job,
        engine.encoder,
        choose_prompt(request),
        model=engine.name,
        accept_token_ids=engine.accept_token_ids,
    )


def choose_prompt(request: PromptFields) -> answers.Prompt:
    """The prompt before each text of a request."""
    if request.instruction is not None:
        return answers.Prompt(request.instruction, "instruction")
    if isinstance(request, RetrievalRequest) and (request.prompt, request.prompt_name) != (None, None):
        param = "prompt" if request.prompt_name is None else "prompt_name"
        return answers.Prompt(engine.encoder.prompt_for(request.prompt, request.prompt_name), param)
    return answers.Prompt(engine.encoder.prompts[request.input_type], "input_type")


async def embed(request: RetrievalRequest, job: Job) -> RetrievalResponse:
    prompt = choose_prompt(request)
    response = await answers.embed(
        request, job, engine.encoder, prompt, model=engine.name, revision=engine.revision
    )
    return RetrievalResponse.model_construct(**dict(response), pooling=engine.pooling, prompt=prompt.text)


async def rerank(request: RerankFields) -> RerankResponse:
    scores = await engine.score(
        request.query, request.texts, truncate=request.truncate, raw_scores=request.raw_scores
    )
    return RerankResponse(
        results=request.rank(scores.values),
        model=engine.name,
        revision=engine.revision,
        method="cosine" if engine.embedder else "cross-encoder",
        truncated=scores.truncated,
        usage=Usage(prompt_tokens=scores.prompt_tokens, total_tokens=scores.prompt_tokens),
    )


# ---- start ---------------------------------------------------------------------------------------------


def prepare() -> Settings:
    global engine
    settings = read_settings(Settings)
    engine = load(settings)
    if settings.prewarm:
        # A short text, and a batch of texts of the length that most models take.
        texts = ["warm"], ["warm " * 600] * 4
        if engine.embedder:
            prewarm.run(handler, [{"texts": batch} for batch in texts])
        else:
            prewarm.run(handler, [{"query": "warm", "documents": documents} for documents in texts])
    return settings


def main() -> None:
    startup.serve(handler, prepare, worker="bge")


if __name__ == "__main__":
    main()
