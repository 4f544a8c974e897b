"""Embeddings for retrieval, and reranking: BGE, E5, GTE, Qwen3-Embedding, and cross-encoders.

Request:  {"input": {"texts": ["what is a panda?"], "input_type": "query"}}
Response: {"embeddings": [[0.03, ...]], "model": "BAAI/bge-large-en-v1.5", "revision": "d4aa69...",
           "dimensions": 1024, "count": 1, "truncated": 0, "usage": {"prompt_tokens": 16, "total_tokens": 16},
           "pooling": "cls", "prompt": "Represent this sentence for searching relevant passages: "}

Request:  {"input": {"query": "what is a panda?", "documents": ["A bear from China.", "A dish."], "top_n": 1}}
Response: {"results": [{"index": 0, "relevance_score": 0.83}], "model": "BAAI/bge-reranker-v2-m3",
           "revision": "953dc6...", "method": "cross-encoder", "truncated": 0,
           "usage": {"prompt_tokens": 31, "total_tokens": 31}}

OpenAI:   /v1/embeddings (with input_type), /v1/rerank in the shape of Cohere and Jina, and /v1/models, as
          {"openai_route": ..., "openai_input": ...} or through the endpoint's own /openai/v1 address.

MODEL_NAME picks the model. An embedding model reranks by the cosine of query and document; a cross-encoder
reads each pair and gives no embeddings. Jobs that wait together run together.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, field_validator

from shared import openai_api, prewarm, startup
from shared.batching import DynamicBatcher
from shared.embeddings import (
    MAX_TEXTS,
    EmbedRequest,
    EmbedResponse,
    Encoder,
    Text,
    Usage,
    answer,
    answer_openai,
    batch_tokens,
    check_repeated,
    check_unicode,
    load_encoder,
    padded,
    plain_ids,
    shape,
)
from shared.errors import JobError, StartError
from shared.hardware import parallel_batches, pick_device, share_cores
from shared.jobs import Request, job_handler, start_config
from shared.openai_api import EmbeddingsRequest, EmbeddingsResponse, ModelList, ModelsRequest, OpenAIRequest
from shared.settings import WorkerSettings, read_settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# ---- settings ------------------------------------------------------------------------------------------


class Settings(WorkerSettings):
    model_name: str = Field(
        "BAAI/bge-large-en-v1.5",
        description="Id on the Hugging Face Hub, or a folder, of an embedding model or a reranker",
    )
    max_concurrency: int = Field(
        128, ge=1, le=1024, description="Jobs that one worker takes at a time; constant while it lives"
    )
    max_batch_tokens: int | None = Field(
        None, ge=1, description="Tokens in one padded batch; unset: 16384 on a GPU, 1024 on CPU"
    )


# ---- what a model was trained with ---------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """Models that were trained alike. Their own files say more than this where they say anything."""

    names: str  # matches a part of the model's id or path
    pooling: str
    query: str = ""
    document: str = ""


WEB_SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"

# The first match counts. From the models' own pages and code (FlagOpen/FlagEmbedding, intfloat, Alibaba-NLP,
# QwenLM/Qwen3-Embedding). The published BGE and E5 carry their pooling in their files, but no prompts.
FAMILIES = (
    Family(r"bge-(small|base|large)-zh", "cls", query="为这个句子生成表示以用于检索相关文章："),
    Family(
        r"bge-(small|base|large)-en", "cls", query="Represent this sentence for searching relevant passages: "
    ),
    Family(r"bge-m3", "cls"),
    Family(r"e5-mistral", "lasttoken", query=WEB_SEARCH + " "),
    Family(r"e5-(small|base|large)-instruct", "mean", query=WEB_SEARCH + " "),
    Family(r"e5-(small|base|large)", "mean", query="query: ", document="passage: "),
    Family(r"gte-qwen", "lasttoken", query=WEB_SEARCH + " "),
    Family(r"gte-(multilingual|modernbert|(base|large)-en-v1\.5)", "cls"),
    Family(r"gte-(small|base|large)", "mean"),
    Family(r"qwen3-embedding", "lasttoken", query=WEB_SEARCH),
)


def find_family(*names: str | None) -> Family | None:
    """The family of the first of `names` (ids or paths) that has one; a path's last parts count first."""
    for name in names:
        for part in reversed((name or "").casefold().split("/")):
            for family in FAMILIES:
                if re.search(family.names, part):
                    return family
    return None


def choose_prompts(own: dict[str, str], default: str | None, family: Family | None) -> dict[str, str]:
    """What to put before a query and before a document.

    own: the prompts of the model's files, where an empty one says nothing: the library adds those by itself.
    default: the one of them that goes before every text, if there is one.
    """
    said = {name: prompt for name, prompt in own.items() if prompt}
    documents = [said[name] for name in ("document", "passage", "corpus") if name in said]
    if documents or "query" in said:
        return {"query": said.get("query", ""), "document": documents[0] if documents else ""}
    if said or family is None:
        return {"query": default or "", "document": default or ""}
    return {"query": family.query, "document": family.document}


