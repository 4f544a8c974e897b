"""The retrieval worker on tiny models: the right pooling and prompt for each family, and reranking."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoModel, AutoTokenizer

from tests import helpers
from tests.helpers import error_of
from tools.workers import load_handler, load_module

pytestmark = pytest.mark.engine
worker = load_handler("bge")
reranker = load_module("bge", "reranker")

BGE_QUERY = "Represent this sentence for searching relevant passages: "
WEB_SEARCH = load_module("bge", "families").WEB_SEARCH
QUERY = "what is the capital of france?"
DOCUMENTS = [
    "the giant panda eats bamboo",
    "paris is the capital and largest city of france",
    "query",
    "bears live in the mountains of china " * 4,
    "passage: the city",
    "",
]
LONG = "panda " * 300
HALF = "half a character \ud83d"
HUGE, MANY = "x " * 20_000, ["a"] * 8000  # together 320 MB


send, error = partial(helpers.send, worker.handler), partial(helpers.error, worker.handler)
openai = partial(helpers.openai, worker.handler)


# ---- embeddings ----------------------------------------------------------------------------------------


def plainly(folder: Path, pooling: str, texts: list[str]) -> np.ndarray:
    """Embeddings by transformers alone: one text at a time, so that nothing is padded."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    rows = []
    for text in texts:
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt", truncation=True)).last_hidden_state[0]
        row = {"cls": states[0], "mean": states.mean(0), "lasttoken": states[-1]}[pooling]
        rows.append((row / row.norm()).numpy())
    return np.stack(rows)


FAMILIES = [
    ("bge-small-en", "cls", BGE_QUERY, ""),
    ("bge-m3", "cls", "", ""),
    ("e5-small", "mean", "query: ", "passage: "),
    ("qwen3-embedding", "lasttoken", WEB_SEARCH, ""),
    ("e5-small-own", "mean", "find: ", "text: "),
    ("bge-small-en-bare", "cls", BGE_QUERY, ""),
    ("e5-small-bare", "mean", "query: ", "passage: "),
    ("gte-small-bare", "mean", "", ""),
    ("qwen3-embedding-bare", "lasttoken", WEB_SEARCH, ""),
]


@pytest.mark.parametrize(("name", "pooling", "query", "document"), FAMILIES)
async def test_each_family_has_its_pooling_and_its_prompts(
    use: Callable[..., Any], models: Path, name: str, pooling: str, query: str, document: str
) -> None:
    use(name)
    texts = [*DOCUMENTS, LONG]
    for fields, prompt in [({}, document), ({"input_type": "query"}, query), ({"instruction": "i "}, "i ")]:
        answer = await send(texts=texts, **fields)
        assert (answer["pooling"], answer["prompt"]) == (pooling, prompt)
        expected = plainly(models / name, pooling, [prompt + text for text in texts])
        np.testing.assert_allclose(answer["embeddings"], expected, atol=1e-6)


async def test_the_precedence_of_prompts(use: Callable[..., Any]) -> None:
    use("bge-small-en")

    async def prompt(**fields: Any) -> Any:
        return (await send(text="a", **fields))["prompt"]

    assert await prompt() == ""
    assert await prompt(input_type="query") == BGE_QUERY
    assert await prompt(prompt_name="query") == BGE_QUERY
    assert await prompt(prompt="p: ", input_type="query") == "p: "
    assert await prompt(instruction="i: ", prompt="p: ", input_type="query") == "i: "
    assert await prompt(instruction="", input_type="query") == ""
    assert (await error(text="a", prompt="p", prompt_name="query"))["param"] == "prompt"
    assert "'query'" in (await error(text="a", prompt_name="nothing"))["message"]
    use("e5-small-own")
    assert await prompt(prompt_name="passage") == await prompt(prompt_name="document") == "text: "


async def test_the_answer_has_prompt_pooling_and_counts(use: Callable[..., Any]) -> None:
    use("bge-small-en", served_model_name="BAAI/bge-small-en-v1.5")
    answer = await send(texts=["the", LONG], input_type="query")
    tokens = answer.pop("usage")
    assert tokens["prompt_tokens"] == tokens["total_tokens"] > 128 + 3
    assert len(answer.pop("embeddings")) == 2
    assert answer == {
        "model": "BAAI/bge-small-en-v1.5", "revision": None, "dimensions": 32, "count": 2, "truncated": 1,
        "pooling": "cls", "prompt": BGE_QUERY,
    }  # fmt: skip


