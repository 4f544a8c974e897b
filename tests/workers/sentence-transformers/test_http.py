"""The worker in HTTP mode, a real process with the real model, and unmodified clients."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.helpers import run_examples
from tests.shared.http.servers import Server, running
from tools.models import real_env

pytestmark = pytest.mark.engine
NAME = "all-MiniLM-L6-v2"
TEXTS = ["A man is eating.", "Someone eats a meal."]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(
        module="workers.sentence-transformers.handler", **real_env("sentence-transformers")
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def test_embeddings_as_numbers_and_base64(server: Server, client: openai.OpenAI) -> None:
    """The client asks for base64 unless it is told otherwise."""
    assert client.models.retrieve(NAME).id == NAME
    native = server.work(texts=TEXTS).json()["output"]["embeddings"]
    for encoding in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        data: Any = client.embeddings.create(model=NAME, input=TEXTS, **encoding).data  # type: ignore[arg-type]
        rows = [row.embedding for row in data]
        if "base64" in encoding.values():
            rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
        np.testing.assert_allclose(rows, native, atol=1e-5)
    dumped = {"input": TEXTS, "model": None, "encoding_format": None, "dimensions": None, "user": None}
    answer = httpx.post(f"{server.url}/v1/embeddings", json=dumped)
    body = answer.json()
    assert set(body) == {"object", "data", "model", "usage"}
    assert [(set(row), row["object"], row["index"]) for row in body["data"]] == [
        ({"object", "embedding", "index"}, "embedding", index) for index in (0, 1)
    ]
    assert body["usage"] == {"prompt_tokens": 14, "total_tokens": 14}
    np.testing.assert_allclose([row["embedding"] for row in body["data"]], native, atol=1e-5)
    assert answer.headers["x-inference-time"].isdecimal()
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'worker_model_seconds_count{route="/v1/embeddings"} 4.0' in metrics


@pytest.mark.parametrize(
    ("wrong", "kind", "param", "mentions"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model", NAME),
        ({"dimensions": 9999}, openai.BadRequestError, "dimensions", "384"),
        ({"input": [[101, 7592, 102]]}, openai.BadRequestError, "input", "check_embedding_ctx_length=False"),
        ({"input": [101, 7592]}, openai.BadRequestError, "input", "ACCEPT_TOKEN_IDS=true"),
    ],
)
def test_errors_raise_the_clients_classes(
    client: openai.OpenAI, wrong: dict[str, Any], kind: type[openai.APIStatusError], param: str, mentions: str
) -> None:
    with pytest.raises(kind, match=mentions) as caught:
        client.embeddings.create(**{"model": NAME, "input": "a", **wrong})
    assert caught.value.param == param


def test_the_readmes_examples_run(server: Server) -> None:
    """LangChain's, where it is installed: its vectors are the model's, not those of OpenAI's token ids."""
    shown = run_examples("sentence-transformers", server.url)
    expected = server.work(texts=TEXTS).json()["output"]["embeddings"]
    for names in shown:
        vectors = names.get("vectors") or [row.embedding for row in names["reply"].data]
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert len(shown) >= 2
