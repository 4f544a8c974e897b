"""The settings, requests and responses of this worker. Imports no model library."""

from __future__ import annotations

from pydantic import BaseModel, Field

from shared.requests import Request
from shared.settings import WorkerSettings


class Settings(WorkerSettings):
    model_name: str = Field("word-count", description="Model id on the Hugging Face Hub, or a folder")
    max_batch_characters: int = Field(100_000, ge=1, description="Characters in one batch")


class CountRequest(Request):
    text: str = Field(min_length=1, max_length=100_000, description="The text")
    min_letters: int = Field(1, ge=1, le=100, description="Count words of at least this many letters")


class CountResponse(BaseModel):
    words: int = Field(description="Number of words")
    sentences: int = Field(description="Number of sentences")
    longest: str | None = Field(description="The first of the longest words, null when there is none")
    model: str = Field(description="The model, as MODEL_NAME gives it")