async def test_the_embeddings_route_knows_queries_from_documents(use: Callable[..., Any]) -> None:
    engine = use("e5-small", served_model_name="intfloat/e5-small", accept_token_ids=True)
    for kind, prompt in [("query", "query: "), ("document", "passage: ")]:
        native = (await send(text=QUERY, input_type=kind))["embeddings"]
        answer = await openai("/v1/embeddings", input=QUERY, model="e5-small", input_type=kind)
        assert set(answer) == {"object", "data", "model", "usage"}
        np.testing.assert_allclose(answer["data"][0]["embedding"], native[0], atol=1e-5)
        ids = engine.encoder.model.tokenizer(QUERY)["input_ids"]
        answer = await openai("/v1/embeddings", input=ids, input_type=kind)
        np.testing.assert_allclose(answer["data"][0]["embedding"], native[0], atol=1e-5)
        tokens = engine.encoder.model.tokenizer(prompt + QUERY)["input_ids"]
        assert answer["usage"]["prompt_tokens"] == len(tokens)
    problem = error_of(await openai("/v1/embeddings", input="a", input_type="passage"))
    assert problem["param"] == "input_type"
    nulls = await openai("/v1/embeddings", input=QUERY, input_type=None, instruction=None)
    np.testing.assert_allclose(nulls["data"][0]["embedding"], native[0], atol=1e-5)
    assert [model["id"] for model in (await openai("/v1/models"))["data"]] == ["intfloat/e5-small"]
    use("e5-small")
    assert error_of(await openai("/v1/embeddings", input=ids))["code"] == "unsupported"


# ---- reranking -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rank-bert", "bge-reranker-base"])
async def test_a_cross_encoder_ranks_by_its_scores(use: Callable[..., Any], models: Path, name: str) -> None:
    """Those that sentence-transformers gives, one pair at a time."""
    use(name)
    documents = [*DOCUMENTS, LONG]
    model = CrossEncoder(str(models / name), device="cpu", activation_fn=torch.nn.Identity())
    raw = [float(model.predict([(QUERY, text)], show_progress_bar=False)[0]) for text in documents]
    assert max(raw) - min(raw) > 0.1, "scores that hardly differ would prove nothing"
    for fields, expected in (({}, list(map(reranker.sigmoid, raw))), ({"raw_scores": True}, raw)):
        answer = await send(query=QUERY, documents=documents, **fields)
        assert scores(answer) == sorted(scores(answer), reverse=True)
        for result in answer["results"]:
            assert set(result) == {"index", "relevance_score"}
            assert type(result["relevance_score"]) is float
            assert result["relevance_score"] == pytest.approx(expected[result["index"]], abs=1e-5)
        assert (answer["method"], answer["truncated"]) == ("cross-encoder", 1)
    alone = [await send(query=QUERY, documents=[text]) for text in documents]
    assert sum(one["usage"]["prompt_tokens"] for one in alone) == answer["usage"]["prompt_tokens"]


async def test_a_score_that_is_not_finite_is_an_error(
    use: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = use("rank-bert").score.__self__.model
    hook = model.register_forward_hook(lambda _, __, output: output.logits.fill_(math.nan) and None)
    problem = await error(query="q", documents=["a"])
    hook.remove()
    assert problem["code"] == "not_finite"


def test_sigmoid_takes_any_score() -> None:
    assert [reranker.sigmoid(score) for score in (-1e30, 0, 1e30)] == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("name", "query", "document"), [("bge-small-en", BGE_QUERY, ""), ("e5-small", "query: ", "passage: ")]
)
async def test_an_embedding_model_ranks_by_cosine(
    use: Callable[..., Any], models: Path, name: str, query: str, document: str
) -> None:
    engine = use(name)
    first = plainly(models / name, engine.pooling, [query + QUERY])[0]
    expected = plainly(models / name, engine.pooling, [document + text for text in DOCUMENTS]) @ first
    for fields in ({}, {"raw_scores": True}):
        answer = await send(query=QUERY, documents=DOCUMENTS, **fields)
        scores = {result["index"]: result["relevance_score"] for result in answer["results"]}
        np.testing.assert_allclose([scores[i] for i in range(len(DOCUMENTS))], expected, atol=1e-5)
        assert list(scores) == list(np.argsort(-expected))
    assert (answer["method"], set(answer) & {"pooling"}) == ("cosine", set())


def scores(answer: Any) -> list[float]:
    return [result["relevance_score"] for result in answer["results"]]


