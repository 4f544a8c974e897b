"""The worker template-worker, its handler called as the SDK calls it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tools.workers import ROOT, load_handler

worker = load_handler("template-worker")
EXAMPLE = json.loads((ROOT / "workers/template-worker/test_input.json").read_text())


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "engine", worker.load(worker.Settings()), raising=False)


async def answer(**fields: Any) -> Any:
    return await worker.handler({"id": "test", "input": fields})


async def test_example() -> None:
    result = await answer(**EXAMPLE["input"])
    assert result == {"words": 11, "sentences": 2, "longest": "mankind", "model": "word-count"}


async def test_bounds() -> None:
    assert (await answer(text="a bb ccc", min_letters=2))["words"] == 2
    assert (await answer(text="...", min_letters=2))["longest"] is None


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
    error = json.loads((await answer(**fields))["error"])
    assert error["param"] == param
    assert param in error["message"]
