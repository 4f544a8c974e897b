"""The Reranker without a job."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import CrossEncoder

from shared.errors import JobError
from tools.workers import load_module

reranker = load_module("bge", "reranker")

QUERY = "what is the capital of france?"
LONG = "panda " * 300
DOCUMENTS = [
    "the giant panda eats bamboo",
    "paris is the capital and largest city of france",
    "query",
    "",
    LONG,
]


@pytest.fixture(scope="module", params=["rank-bert", "bge-reranker-base"])
def folder(models: Path, request: pytest.FixtureRequest) -> Path:
    return models / str(request.param)


def predicted(folder: Path, query: str, documents: list[str]) -> list[float]:
    """The scores that sentence-transformers gives, one pair at a time."""
    model = CrossEncoder(str(folder), device="cpu", activation_fn=torch.nn.Identity())
    return [float(model.predict([(query, text)], show_progress_bar=False)[0]) for text in documents]


@pytest.mark.engine
async def test_scores_are_the_librarys(folder: Path) -> None:
    model = reranker.load_reranker(folder)
    expected = predicted(folder, QUERY, DOCUMENTS)
    assert max(expected) - min(expected) > 0.1, "scores that hardly differ would prove nothing"
    scores = await model.score(QUERY, DOCUMENTS, raw_scores=True)
    assert scores.values == pytest.approx(expected, abs=1e-5)
    assert scores.truncated == 1
    alone = await asyncio.gather(*(model.score(QUERY, [text]) for text in DOCUMENTS))
    assert [one.values[0] for one in alone] == pytest.approx(list(map(reranker.sigmoid, expected)), abs=1e-5)
    assert sum(one.prompt_tokens for one in alone) == scores.prompt_tokens


@pytest.mark.engine
async def test_a_score_that_is_not_finite_is_an_error(models: Path) -> None:
    def break_logits(_: Any, __: Any, output: Any) -> None:
        output.logits.fill_(math.nan)

    model = reranker.load_reranker(models / "rank-bert")
    model.model.register_forward_hook(break_logits)
    with pytest.raises(JobError) as caught:
        await model.score("q", ["a"])
    assert caught.value.code == "not_finite"


def test_sigmoid_takes_any_score() -> None:
    assert reranker.sigmoid(0) == 0.5
    assert reranker.sigmoid(-1e30) == 0
    assert reranker.sigmoid(1e30) == 1
    assert reranker.sigmoid(2) == pytest.approx(1 - reranker.sigmoid(-2))