# ---- requests and responses ----------------------------------------------------------------------------


class Prompted(BaseModel):
    """What may be said about the text that goes before each text."""

    instruction: str | None = Field(
        None, description="Put before each text as it is; wins over the three other ways to say it"
    )
    input_type: Literal["query", "document"] = Field(
        "document", description="Which of the model's prompts goes before each text"
    )


class RetrievalRequest(Prompted, EmbedRequest):
    pass


class RetrievalResponse(EmbedResponse):
    pooling: str | None = Field(description="How token vectors became one: cls, mean, lasttoken")
    prompt: str = Field(description="What was put before each text")


class RetrievalEmbeddingsRequest(Prompted, EmbeddingsRequest):
    pass


class RerankFields(BaseModel):
    query: str = Field(min_length=1, description="What is looked for")
    documents: list[str | dict[str, Any]] = Field(
        min_length=1, max_length=MAX_TEXTS, description="Texts, or objects that have a `text`"
    )
    top_n: int | None = Field(None, ge=1, description="Return the best so many; unset: all")
    return_documents: bool = Field(False, description="Return each result's document too")
    raw_scores: bool = Field(
        False, description="A cross-encoder's scores as they are; false: between 0 and 1, by the sigmoid"
    )
    truncate: bool = Field(True, description="Cut documents that are too long; false: refuse them")

    @field_validator("documents", mode="before")
    @classmethod
    def _have_text(cls, value: Any) -> Any:
        for number, document in enumerate(value if isinstance(value, list) else ()):
            text = document.get("text") if isinstance(document, dict) else document
            if not isinstance(text, str):
                raise ValueError(f"number {number} is neither a text nor an object whose `text` is one")
        return value

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [document if isinstance(document, str) else document["text"] for document in self.documents]


class RerankRequest(RerankFields, Request):
    pass


class OpenAIRerankRequest(RerankFields, OpenAIRequest):
    model: str | None = Field(None, description="The served model's name")


class Ranked(BaseModel):
    index: int = Field(description="Which of `documents`, from 0")
    relevance_score: float = Field(description="Higher is better")
    document: dict[str, Any] | None = Field(
        exclude_if=lambda document: document is None,
        description="The object as it came, or `{text}`; only with `return_documents`",
    )


class RerankResponse(BaseModel):
    results: list[Ranked] = Field(description="The best first")
    model: str = Field(description="The model, as MODEL_NAME gives it")
    revision: str | None = Field(description="Its commit, where known")
    method: Literal["cross-encoder", "cosine"] = Field(
        description="Whether a reranker read each pair or embeddings were compared"
    )
    truncated: int = Field(description="How many documents were cut to the model's length")
    usage: Usage


# ---- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """Query and document, on their way through the engine."""

    tokens: tuple[int, ...]
    second: int  # where the document begins
    truncated: bool


