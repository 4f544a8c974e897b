"""Settings, requests and responses of this worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

from serving.embedding.schemas import (
    MAX_INPUTS,
    EmbeddingSettings,
    EmbeddingsRequest,
    EmbeddingsResponse,
    EmbedRequest,
    EmbedResponse,
    Usage,
)
from shared.openai import ModelList, ModelsRequest, OpenAIRequest
from shared.requests import Request
from shared.results import JSON


class Settings(EmbeddingSettings):
    model_name: str = Field(
        "BAAI/bge-large-en-v1.5",
        description="Id on the Hugging Face Hub, or a folder, of an embedding model or a reranker",
    )


# ---- embedding -----------------------------------------------------------------------------------------


class PromptFields(BaseModel):
    """What chooses the prompt, the text that goes before each text."""

    instruction: str | None = Field(
        None, description="Put before each text unchanged; takes precedence over the other prompt fields"
    )
    input_type: Literal["query", "document"] = Field(
        "document", description="Which of the model's prompts goes before each text"
    )


class RetrievalRequest(PromptFields, EmbedRequest):
    pass


class RetrievalResponse(EmbedResponse):
    pooling: str | None = Field(description="How token vectors became one: cls, mean, lasttoken")
    prompt: str = Field(description="What was put before each text")


class RetrievalEmbeddingsRequest(PromptFields, EmbeddingsRequest):
    pass


# ---- reranking -----------------------------------------------------------------------------------------


class RerankFields(BaseModel):
    query: str = Field(min_length=1, description="The query that documents are ranked by")
    documents: list[str | dict[str, Any]] = Field(
        min_length=1, max_length=MAX_INPUTS, description="Texts, or objects that have a `text`"
    )
    top_n: int | None = Field(None, ge=1, description="Return only this many results, the best; unset: all")
    return_documents: bool = Field(False, description="Return each result's document too")
    raw_scores: bool = Field(
        False, description="A cross-encoder's logits as scores; false: their sigmoid, between 0 and 1"
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

    def rank(self, scores: Sequence[float]) -> list[RankedDocument]:
        """The best `top_n` documents, the best first. scores: one for each document."""
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: self.top_n]
        return [
            RankedDocument(index=index, relevance_score=scores[index], document=self._returned(index))
            for index in order
        ]

    def _returned(self, index: int) -> dict[str, Any] | None:
        if not self.return_documents:
            return None
        document = self.documents[index]
        return {"text": document} if isinstance(document, str) else document


class RerankRequest(RerankFields, Request):
    pass


class OpenAIRerankRequest(RerankFields, OpenAIRequest):
    model: str | None = Field(None, description="The served model's name")


class CohereRerankRequest(OpenAIRerankRequest):
    """The body of POST /v2/rerank."""


class RankedDocument(BaseModel):
    index: int = Field(description="Which of `documents`, from 0")
    relevance_score: float = Field(description="Higher is better")
    document: dict[str, Any] | None = Field(
        exclude_if=lambda document: document is None,
        description="The object as it was sent, or `{text}`; only with `return_documents`",
    )


class RerankResponse(BaseModel):
    results: list[RankedDocument] = Field(description="The best first")
    model: str = Field(description="The model, as MODEL_NAME gives it")
    revision: str | None = Field(description="Its commit, where known")
    method: Literal["cross-encoder", "cosine"] = Field(
        description="Whether a reranker read each pair or embeddings were compared"
    )
    truncated: int = Field(description="How many documents were cut to the model's length")
    usage: Usage = Field(description="Counts of tokens")


class CohereRerankResponse(RerankResponse):
    """The answer of /v2/rerank: what Cohere's has, and the fields of this worker."""

    id: str = Field(description="The id of the job or request")
    meta: dict[str, Any] = Field(description="The version of the API")


RetrievalCall = (
    RetrievalRequest | RerankRequest | RetrievalEmbeddingsRequest | OpenAIRerankRequest | ModelsRequest
)
Answer = RetrievalResponse | EmbeddingsResponse | RerankResponse | ModelList
ROUTES: dict[str, type[BaseModel]] = {
    "/v1/embeddings": RetrievalEmbeddingsRequest,
    "/v1/rerank": OpenAIRerankRequest,
    "/v2/rerank": CohereRerankRequest,
    "/v1/models": ModelsRequest,
}
ANSWERS: dict[type[BaseModel], dict[str, Any]] = {
    RetrievalRequest: {JSON: RetrievalResponse},
    RerankRequest: {JSON: RerankResponse},
    RetrievalEmbeddingsRequest: {JSON: EmbeddingsResponse},
    OpenAIRerankRequest: {JSON: RerankResponse},
    CohereRerankRequest: {JSON: CohereRerankResponse},
}
