"""The embeddings worker with the real all-MiniLM-L6-v2 and with tiny models of other kinds."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import runpod
from openai import OpenAI

from local import Platform, running
from shared import jobs
from shared.embeddings import Encoder, shape, shortest, encode_vectors
from shared.errors import JobError
from tools.models import local_env, minilm
from tools.workers import ROOT, load_handler

pytestmark = pytest.mark.engine

# Each group's sentences mean nearly the same; no two groups have anything to do with each other.
GROUPS = [
    ("The cat is sleeping on the sofa.", "A cat naps on the couch."),
    ("How do I reset my password?", "I forgot my password and need a new one."),
    ("The stock market fell sharply today.", "Shares dropped a lot this afternoon."),
    ("She plays the violin in an orchestra.", "The violinist performs with a symphony."),
    ("It will rain heavily tomorrow.", "Heavy showers are forecast for the next day."),
    ("The train to Berlin leaves at nine.", "At 9 o'clock the Berlin train departs."),
]
MIXED = [" ".join(f"word{i % 7} and" for i in range(length)) for length in (3, 90, 1, 40, 7, 120, 2, 15)]


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    """The handler's module with the real model loaded, as `prepare()` leaves it."""
    module = load_handler("sentence-transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_NAME", str(minilm()))
        patch.setenv("SERVED_MODEL_NAME", "all-MiniLM-L6-v2")
        patch.setenv("PREWARM", "true")
        module.prepare()
    return module


async def send(worker: ModuleType, **payload: Any) -> Any:
    return await worker.handler({"id": "job", "input": payload})


async def error(worker: ModuleType, **payload: Any) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((await send(worker, **payload))["error"])
    assert "embeddings" in await send(worker, text="the next job is served"), "the worker goes on"
    return result


async def openai(worker: ModuleType, route: str, **body: Any) -> Any:
    return await send(worker, openai_route=route, openai_input=body)


# ---- numbers -------------------------------------------------------------------------------------------


async def test_embeddings_equal_the_librarys(worker: ModuleType) -> None:
    texts = [*MIXED, "", "ünïcödé 漢字 🤗", "x" * 5000, "word " * 2000]
    answer = await send(worker, texts=texts)
    expected = worker.engine.encoder.model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    np.testing.assert_allclose(answer["embeddings"], expected, atol=1e-5)
    plain = await send(worker, texts=texts, normalize=False)
    expected = worker.engine.encoder.model.encode(texts, normalize_embeddings=False, show_progress_bar=False)
    np.testing.assert_allclose(plain["embeddings"], expected, atol=1e-5)


