"""The settings of this worker. Its requests and responses are those of every embedding worker."""

from __future__ import annotations

from pydantic import Field

from serving.embedding.schemas import EmbeddingsRequest, EmbeddingsResponse, EmbedRequest, EmbedResponse
from shared.settings import WorkerSettings

__all__ = ["EmbedRequest", "EmbedResponse", "EmbeddingsRequest", "EmbeddingsResponse", "Settings"]


class Settings(WorkerSettings):
    model_name: str = Field("all-MiniLM-L6-v2", description="Model id on the Hugging Face Hub, or a folder")
    max_concurrency: int = Field(
        128, ge=1, le=1024, description="Jobs that one worker takes at a time; constant while it lives"
    )
    max_batch_tokens: int | None = Field(
        None, ge=1, description="Tokens in one padded batch; unset: 16384 on a GPU, 1024 on CPU"
    )
