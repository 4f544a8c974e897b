"""The worker template-worker, its handler called as the SDK calls it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import error, send
from tools.models import local_env
from tools.workers import ROOT, load_handler

worker = load_handler("template-worker")
EXAMPLE = json.loads((ROOT / "workers/template-worker/test_input.json").read_text())["input"]


# A worker that loads a model is marked: `pytestmark = pytest.mark.engine`.


@pytest.fixture(autouse=True, scope="module")
def _prepared() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in local_env("template-worker").items():
            patch.setenv(name, value)
        worker.prepare()
        yield


async def test_example() -> None:
    expected = {"words": 11, "sentences": 2, "longest": "mankind", "model": "word-count"}
    assert await send(worker.handler, **EXAMPLE) == expected


async def test_jobs_that_wait_together_get_their_own_answers() -> None:
    texts = ["a bb ccc " * number for number in range(1, 9)]
    answers = await asyncio.gather(*(send(worker.handler, text=text, min_letters=2) for text in texts))
    assert [answer["words"] for answer in answers] == [2 * number for number in range(1, 9)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "text"),
        ({"text": ""}, "text"),
        ({"text": "a", "min_letters": 0}, "min_letters"),
        ({"text": "a", "txt": "a"}, "txt"),
    ],
)
async def test_wrong_requests_name_the_field(fields: dict[str, Any], param: str) -> None:
    problem = await error(worker.handler, **fields)
    assert problem["param"] == param
    assert param in problem["message"]