class Reranker:
    """A cross-encoder that tokenizes beside the engine and batches across jobs.

    Gives what sentence-transformers' `CrossEncoder.predict` gives without an activation.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, budget: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        if "roberta" in model.config.model_type:
            positions -= model.config.pad_token_id + 1  # RoBERTa's first positions are the padding's
        self.max_tokens: int = min(tokenizer.model_max_length, positions)
        pair = tokenizer("a", "a")
        ids, owners = pair["input_ids"], pair.sequence_ids(0)
        self._before = ids[: owners.index(0)]
        self._between = [ids[i] for i in range(owners.index(0), owners.index(1)) if owners[i] is None]
        self._after = ids[len(owners) - owners[::-1].index(1) :]
        self._has_types = 1 in pair.get("token_type_ids", ())
        self._threads = parallel_batches(model.device)
        self._batcher: DynamicBatcher[Pair, float] = DynamicBatcher(
            self._run, budget=budget, length=lambda pair: len(pair.tokens), threads=self._threads
        )

    def tokenize(self, query: str, documents: Sequence[str], *, truncate: bool) -> list[Pair]:
        """Raises JobError for what is no Unicode, a query that leaves no room or is too long for so many
        documents, and a long document where `truncate` is false.
        """
        check_unicode([query], "query")
        check_unicode(documents, "documents")
        check_repeated(query, len(documents), "query")
        start = [*self._before, *plain_ids(self.tokenizer, [query])[0], *self._between]
        room = self.max_tokens - len(start) - len(self._after)
        if room < 1:
            raise query_too_long(self.max_tokens)
        pairs = []
        for number, ids in enumerate(plain_ids(self.tokenizer, documents)):
            if len(ids) > room and not truncate:
                where, length = f"documents.{number}", len(ids) + self.max_tokens - room
                raise JobError(
                    f"{where}: {length} tokens with the query, and the model takes {self.max_tokens}. "
                    "Shorten the document, or set truncate to true to have it cut.",
                    param=where,
                    code="too_long",
                )
            tokens = (*start, *ids[:room], *self._after)
            pairs.append(Pair(tokens, len(start), len(ids) > room))
        return pairs

    async def score(self, pairs: Sequence[Pair]) -> list[float]:
        return await self._batcher.submit(pairs)

    def _run(self, pairs: list[Pair]) -> list[float]:
        """One forward pass, on an engine thread."""
        import torch

        share_cores(self._threads, self._batcher.running)
        left = self.tokenizer.padding_side == "left"
        ids, mask = padded([pair.tokens for pair in pairs], value=self.tokenizer.pad_token_id or 0, left=left)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._has_types:
            types = [[0] * pair.second + [1] * (len(pair.tokens) - pair.second) for pair in pairs]
            inputs["token_type_ids"] = padded(types, value=0, left=left)[0]
        with torch.inference_mode():
            logits = self.model(**{name: rows.to(self.model.device) for name, rows in inputs.items()}).logits
        scores: list[float] = logits[:, 0].float().tolist()
        return scores


@dataclass(frozen=True)
class Loaded:
    model: Encoder | Reranker
    name: str
    served: tuple[str, ...]
    revision: str | None
    pooling: str | None = None

    @property
    def encoder(self) -> Encoder:
        """Raises JobError(code="no_embeddings") when the model is a reranker."""
        if isinstance(self.model, Encoder):
            return self.model
        raise JobError(
            f"{self.name} is a reranker, which gives no embeddings. Send query and documents, or use an "
            "embedding model.",
            code="no_embeddings",
        )


def load(settings: Settings) -> Loaded:
    name = settings.model_name
    found = prewarm.resolve(settings, name)
    served = tuple(dict.fromkeys([settings.public_name, name, name.rpartition("/")[2]]))
    if is_cross_encoder(found.path, name):
        return Loaded(load_reranker(settings, found.path), settings.public_name, served, found.revision)
    encoder = load_encoder(settings, found, budget=settings.max_batch_tokens)
    family = find_family(settings.served_model_name, name)
    encoder.prompts |= choose_prompts(encoder.prompts, encoder.default_prompt, family)
    pools = [part for part in encoder.model if hasattr(part, "pooling_mode")]
    if family and pools and not (found.path / "modules.json").exists():
        pools[0].pooling_mode = family.pooling
    pooling = pools[0].pooling_mode if pools else None
    pooling = pooling if pooling is None or isinstance(pooling, str) else "+".join(pooling)
    return Loaded(encoder, settings.public_name, served, found.revision, pooling)


def is_cross_encoder(folder: Path, name: str) -> bool:
    """Whether config.json tells of a classifier with one label.

    Raises StartError(code="unsupported_model") for other classifiers, and for rerankers of another kind: they
    would load as an embedding model and give nonsense.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    architecture = (config.get("architectures") or [""])[0]
    if architecture.endswith("ForCausalLM") and "rerank" in name.casefold():
        raise StartError(
            f"{name} ranks by a language model's next word, which is not served here. Use a reranker with a "
            "classifier of one label, such as BAAI/bge-reranker-v2-m3.",
            code="unsupported_model",
        )
    if not architecture.endswith("ForSequenceClassification"):
        return False
    labels = config.get("num_labels") or len(config.get("id2label") or (0, 1))
    if labels != 1:
        raise StartError(
            f"{name}: a classifier with {labels} labels neither embeds nor ranks. A reranker has one.",
            code="unsupported_model",
        )
    return True


def load_reranker(settings: Settings, folder: Path) -> Reranker:
    with prewarm.phase("import"):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    with prewarm.phase("load") as phase:
        device, dtype = pick_device(settings)
        options: dict[str, Any] = {
            "trust_remote_code": settings.trust_remote_code,
            "local_files_only": True,
        }
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, **options)
        model = model.to(device).eval()
        phase.bytes = sum(weight.nbytes for weight in model.parameters())
    return Reranker(model, tokenizer, budget=batch_tokens(device, settings.max_batch_tokens))


engine: Loaded


# ---- handle --------------------------------------------------------------------------------------------


