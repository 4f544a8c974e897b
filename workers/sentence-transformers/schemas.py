"""The settings of this worker. Its requests and responses are those of every embedding worker."""

from __future__ import annotations

from pydantic import Field

from serving.embedding.schemas import (
    EmbeddingSettings,
    EmbeddingsRequest,
    EmbeddingsResponse,
    EmbedRequest,
    EmbedResponse,
)

__all__ = ["EmbedRequest", "EmbedResponse", "EmbeddingsRequest", "EmbeddingsResponse", "Settings"]


class Settings(EmbeddingSettings):
    model_name: str = Field("all-MiniLM-L6-v2", description="Model id on the Hugging Face Hub, or a folder")
