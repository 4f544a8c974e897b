"""OpenAI's objects as inference servers give them, for /openapi.json. They may have more fields."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int | None = None
    total_tokens: int


class Message(BaseModel):
    role: str
    content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(BaseModel):
    index: int
    message: Message
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None


class ChunkChoice(BaseModel):
    index: int
    delta: dict[str, Any]
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class Generated(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage | None = None


class ChatCompletion(Generated):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ChatCompletionChunk(Generated):
    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]


class Completion(Generated):
    """A response of /v1/completions, and each chunk of a streamed one."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