async def test_similar_sentences_score_above_unrelated_ones(worker: ModuleType) -> None:
    texts = [text for group in GROUPS for text in group]
    rows = np.array((await send(worker, texts=texts))["embeddings"])
    scores = rows @ rows.T
    related = np.array([[i // 2 == j // 2 for j in range(len(texts))] for i in range(len(texts))])
    np.fill_diagonal(scores, np.nan)
    assert np.nanmin(scores[related]) > np.nanmax(scores[~related])


async def test_a_vector_does_not_depend_on_its_neighbours(worker: ModuleType) -> None:
    alone = [(await send(worker, text=text))["embeddings"][0] for text in MIXED]
    together = await asyncio.gather(*(send(worker, text=text) for text in MIXED * 4))
    for number, answer in enumerate(together):
        np.testing.assert_allclose(answer["embeddings"][0], alone[number % len(MIXED)], atol=1e-5)


# ---- the contract --------------------------------------------------------------------------------------


async def test_the_answer_says_what_was_done(worker: ModuleType) -> None:
    answer = await send(worker, texts=["one two three", "one " * 400])
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
    ],
)
async def test_every_way_to_say_it_gives_the_same(worker: ModuleType, payload: dict[str, Any]) -> None:
    answer = await send(worker, **payload)
    assert answer["count"] == 1
    np.testing.assert_allclose(
        answer["embeddings"], (await send(worker, texts=["a"]))["embeddings"], atol=1e-5
    )


async def test_an_empty_text_is_a_text(worker: ModuleType) -> None:
    for payload in ({"text": ""}, {"texts": ""}, {"texts": [""]}):
        answer = await send(worker, **payload)
        assert np.linalg.norm(answer["embeddings"][0]) == pytest.approx(1)
        assert answer["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("payload", [{}, {"texts": []}, {"texts": None}, {"text": None}])
async def test_no_text_at_all_is_an_error(worker: ModuleType, payload: dict[str, Any]) -> None:
    assert (await error(worker, **payload))["code"] == "empty"


@pytest.mark.parametrize(
    ("payload", "param"),
    [
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
async def test_a_wrong_field_is_named(worker: ModuleType, payload: dict[str, Any], param: str) -> None:
    assert (await error(worker, **payload))["param"] == param


async def test_dimensions_are_cut_before_normalising(worker: ModuleType) -> None:
    full = np.array((await send(worker, texts=MIXED, normalize=False))["embeddings"])
    answer = await send(worker, texts=MIXED, dimensions=64)
    assert answer["dimensions"] == 64
    expected = full[:, :64] / np.linalg.norm(full[:, :64], axis=1, keepdims=True)
    np.testing.assert_allclose(answer["embeddings"], expected, atol=1e-5)


async def test_a_text_too_long_is_cut_and_counted_or_refused(worker: ModuleType) -> None:
    long = "word " * 400
    assert (await send(worker, texts=["a", long]))["truncated"] == 1
    problem = await error(worker, texts=["a", long], truncate=False)
    assert (problem["param"], problem["code"]) == ("texts.1", "too_long")
    assert "402 tokens" in problem["message"]
    assert "256" in problem["message"]
    assert (await error(worker, text=long, truncate=False))["param"] == "text"
    assert (await send(worker, text="word " * 254, truncate=False))["truncated"] == 0


async def test_a_prompt_goes_before_each_text(worker: ModuleType) -> None:
    expected = (await send(worker, texts=["query: a", "query: b"]))["embeddings"]
    answer = await send(worker, texts=["a", "b"], prompt="query: ")
    np.testing.assert_allclose(answer["embeddings"], expected, atol=1e-5)


async def test_base64_holds_the_same_float32_and_is_three_times_smaller(worker: ModuleType) -> None:
    numbers = await send(worker, texts=MIXED * 8)
    coded = await send(worker, texts=MIXED * 8, encoding_format="base64")
    decoded = [np.frombuffer(base64.b64decode(row), "<f4") for row in coded["embeddings"]]
    np.testing.assert_allclose(decoded, numbers["embeddings"], atol=1e-5)
    sizes = [len(json.dumps(answer["embeddings"])) for answer in (numbers, coded)]
    assert sizes[0] / sizes[1] > 2.4
    as_float64 = len(json.dumps(np.array(numbers["embeddings"], np.float32).astype(float).tolist()))
    assert as_float64 / sizes[1] > 3


async def test_ten_thousand_texts_in_one_job(worker: ModuleType) -> None:
    texts = [f"number {i}" for i in range(10_000)]
    small = await send(worker, texts=texts, dimensions=32, encoding_format="base64")
    assert small["count"] == len(small["embeddings"]) == 10_000
    for i in (0, 5_000, 9_999):
        alone = await send(worker, text=texts[i], dimensions=32)
        row = np.frombuffer(base64.b64decode(small["embeddings"][i]), "<f4")
        np.testing.assert_allclose(row, alone["embeddings"][0], atol=1e-5)


async def test_a_result_that_cannot_be_returned_is_refused_before_the_work(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.engine.encoder, "tokenize", lambda *a, **k: pytest.fail("it began the work"))
    answer = await send(worker, texts=["a"] * 10_000)
    problem = json.loads(answer["error"])
    assert problem["code"] == "result_too_large"
    assert "base64" in problem["message"]
    assert "10 MB" in problem["message"]


async def test_batch_size_bounds_the_jobs_texts_in_a_batch(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    batcher, gate = worker.engine.encoder._batcher, threading.Event()
    run = batcher._run
    monkeypatch.setattr(
        batcher, "_run", lambda texts: batches.append(len(texts)) or (gate.wait(60) and run(texts))
    )
    gate.set()
    await send(worker, texts=["short"] * 12, batch_size=5)
    assert batches == [5, 5, 2]
    batches.clear()
    gate.clear()
    jobs = asyncio.gather(*(send(worker, text=f"job {i}") for i in range(40)))
    async with asyncio.timeout(60):
        while sum(batches) + len(batcher._waiting) < 40:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    gate.set()
    await jobs
    assert sum(batches) == 40
    assert len(batches) <= len(batcher._lanes) + 1, "jobs that wait together run together"


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
async def test_a_vector_that_is_not_finite_fails_its_job_alone(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch, encoding_format: str
) -> None:
    batcher = worker.engine.encoder._batcher
    run = batcher._run

    def broken(texts: list[Any]) -> list[Any]:
        return [
            row * (np.nan if len(text.tokens) > 9 else 1) for text, row in zip(texts, run(texts), strict=True)
        ]

    monkeypatch.setattr(batcher, "_run", broken)
    texts = ["fine", "too much " * 9]
    answer = await send(worker, texts=texts, encoding_format=encoding_format)
    problem = json.loads(answer["error"])
    assert (problem["code"], "text 1" in problem["message"]) == ("not_finite", True)
    assert "error" not in await send(worker, texts=texts[:1], encoding_format=encoding_format)


# ---- OpenAI --------------------------------------------------------------------------------------------


async def test_the_openai_route_has_openais_exact_shape(worker: ModuleType) -> None:
    answer = await openai(
        worker, "/v1/embeddings", input=["a b", "c"], model="all-minilm-l6-v2", user="u", extra=1
    )
    assert set(answer) == {"object", "data", "model", "usage"}
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [(set(row), row["object"], row["index"]) for row in answer["data"]] == [
        ({"object", "embedding", "index"}, "embedding", 0),
        ({"object", "embedding", "index"}, "embedding", 1),
    ]
    nulls = await openai(
        worker, "/v1/embeddings", input="a", encoding_format=None, dimensions=None, model=None
    )
    assert len(nulls["data"][0]["embedding"]) == 384
    native = await send(worker, texts=["a b", "c"])
    np.testing.assert_allclose([row["embedding"] for row in answer["data"]], native["embeddings"], atol=1e-5)


async def test_token_arrays_mean_the_text_that_they_are(worker: ModuleType) -> None:
    tokenizer = worker.engine.encoder.model.tokenizer
    expected = (await openai(worker, "/v1/embeddings", input="hello brave world"))["data"][0]["embedding"]
    for special in (True, False):
        ids = tokenizer("hello brave world", add_special_tokens=special)["input_ids"]
        for value in (ids, [ids], [ids, [101, 102]]):
            answer = await openai(worker, "/v1/embeddings", input=value)
            np.testing.assert_allclose(answer["data"][0]["embedding"], expected, atol=1e-5)
            assert answer["usage"]["prompt_tokens"] == (7 if len(value) == 2 else 5)


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
        ({"input": None}, "input", "invalid_value"),
        ({"input": [1, 30522]}, "input.0", "invalid_value"),
        ({"input": [-1]}, "input.0", "invalid_value"),
        ({"input": "a", "model": "gpt-4"}, "model", "model_not_found"),
        ({"input": "a", "dimensions": 9999}, "dimensions", "invalid_value"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
    ],
)
async def test_a_wrong_openai_body_is_named(
    worker: ModuleType, body: dict[str, Any], param: str, code: str
) -> None:
    problem = json.loads((await openai(worker, "/v1/embeddings", **body))["error"])
    assert (problem["param"], problem["code"], problem["type"]) == (param, code, "invalid_request_error")


async def test_the_models_route(worker: ModuleType) -> None:
    answer = await send(worker, openai_route="/v1/models")
    assert [model["id"] for model in answer["data"]] == ["all-MiniLM-L6-v2"]
    assert answer["data"][0]["object"] == "model"


# ---- other models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def static_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with no transformer in it: its tokenizer's ids mean nothing without its own preprocessing."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    folder = tmp_path_factory.mktemp("static")
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)]).save(str(folder))
    return folder


async def test_a_model_without_a_transformer_goes_through_the_library(static_model: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(static_model), device="cpu")
    encoder = Encoder(model, budget=64)
    assert (encoder.takes_tokens, encoder.dimensions) == (False, 16)
    texts = encoder.tokenize(["a b c", "d"], prompt="p: ", truncate=True, param="texts")
    rows = await encoder.encode(texts)
    np.testing.assert_allclose(rows, model.encode(["a b c", "d"], prompt="p: "), atol=1e-5)
    jobs.current_job.set({"id": "1"})
    with pytest.raises(JobError, match="texts, not token ids"):
        encoder.tokenize([[1, 2]], prompt="", truncate=True, param="input")


async def test_prompts_of_the_model_are_its_defaults_and_its_names(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    prompts = {"query": "find: ", "document": ""}
    model = SentenceTransformer(str(minilm()), device="cpu", prompts=prompts, default_prompt_name="query")
    # A pooling that leaves the prompt's tokens out has to know how many they are.
    model.set_pooling_include_prompt(False)
    encoder = Encoder(model, budget=1024)
    assert encoder.prompt_for(None, None) == "find: "
    assert encoder.prompt_for(None, "document") == ""
    texts = encoder.tokenize(["a", "some more words"], prompt="find: ", truncate=True, param="texts")
    expected = model.encode(["a", "some more words"], normalize_embeddings=True)
    rows = truncate_and_normalize(await encoder.encode(texts), dimensions=None, normalize=True)
    np.testing.assert_allclose(rows, expected, atol=1e-5)


# ---- numbers as text -----------------------------------------------------------------------------------


def test_floats_are_printed_in_their_shortest_form() -> None:
    values = np.random.default_rng(0).normal(0, 0.05, 2000).astype(np.float32)
    values[:7] = [0, 1, -0.5, 1e-12, 3.0e8, 0.1, -1.3213707e-32]
    printed = [json.dumps(value) for value in shortest_decimals(values).tolist()]
    for value, text in zip(values, printed, strict=True):
        assert np.float32(float(text)) == value
        assert float(text) == float(str(value)), "numpy's own shortest form"


def test_what_is_not_finite_stays_so_for_the_boundary_to_refuse() -> None:
    rows = np.array([[np.nan, np.inf, 1.0]], np.float32)
    assert encode_vectors(rows, "float")[0][2] == 1.0
    with pytest.raises(JobError, match="not finite"):
        jobs.plain({"embeddings": encode_vectors(rows, "float")})


# ---- under the local platform, with the unmodified SDK -------------------------------------------------


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with running("sentence-transformers", env=local_env("sentence-transformers")) as platform:
        yield platform


def test_the_openai_client_gets_what_the_runpod_client_gets(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runpod, "endpoint_url_base", platform.base_url)
    monkeypatch.setattr(runpod, "api_key", "local")
    native = runpod.Endpoint("local").run_sync({"input": {"texts": MIXED}}, timeout=60)
    client = OpenAI(base_url=platform.openai_url, api_key="local")
    assert [model.id for model in client.models.list()] == ["all-MiniLM-L6-v2"]
    for encoding in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        reply = client.embeddings.create(model="all-MiniLM-L6-v2", input=MIXED, **encoding)
        rows = [row.embedding for row in reply.data]
        if encoding == {"encoding_format": "base64"}:
            rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
        np.testing.assert_allclose(rows, native["embeddings"], atol=1e-5)
    assert (
        len(client.embeddings.create(model="all-MiniLM-L6-v2", input="a", dimensions=8).data[0].embedding)
        == 8
    )


def test_an_error_reaches_the_client_in_openais_shape(platform: Platform) -> None:
    client = OpenAI(base_url=platform.openai_url, api_key="local", max_retries=0)
    reply = client.embeddings.with_raw_response.create(model="gpt-4", input="a")
    problem = reply.http_response.json()["error"]
    assert problem == {
        "type": "invalid_request_error",
        "message": "model: 'gpt-4' is not served here. Use 'all-MiniLM-L6-v2'.",
        "param": "model",
        "code": "model_not_found",
    }


def test_the_cold_start_is_told_by_phase(platform: Platform) -> None:
    worker = platform.workers[0]
    assert list(worker.phases) == ["resolve", "import", "load", "prewarm", "ready"]
    assert worker.phases["ready"] >= sum(worker.phases[name] for name in ("resolve", "import", "load"))
    assert any("versions worker=sentence-transformers" in line for line in worker.lines)


def test_make_run_shows_it_and_ends_well() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "tools.demo"], capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    for part in ("Cold start", "384 dimensions", "1.00", "by the openai client", "It works."):
        assert part in shown.stdout


def test_the_sdks_own_test_input_runs_it_without_a_platform() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")}
    env |= {"PYTHONPATH": str(ROOT), **local_env("sentence-transformers")}
    command = [
        sys.executable,
        "-u",
        "handler.py",
        "--test_input",
        '{"input": {"text": "a", "dimensions": 2}}',
    ]
    shown = subprocess.run(
        command, cwd=ROOT / "workers/sentence-transformers", env=env,
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "completed successfully" in shown.stdout
    assert "phase=ready" in shown.stdout


def test_a_model_that_does_not_exist_is_told_to_every_job() -> None:
    with running("sentence-transformers", env={"MODEL_NAME": "/no/such/folder"}) as platform:
        client = OpenAI(base_url=platform.openai_url, api_key="local", max_retries=0)
        for _ in range(2):
            problem = client.models.with_raw_response.list().http_response.json()["error"]
            assert problem["code"] == "model_not_found"
            assert "/no/such/folder" in problem["message"]
        assert len(platform.workers) == 1, "no crash loop"
