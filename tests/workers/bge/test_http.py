"""The worker in HTTP mode, a real process with a tiny model, and unmodified clients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.helpers import run_examples
from tests.shared.http.servers import Server, running
from tools.models import local_env

pytestmark = pytest.mark.engine
NAME = "BAAI/bge-large-en-v1.5"
QUERY = "what is the capital of france?"
DOCUMENTS = ["the giant panda eats bamboo", "paris is the capital and largest city of france", "query"]
RANKING = {"query": QUERY, "documents": DOCUMENTS, "top_n": 2}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    env = local_env("bge") | {"SERVED_MODEL_NAME": NAME}
    with running(module="workers.bge.handler", **env) as server:
        yield server


@pytest.fixture(scope="module")
def ranks(server: Server) -> list[tuple[int, float]]:
    """Index and score of the documents, by the cosine of what the openai client fetched as base64."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        asked = client.embeddings.create(model=NAME, input=QUERY, extra_body={"input_type": "query"})
        stored = client.embeddings.create(model=NAME, input=DOCUMENTS)
    scores = np.array([row.embedding for row in stored.data]) @ np.array(asked.data[0].embedding)
    return [(int(index), scores[index]) for index in np.argsort(-scores)[:2]]


def ranked(results: Any) -> list[tuple[int, Any]]:
    return [(result["index"], pytest.approx(result["relevance_score"], abs=1e-5)) for result in results]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_rerank_with_every_optional_field_null(
    server: Server, ranks: list[tuple[int, float]], version: str
) -> None:
    nulls = dict.fromkeys(["model", "return_documents", "raw_scores", "truncate", "max_tokens_per_doc"])
    answer = httpx.post(f"{server.url}/{version}/rerank", json=RANKING | nulls).json()
    assert ranked(answer["results"]) == ranks
    assert ranked(server.work(**RANKING).json()["output"]["results"]) == ranks
    problem = httpx.post(f"{server.url}/{version}/rerank", json=RANKING | {"documents": [QUERY, 5]})
    assert (problem.status_code, problem.json()["error"]["param"]) == (400, "documents")


@pytest.mark.parametrize("version", ["Client", "ClientV2"])
def test_coheres_client_ranks(server: Server, ranks: list[tuple[int, float]], version: str) -> None:
    import cohere

    client = getattr(cohere, version)(base_url=server.url, api_key="any")
    answer = client.rerank(model=NAME, **RANKING)
    assert ranked([result.model_dump() for result in answer.results]) == ranks
    with pytest.raises(cohere.NotFoundError) as caught:
        client.rerank(model="rerank-v3.5", **RANKING)
    assert caught.value.body["error"]["code"] == "model_not_found"


def test_the_readmes_examples_run(server: Server) -> None:
    """Those of clients that are installed."""
    shown = run_examples("bge", server.url)
    assert any("query" in names for names in shown)
    for names in shown:
        if "ranked" in names and isinstance(names["ranked"], dict):
            assert len(names["ranked"]["results"]) == 2
