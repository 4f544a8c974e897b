"""The embeddings worker with the real all-MiniLM-L6-v2; see also tests/serving/embedding."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.helpers import error, error_of, openai, send
from tools.models import real_env
from tools.workers import ROOT, load_handler

pytestmark = pytest.mark.engine

MIXED = [" ".join(f"word{i % 7} and" for i in range(length)) for length in (3, 90, 1, 40, 7, 120, 2, 15)]


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    """The handler's module with the real model loaded, as `prepare()` leaves it."""
    module = load_handler("sentence-transformers")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in real_env("sentence-transformers").items():
            patch.setenv(name, value)
        module.prepare()
    return module


@pytest.fixture
def handler(worker: ModuleType) -> Any:
    return worker.handler


# ---- the contract --------------------------------------------------------------------------------------


async def test_the_answer_has_model_counts_and_usage(handler: Any) -> None:
    answer = await send(handler, texts=["one two three", "one " * 400])
    assert len(answer.pop("embeddings")) == 2
    assert answer == {
        "model": "all-MiniLM-L6-v2", "revision": None, "dimensions": 384, "count": 2, "truncated": 1,
        "usage": {"prompt_tokens": 5 + 256, "total_tokens": 5 + 256},
    }  # fmt: skip


@pytest.mark.parametrize(
    "payload",
    [
        {"texts": ["a"]},
        {"texts": "a"},
        {"text": "a"},
        {"texts": [], "text": "a"},
        {"texts": None, "text": "a"},
        {"texts": ["a"], "text": "ignored, as it always was"},
        {"texts": ["a"], "batch_size": 32, "normalize": True},
        {"text": "a", **dict.fromkeys(["texts", "normalize", "encoding_format", "truncate", "prompt"])},
    ],
)
async def test_every_form_of_a_lone_text_gives_the_same_embedding(
    handler: Any, payload: dict[str, Any]
) -> None:
    answer, same = await send(handler, **payload), await send(handler, texts=["a"])
    assert answer["count"] == 1
    np.testing.assert_allclose(answer["embeddings"], same["embeddings"], atol=1e-5)


async def test_an_empty_text_is_a_text(handler: Any) -> None:
    for payload in ({"text": ""}, {"texts": ""}, {"texts": [""]}):
        answer = await send(handler, **payload)
        assert np.linalg.norm(answer["embeddings"][0]) == pytest.approx(1)
        assert answer["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    ("payload", "param"),
    [
        ({}, "texts"),
        ({"texts": []}, "texts"),
        ({"texts": None}, "texts"),
        ({"text": None}, "texts"),
        ({"texts": ["a", None]}, "texts.1"),
        ({"texts": {"a": 1}}, "texts"),
        ({"text": "a", "prompt": "p", "prompt_name": "query"}, "prompt"),
        ({"texts": ["a"] * 16385}, "texts"),
    ],
)
async def test_wrong_texts_are_named(handler: Any, payload: dict[str, Any], param: str) -> None:
    assert (await error(handler, **payload))["param"] == param


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0), ("batch_size", 1025), ("dimensions", 0), ("dimensions", 385), ("normalize", 1),
        ("encoding_format", "hex"), ("prompt_name", "nothing"), ("textes", []),
    ],
)  # fmt: skip
async def test_a_wrong_field_is_named(handler: Any, field: str, value: Any) -> None:
    assert (await error(handler, text="a", **{field: value}))["param"] == field


async def test_a_text_too_long_is_cut_and_counted_or_refused(handler: Any) -> None:
    long = "word " * 400
    assert (await send(handler, texts=["a", long]))["truncated"] == 1
    problem = await error(handler, texts=["a", long], truncate=False)
    assert (problem["param"], problem["code"]) == ("texts.1", "too_long")
    assert "402 tokens" in problem["message"]
    assert "256" in problem["message"]
    assert (await error(handler, text=long, truncate=False))["param"] == "text"
    assert (await send(handler, text="word " * 254, truncate=False))["truncated"] == 0


async def test_options_reach_the_encoder(handler: Any) -> None:
    full = np.array((await send(handler, texts=MIXED, batch_size=3))["embeddings"])
    plain = await send(handler, texts=MIXED, dimensions=64, normalize=False)
    np.testing.assert_allclose(plain["embeddings"], full[:, :64], atol=1e-5)
    answer = await send(handler, texts=MIXED, dimensions=64)
    assert answer["dimensions"] == 64
    expected = full[:, :64] / np.linalg.norm(full[:, :64], axis=1, keepdims=True)
    np.testing.assert_allclose(answer["embeddings"], expected, atol=1e-5)


async def test_a_result_that_cannot_be_returned_is_refused_before_the_work(
    worker: ModuleType, handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.engine.encoder, "tokenize", lambda *a, **k: pytest.fail("it began the work"))
    problem = error_of(await send(handler, texts=["a"] * 10_000))
    assert problem["code"] == "result_too_large"
    assert "base64" in problem["message"]
    assert "10 MB" in problem["message"]


# ---- OpenAI --------------------------------------------------------------------------------------------


@pytest.fixture
def accepting(worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "engine", replace(worker.engine, accept_token_ids=True))


@pytest.mark.usefixtures("accepting")
async def test_token_arrays_mean_the_text_that_they_are(worker: ModuleType, handler: Any) -> None:
    tokenizer = worker.engine.encoder.model.tokenizer
    expected = (await openai(handler, "/v1/embeddings", input="hello brave world"))["data"][0]["embedding"]
    for special in (True, False):
        ids = tokenizer("hello brave world", add_special_tokens=special)["input_ids"]
        for value in (ids, [ids], [ids, [101, 102]]):
            answer = await openai(handler, "/v1/embeddings", input=value)
            np.testing.assert_allclose(answer["data"][0]["embedding"], expected, atol=1e-5)
            assert answer["usage"]["prompt_tokens"] == (7 if len(value) == 2 else 5)
    for value, param in (([1, 30522], "input"), ([-1], "input"), ([[1], [30522]], "input.1")):
        problem = error_of(await openai(handler, "/v1/embeddings", input=value))
        assert (problem["param"], problem["code"]) == (param, "invalid_value")


@pytest.mark.parametrize("texts", ["", [], ["a", ""], ["a", 1], [[]], [True], {"a": 1}, None], ids=str)
async def test_a_wrong_openai_input_is_named(handler: Any, texts: Any) -> None:
    problem = error_of(await openai(handler, "/v1/embeddings", input=texts))
    code = "missing_field" if texts is None else "invalid_value"
    assert (problem["param"], problem["code"], problem["type"]) == ("input", code, "invalid_request_error")


# ---- as a process, with the unmodified SDK --------------------------------------------------------------


def test_make_run_shows_embeddings_and_ends_well() -> None:
    proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    env = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")} | proxy
    done = subprocess.run(
        [sys.executable, "-m", "tools.demo"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for part in ("Cold start", "384 dimensions", "1.00", "by the openai client", "It works."):
        assert part in done.stdout
