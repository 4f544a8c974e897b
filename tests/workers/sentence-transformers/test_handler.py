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
from openai import OpenAI

from local import running
from tests.helpers import error, error_of, openai, send
from tools.models import local_env
from tools.workers import ROOT, load_handler

pytestmark = pytest.mark.engine

MIXED = [" ".join(f"word{i % 7} and" for i in range(length)) for length in (3, 90, 1, 40, 7, 120, 2, 15)]


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    """The handler's module with the real model loaded, as `prepare()` leaves it."""
    module = load_handler("sentence-transformers")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in local_env("sentence-transformers").items():
            patch.setenv(name, value)
        module.prepare()
    return module


@pytest.fixture
def handler(worker: ModuleType) -> Any:
    return worker.handler


# ---- the contract --------------------------------------------------------------------------------------


async def test_the_answer_has_model_counts_and_usage(handler: Any) -> None:
    answer = await send(handler, texts=["one two three", "one " * 400])
    assert {key: value for key, value in answer.items() if key != "embeddings"} == {
        "model": "all-MiniLM-L6-v2",
        "revision": None,
        "dimensions": 384,
        "count": 2,
        "truncated": 1,
        "usage": {"prompt_tokens": 5 + 256, "total_tokens": 5 + 256},
    }


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
    answer = await send(handler, **payload)
    assert answer["count"] == 1
    np.testing.assert_allclose(
        answer["embeddings"], (await send(handler, texts=["a"]))["embeddings"], atol=1e-5
    )


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
        ({"text": "a", "batch_size": 0}, "batch_size"),
        ({"text": "a", "batch_size": 1025}, "batch_size"),
        ({"text": "a", "dimensions": 0}, "dimensions"),
        ({"text": "a", "dimensions": 385}, "dimensions"),
        ({"text": "a", "normalize": 1}, "normalize"),
        ({"text": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"text": "a", "prompt_name": "nothing"}, "prompt_name"),
        ({"text": "a", "prompt": "p", "prompt_name": "query"}, "prompt"),
        ({"texts": ["a"] * 16385}, "texts"),
        ({"text": "a", "textes": []}, "textes"),
    ],
)
async def test_a_wrong_field_is_named(handler: Any, payload: dict[str, Any], param: str) -> None:
    assert (await error(handler, **payload))["param"] == param


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


async def test_the_openai_route_has_openais_exact_shape(handler: Any) -> None:
    answer = await openai(
        handler, "/v1/embeddings", input=["a b", "c"], model="all-minilm-l6-v2", user="u", extra=1
    )
    assert set(answer) == {"object", "data", "model", "usage"}
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [(set(row), row["object"], row["index"]) for row in answer["data"]] == [
        ({"object", "embedding", "index"}, "embedding", 0),
        ({"object", "embedding", "index"}, "embedding", 1),
    ]
    native = await send(handler, texts=["a b", "c"])
    np.testing.assert_allclose([row["embedding"] for row in answer["data"]], native["embeddings"], atol=1e-5)


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


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "input", "missing_field"),
        ({"input": ""}, "input", "invalid_value"),
        ({"input": []}, "input", "invalid_value"),
        ({"input": ["a", ""]}, "input", "invalid_value"),
        ({"input": ["a", 1]}, "input", "invalid_value"),
        ({"input": [[]]}, "input", "invalid_value"),
        ({"input": [True]}, "input", "invalid_value"),
        ({"input": {"a": 1}}, "input", "invalid_value"),
        ({"input": None}, "input", "missing_field"),
        ({"input": [1, 2]}, "input", "unsupported"),
        ({"input": [[1], [2]]}, "input", "unsupported"),
        ({"input": "a", "model": "gpt-4"}, "model", "model_not_found"),
        ({"input": "a", "dimensions": 9999}, "dimensions", "invalid_value"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
    ],
)
async def test_a_wrong_openai_body_is_named(
    handler: Any, body: dict[str, Any], param: str, code: str
) -> None:
    problem = error_of(await openai(handler, "/v1/embeddings", **body))
    assert (problem["param"], problem["code"], problem["type"]) == (param, code, "invalid_request_error")


# ---- as a process, with the unmodified SDK --------------------------------------------------------------


def test_make_run_shows_embeddings_and_ends_well() -> None:
    proxy = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-m", "tools.demo"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("RUNPOD_")} | proxy,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for part in ("Cold start", "384 dimensions", "1.00", "by the openai client", "It works."):
        assert part in done.stdout


def test_a_model_that_does_not_exist_is_reported_to_every_job() -> None:
    with running("sentence-transformers", env={"MODEL_NAME": "/no/such/folder"}) as platform:
        client = OpenAI(base_url=platform.openai_url, api_key="local", max_retries=0)
        for _ in range(2):
            problem = client.models.with_raw_response.list().http_response.json()["error"]
            assert problem["code"] == "model_not_found"
            assert "/no/such/folder" in problem["message"]
        assert len(platform.workers) == 1, "no crash loop"
