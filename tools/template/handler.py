"""Word counts of a text: a scaffold, to be replaced from top to bottom.

Request:  {"input": {"text": "One small step. One giant leap."}}
Response: {"words": 6, "sentences": 2, "longest": "small", "model": "word-count"}
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from pydantic import BaseModel, Field

from shared import prewarm, startup
from shared.jobs import Request, job_handler, start_config
from shared.settings import WorkerSettings, read_settings

# ---- settings ------------------------------------------------------------------------------------------


class Settings(WorkerSettings):
    model_name: str = Field("word-count", description="Model id on the Hugging Face Hub, or a folder")


# ---- requests and responses ----------------------------------------------------------------------------


class CountRequest(Request):
    text: str = Field(min_length=1, max_length=100_000, description="The text")
    min_letters: int = Field(1, ge=1, le=100, description="Count words of at least this many letters")


class CountResponse(BaseModel):
    words: int = Field(description="Number of words")
    sentences: int = Field(description="Number of sentences")
    longest: str | None = Field(description="The first of the longest words, null when there is none")
    model: str = Field(description="The model, as MODEL_NAME gives it")


# ---- load ----------------------------------------------------------------------------------------------


class Engine:
    """What holds the model. Tests put another in its place: `handler.engine = ...`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def count(self, request: CountRequest) -> CountResponse:
        words = [word for word in re.findall(r"[^\W\d_]+", request.text) if len(word) >= request.min_letters]
        sentences = re.findall(r"[^.!?]*\w[^.!?]*", request.text)
        longest = max(words, key=len, default=None)
        return CountResponse(words=len(words), sentences=len(sentences), longest=longest, model=self.name)


def load(settings: Settings) -> Engine:
    """Find the model, import its library (here and nowhere above), read the weights."""
    with prewarm.phase("load"):
        return Engine(settings.public_name)


engine: Engine


# ---- handle --------------------------------------------------------------------------------------------


@job_handler(CountRequest)
async def handler(request: CountRequest) -> CountResponse:
    # The model would block the event loop, and with it every other job. shared.batching runs jobs together.
    return await asyncio.to_thread(engine.count, request)


# ---- start ---------------------------------------------------------------------------------------------


def prepare() -> dict[str, Any]:
    global engine
    settings = read_settings(Settings)
    engine = load(settings)
    if settings.prewarm:
        prewarm.run(handler, [{"text": "warm"}])
    return start_config(handler, settings)


def main() -> None:
    config = startup.run(prepare, worker="template-worker")
    import runpod

    runpod.serverless.start(config)


if __name__ == "__main__":
    main()
