"""vLLM's answers, for /openapi.json. They may have more fields than these."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from serving.engine_server.openai_objects import ChatCompletion, ChatCompletionChunk, Completion, Usage
from shared.results import EVENTS, JSON

from .schemas import ROUTES, GenerateRequest, RouteRequest


class Vector(BaseModel):
    index: int
    object: Literal["embedding"]
    embedding: list[float] | str


class Embeddings(BaseModel):
    object: Literal["list"]
    model: str | None
    data: list[Vector]
    usage: Usage


class RankedDocument(BaseModel):
    index: int
    relevance_score: float
    document: dict[str, Any]


class Ranking(BaseModel):
    id: str
    model: str
    results: list[RankedDocument]
    usage: Usage


class Score(BaseModel):
    index: int
    score: float


class Scores(BaseModel):
    object: Literal["list"]
    model: str
    data: list[Score]
    usage: Usage


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class Text(BaseModel):
    prompt: str


class ResponseObject(BaseModel):
    """OpenAI's, of /v1/responses."""

    id: str
    object: Literal["response"]
    model: str
    status: str
    output: list[dict[str, Any]]


class Message(BaseModel):
    """Anthropic's, of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None = None


class TokenCount(BaseModel):
    input_tokens: int


Event = dict[str, Any]
_BY_PATH: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {JSON: ChatCompletion, EVENTS: ChatCompletionChunk},
    "/v1/completions": {JSON: Completion, EVENTS: Completion},
    "/v1/embeddings": {JSON: Embeddings},
    "/v1/responses": {JSON: ResponseObject, EVENTS: Event},
    "/v1/messages": {JSON: Message, EVENTS: Event},
    "/v1/messages/count_tokens": {JSON: TokenCount},
    "/v1/rerank": {JSON: Ranking},
    "/rerank": {JSON: Ranking},
    "/v1/score": {JSON: Scores},
    "/score": {JSON: Scores},
    "/v1/tokenize": {JSON: Tokens},
    "/tokenize": {JSON: Tokens},
    "/v1/detokenize": {JSON: Text},
    "/detokenize": {JSON: Text},
}
_GENERATED = {JSON: ChatCompletion | Completion, EVENTS: ChatCompletionChunk | Completion}
ANSWERS: dict[type[BaseModel], dict[str, Any]] = {
    **{ROUTES[path]: answers for path, answers in _BY_PATH.items()},
    GenerateRequest: _GENERATED,
    RouteRequest: {JSON: dict[str, Any], EVENTS: Event},
}