@pytest.mark.parametrize("name", ["rank-bert", "bge-small-en"])
async def test_ranks_come_in_the_shape_of_cohere_and_jina(use: Callable[..., Any], name: str) -> None:
    use(name, served_model_name="me/ranker")
    documents = ["panda", {"text": "paris", "id": 7}, "panda", "query"]
    fields = {"query": QUERY, "documents": documents, "top_n": 3, "return_documents": True}
    native = await send(**fields)
    answer = await openai("/v1/rerank", model="me/ranker", rank_fields=["text"], **fields)
    assert answer == {**native, "results": answer["results"]}
    assert scores(answer) == pytest.approx(scores(native), abs=1e-5)
    cohere = await openai("/v2/rerank", model="me/ranker", **fields)
    assert cohere.pop("id").startswith("job-")
    assert cohere.pop("meta") == {"api_version": {"version": "2"}}
    assert cohere == {**answer, "results": cohere["results"]}
    assert answer["model"] == "me/ranker"
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > 8
    given = [documents[result["index"]] for result in answer["results"]]
    expected = [document if isinstance(document, dict) else {"text": document} for document in given]
    assert [result["document"] for result in answer["results"]] == expected
    assert len(given) == 3
    everything = await send(query=QUERY, documents=documents, top_n=100)
    assert sorted(result["index"] for result in everything["results"]) == [0, 1, 2, 3]
    assert scores(everything) == sorted(scores(everything), reverse=True)
    problem = error_of(await openai("/v1/rerank", model="other", query="a", documents=["b"]))
    assert (problem["param"], problem["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize("name", ["rank-bert", "bge-reranker-base", "bge-small-en"])
async def test_a_long_document_is_truncated_and_a_long_query_refused(
    use: Callable[..., Any], name: str
) -> None:
    use(name)
    answer = await send(query=QUERY, documents=["a", LONG, LONG + "more"])
    assert answer["truncated"] == 2
    scores = {result["index"]: result["relevance_score"] for result in answer["results"]}
    assert scores[1] == pytest.approx(scores[2], abs=1e-5), "both were cut to the same"
    problem = await error(query=LONG, documents=["a"])
    assert (problem["param"], problem["code"]) == ("query", "too_long")
    assert "128 tokens" in problem["message"]
    problem = await error(query=QUERY, documents=["a", LONG], truncate=False)
    assert (problem["param"], problem["code"]) == ("documents.1", "too_long")
    assert "128" in problem["message"]


async def test_a_reranker_refuses_embedding_requests(use: Callable[..., Any]) -> None:
    use("rank-bert", served_model_name="me/ranker")
    for answer in (await send(texts=["a"]), await openai("/v1/embeddings", input="a"), await send()):
        problem = error_of(answer)
        assert problem["code"] == "no_embeddings"
        assert "me/ranker is a reranker" in problem["message"]
        assert "query and documents" in problem["message"]


# ---- batching ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bge-small-en", "rank-bert"])
async def test_batches_keep_to_max_batch_tokens(use: Callable[..., Any], name: str) -> None:
    engine = use(name, max_batch_tokens=100)
    model = (engine.embedder or engine.score.__self__).model
    batches: list[list[int]] = []  # tokens of each sequence

    def record(_: Any, args: Any, inputs: Any) -> None:
        batches.append((args[0] if args else inputs)["attention_mask"].sum(1).tolist())

    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    texts = [" ".join(["panda"] * (1 + 7 * i % 30)) for i in range(40)] + [LONG]
    await send(**({"texts": texts} if engine.embedder else {"query": "a", "documents": texts}))
    hook.remove()
    assert sum(map(len, batches)) == len(texts) > 2 * len(batches)
    assert [128] in batches, "a text longer than the budget runs alone"
    assert all(len(batch) == 1 or max(batch) * len(batch) <= 100 for batch in batches)


@pytest.mark.parametrize(
    ("name", "payload", "param", "code"),
    [
        ("bge-small-en", {"texts": ["a", HALF]}, "texts.1", "invalid_value"),
        ("bge-small-en", {"text": "a", "prompt": HALF}, "prompt", "invalid_value"),
        ("bge-small-en", {"text": "a", "instruction": HALF}, "instruction", "invalid_value"),
        ("rank-bert", {"query": HALF, "documents": ["a"]}, "query", "invalid_value"),
        ("rank-bert", {"query": "a", "documents": [HALF]}, "documents", "invalid_value"),
        ("bge-small-en", {"texts": MANY, "instruction": HUGE, "dimensions": 2}, "instruction", "too_large"),
        ("rank-bert", {"query": HUGE, "documents": MANY}, "query", "too_large"),
    ],
)
async def test_texts_that_no_tokenizer_takes_fail_alone(
    use: Callable[..., Any], name: str, payload: dict[str, Any], param: str, code: str
) -> None:
    use(name)
    good = {"text": "a"} if name == "bge-small-en" else {"query": "a", "documents": ["b"]}
    fine, refused = await asyncio.gather(send(**good), send(**payload))
    assert "error" not in fine
    problem = error_of(refused)
    assert (problem["param"], problem["code"]) == (param, code)
