"""Word counts of a text: a scaffold, to be replaced from top to bottom.

Request:  {"input": {"text": "One small step. One giant leap."}}
Response: {"words": 6, "sentences": 2, "longest": "small", "model": "word-count"}
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from shared import prewarm, startup
from shared.jobs import JSON, Job, job_handler
from shared.settings import read_settings

from .schemas import CountRequest, CountResponse, Settings

if TYPE_CHECKING:
    from .engine import Engine


# ---- load ----------------------------------------------------------------------------------------------

engine: Engine
model_name: str


def load(settings: Settings) -> Engine:
    # With a model: `model = startup.resolve(settings, settings.model_name)`, then load_engine(model.path).
    with startup.phase("import"):  # the engine's module imports torch, this one does not
        from .engine import load_engine
    with startup.phase("load"):
        return load_engine(max_batch_characters=settings.max_batch_characters)


# ---- handle --------------------------------------------------------------------------------------------


@job_handler(CountRequest, answers={CountRequest: {JSON: CountResponse}})
async def handler(request: CountRequest, job: Job) -> CountResponse:
    counts = await engine.count(request.text, min_letters=request.min_letters)
    return CountResponse(**asdict(counts), model=model_name)


# ---- start ---------------------------------------------------------------------------------------------


def prepare() -> Settings:
    global engine, model_name
    settings = read_settings(Settings)
    engine, model_name = load(settings), settings.public_name
    if settings.prewarm:
        prewarm.run(handler, [{"text": "warm"}])
    return settings


def main() -> None:
    startup.serve(handler, prepare, worker="template-worker")


if __name__ == "__main__":
    main()