@job_handler(
    RetrievalRequest,
    RerankRequest,
    routes={
        "/v1/embeddings": RetrievalEmbeddingsRequest,
        "/v1/rerank": OpenAIRerankRequest,
        "/v1/models": ModelsRequest,
    },
)
async def handler(
    request: RetrievalRequest
    | RerankRequest
    | RetrievalEmbeddingsRequest
    | OpenAIRerankRequest
    | ModelsRequest,
) -> RetrievalResponse | EmbeddingsResponse | RerankResponse | ModelList:
    if isinstance(request, ModelsRequest):
        return openai_api.model_list(engine.name)
    if isinstance(request, RetrievalRequest):
        return await embed(request, engine)
    if isinstance(request, RerankRequest):
        return await rerank(request, engine)
    openai_api.check_model(request.model, *engine.served)
    if isinstance(request, OpenAIRerankRequest):
        return await rerank(request, engine)
    prompt = prompt_for(request, engine.encoder, len(request.input))
    return await answer_openai(engine.encoder, request, prompt=prompt, model=engine.name)


def prompt_for(request: Prompted, encoder: Encoder, texts: int) -> str:
    """What goes before each of so many texts."""
    if request.instruction is not None:
        check_unicode([request.instruction], "instruction")
        check_repeated(request.instruction, texts, "instruction")
        return request.instruction
    if isinstance(request, RetrievalRequest) and (request.prompt, request.prompt_name) != (None, None):
        return encoder.prompt_for(request.prompt, request.prompt_name)
    return encoder.prompts[request.input_type]


async def embed(request: RetrievalRequest, engine: Loaded) -> RetrievalResponse:
    prompt = prompt_for(request, engine.encoder, len(request.texts or ()) or 1)
    fields = await answer(engine.encoder, request, prompt=prompt, model=engine.name, revision=engine.revision)
    return RetrievalResponse.model_construct(**fields, pooling=engine.pooling, prompt=prompt)


async def rerank(request: RerankFields, engine: Loaded) -> RerankResponse:
    if isinstance(engine.model, Reranker):
        scored = await score_pairs(request, engine.model)
    else:
        scored = await score_cosine(request, engine.model)
    order = sorted(range(len(scored.scores)), key=lambda index: -scored.scores[index])
    return RerankResponse(
        results=[
            Ranked(
                index=index,
                relevance_score=scored.scores[index],
                document=as_object(request.documents[index]) if request.return_documents else None,
            )
            for index in order[: request.top_n]
        ],
        model=engine.name,
        revision=engine.revision,
        method="cross-encoder" if isinstance(engine.model, Reranker) else "cosine",
        truncated=scored.truncated,
        usage=Usage(prompt_tokens=scored.tokens, total_tokens=scored.tokens),
    )


@dataclass(frozen=True)
class Scored:
    scores: list[float]  # one for each document
    tokens: int
    truncated: int


async def score_pairs(request: RerankFields, reranker: Reranker) -> Scored:
    pairs = await asyncio.to_thread(
        reranker.tokenize, request.query, request.texts, truncate=request.truncate
    )
    scores = await reranker.score(pairs)
    if not request.raw_scores:
        scores = [sigmoid(score) for score in scores]
    return Scored(scores, sum(len(pair.tokens) for pair in pairs), sum(pair.truncated for pair in pairs))


async def score_cosine(request: RerankFields, encoder: Encoder) -> Scored:
    def tokenize() -> list[Text]:
        prompts, documents = encoder.prompts, request.texts
        query = encoder.tokenize([request.query], prompt=prompts["query"], truncate=True, param="query")
        if query[0].truncated:
            raise query_too_long(encoder.max_tokens)
        return query + encoder.tokenize(
            documents, prompt=prompts["document"], truncate=request.truncate, param="documents"
        )

    texts = await asyncio.to_thread(tokenize)
    rows = truncate_and_normalize(await encoder.encode(texts), dimensions=None, normalize=True)
    tokens, truncated = sum(len(text.tokens) for text in texts), sum(text.truncated for text in texts)
    return Scored((rows[1:] @ rows[0]).tolist(), tokens, truncated)


def query_too_long(limit: int | None) -> JobError:
    return JobError(
        f"query: as long as all that the model takes, {limit} tokens. Shorten it: only documents are cut.",
        param="query",
        code="too_long",
    )


def sigmoid(score: float) -> float:
    return 0.0 if score < -700 else 1 / (1 + math.exp(-score))


def as_object(document: str | dict[str, Any]) -> dict[str, Any]:
    return {"text": document} if isinstance(document, str) else document


# ---- start ---------------------------------------------------------------------------------------------


def prepare() -> dict[str, Any]:
    global engine
    settings = read_settings(Settings)
    engine = load(settings)
    if settings.prewarm:
        # The shapes that matter: a lone short text, and a batch of texts as long as most models take them.
        short, long = "warm", ["warm " * 600] * 4
        if isinstance(engine.model, Reranker):
            requests = [{"query": short, "documents": documents} for documents in ([short], long)]
        else:
            requests = [{"texts": texts} for texts in ([short], long)]
        prewarm.run(handler, requests)
    return start_config(handler, settings)


def main() -> None:
    config = startup.run(prepare, worker="bge")
    import runpod

    runpod.serverless.start(config)


if __name__ == "__main__":
    main()
