"""The retrieval worker on tiny models: the right pooling and prompt for each family, and reranking."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import threading
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai import OpenAI
from transformers import AutoModel, AutoTokenizer

from local import running
from tests import helpers
from tests.helpers import error_of, until
from tools.models import local_env, minilm
from tools.models import tiny_retrieval as tiny
from tools.workers import load_handler, load_module

pytestmark = pytest.mark.engine
worker = load_handler("bge")

BGE_QUERY = "Represent this sentence for searching relevant passages: "
WEB_SEARCH = load_module("bge", "families").WEB_SEARCH
QUERY = "what is the capital of france?"
DOCUMENTS = [
    "the giant panda eats bamboo",
    "paris is the capital and largest city of france",
    "query",
    "bears live in the mountains of china " * 4,
    "passage: the city",
]
LONG = "panda " * 300


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
    ("bge-small-zh", "cls", "为这个句子生成表示以用于检索相关文章：", ""),
    ("bge-m3", "cls", "", ""),
    ("e5-small", "mean", "query: ", "passage: "),
    ("multilingual-e5-large-instruct", "mean", WEB_SEARCH + " ", ""),
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
    for fields, prompt in [({}, document), ({"input_type": "query"}, query), ({"instruction": "i "}, "i ")]:
        answer = await send(texts=DOCUMENTS, **fields)
        assert (answer["pooling"], answer["prompt"]) == (pooling, prompt)
        expected = plainly(models / name, pooling, [prompt + text for text in DOCUMENTS])
        np.testing.assert_allclose(answer["embeddings"], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["bge-small-en", "e5-small", "qwen3-embedding"])
async def test_a_vector_does_not_depend_on_its_neighbours(use: Callable[..., Any], name: str) -> None:
    use(name)
    texts = [*DOCUMENTS, "", LONG]
    alone = [(await send(text=text))["embeddings"][0] for text in texts]
    together = (await send(texts=texts))["embeddings"]
    jobs = await asyncio.gather(*(send(text=text) for text in texts * 3))
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose([job["embeddings"][0] for job in jobs], alone * 3, atol=1e-6)


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
        "model": "BAAI/bge-small-en-v1.5",
        "revision": None,
        "dimensions": 32,
        "count": 2,
        "truncated": 1,
        "pooling": "cls",
        "prompt": BGE_QUERY,
    }


async def test_the_common_options_work_here_too(use: Callable[..., Any]) -> None:
    use("bge-small-en-bare")
    plain = np.array((await send(texts=DOCUMENTS, normalize=False))["embeddings"])
    assert not np.allclose(np.linalg.norm(plain, axis=1), 1)
    cut = await send(texts=DOCUMENTS, dimensions=8, encoding_format="base64")
    rows = np.array([np.frombuffer(base64.b64decode(row), "<f4") for row in cut["embeddings"]])
    expected = plain[:, :8] / np.linalg.norm(plain[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    assert (await error(text=LONG, truncate=False))["code"] == "too_long"
    assert (await error())["code"] == "empty"


async def test_the_embeddings_route_knows_queries_from_documents(use: Callable[..., Any]) -> None:
    engine = use("e5-small", served_model_name="intfloat/e5-small")
    for kind, prompt in [("query", "query: "), ("document", "passage: ")]:
        native = (await send(text=QUERY, input_type=kind))["embeddings"]
        answer = await openai("/v1/embeddings", input=QUERY, model="e5-small", input_type=kind)
        assert set(answer) == {"object", "data", "model", "usage"}
        np.testing.assert_allclose(answer["data"][0]["embedding"], native[0], atol=1e-5)
        ids = engine.encoder.model.tokenizer(QUERY)["input_ids"]
        answer = await openai("/v1/embeddings", input=ids, input_type=kind)
        np.testing.assert_allclose(answer["data"][0]["embedding"], native[0], atol=1e-5)
        assert answer["usage"]["prompt_tokens"] == len(
            engine.encoder.model.tokenizer(prompt + QUERY)["input_ids"]
        )
    problem = error_of(await openai("/v1/embeddings", input="a", input_type="passage"))
    assert problem["param"] == "input_type"
    assert [model["id"] for model in (await openai("/v1/models"))["data"]] == ["intfloat/e5-small"]


# ---- reranking -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rank-bert", "bge-reranker-base"])
async def test_a_cross_encoder_ranks_by_its_scores(use: Callable[..., Any], name: str) -> None:
    engine = use(name)
    documents = [*DOCUMENTS, "", LONG]
    for fields in ({}, {"raw_scores": True}):
        expected = (await engine.score(QUERY, documents, **fields)).values
        answer = await send(query=QUERY, documents=documents, **fields)
        assert scores(answer) == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
        for result in answer["results"]:
            assert set(result) == {"index", "relevance_score"}
            assert type(result["relevance_score"]) is float
            assert result["relevance_score"] == pytest.approx(expected[result["index"]], abs=1e-5)
        assert (answer["method"], answer["truncated"]) == ("cross-encoder", 1)


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
    assert {**answer, "results": 3} == {**native, "results": 3}
    assert scores(answer) == pytest.approx(scores(native), abs=1e-5)
    assert {"results", "model", "usage"} <= set(answer)
    assert answer["model"] == "me/ranker"
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > 8
    assert len(answer["results"]) == 3
    for result in answer["results"]:
        given = documents[result["index"]]
        assert result["document"] == (given if isinstance(given, dict) else {"text": given})
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
async def test_jobs_run_together_within_the_budget(use: Callable[..., Any], name: str) -> None:
    """The first batches run when all of the jobs' texts are queued."""
    engine = use(name, max_batch_tokens=100)
    owner = engine.embedder or engine.score.__self__
    batches: list[list[int]] = []  # tokens of each sequence
    gate = threading.Event()

    def hold(_: Any, args: Any, inputs: Any) -> None:
        batches.append((args[0] if args else inputs)["attention_mask"].sum(1).tolist())
        assert gate.wait(60)

    hook = owner.model.register_forward_pre_hook(hold, with_kwargs=True)
    texts = [" ".join(["panda"] * (1 + 7 * i % 30)) for i in range(40)] + [LONG]
    query = {"query": "a"} if name == "rank-bert" else {}
    field = "documents" if query else "texts"
    jobs = asyncio.gather(*(send(**query, **{field: [text, "b"]}) for text in texts))
    await until(lambda: sum(map(len, batches)) + owner.batcher.queued == 2 * len(texts))
    gate.set()
    assert not any("error" in job for job in await jobs)
    hook.remove()
    assert sum(map(len, batches)) == 2 * len(texts)
    assert len(batches) < len(texts)
    assert [128] in batches, "a text longer than the budget runs alone"
    for batch in batches:
        assert len(batch) == 1 or max(batch) * len(batch) <= 100
        assert batch == sorted(batch, reverse=True)


@pytest.mark.parametrize("name", ["bge-small-en", "rank-bert"])
async def test_a_text_that_cannot_be_tokenized_fails_alone(use: Callable[..., Any], name: str) -> None:
    use(name)
    texts = ["a", "half a character \ud83d", "b"]
    if name == "rank-bert":
        jobs = await asyncio.gather(*(send(query="q", documents=[text]) for text in texts))
    else:
        jobs = await asyncio.gather(*(send(text=text) for text in texts))
    assert ["error" in job for job in jobs] == [False, True, False]
    problem = error_of(jobs[1])
    assert problem["code"] == "invalid_value"
    assert "half of a surrogate pair" in problem["message"]


@pytest.mark.parametrize("name", ["bge-small-en", "rank-bert"])
async def test_a_prompt_before_many_texts_cannot_fill_the_memory(use: Callable[..., Any], name: str) -> None:
    """A request of 40 kB would become one of 320 MB."""
    use(name)
    many, long = ["a"] * 8000, "x " * 20_000
    if name == "rank-bert":
        answer, param = await send(query=long, documents=many), "query"
    else:
        answer, param = await send(texts=many, instruction=long, dimensions=2), "instruction"
    problem = error_of(answer)
    assert (problem["code"], problem["param"]) == ("too_large", param)


@pytest.mark.parametrize(
    ("name", "field"), [("bge-small-en", "prompt"), ("bge-small-en", "instruction"), ("rank-bert", "query")]
)
async def test_an_error_about_a_prompt_names_its_field(
    use: Callable[..., Any], name: str, field: str
) -> None:
    use(name)
    texts = {"documents" if field == "query" else "texts": ["a"]}
    assert error_of(await send(**texts, **{field: "\ud83d"}))["param"] == field


async def test_two_thousand_documents_in_one_job(use: Callable[..., Any]) -> None:
    use("rank-bert")
    documents = [DOCUMENTS[i % 5] for i in range(2000)]
    answer = await send(query=QUERY, documents=documents, top_n=5)
    few = await send(query=QUERY, documents=DOCUMENTS)
    assert {result["index"] % 5 for result in answer["results"]} == {few["results"][0]["index"]}
    assert answer["usage"]["total_tokens"] == 400 * few["usage"]["total_tokens"]


# ---- a real model --------------------------------------------------------------------------------------

# A question, the passage that answers it, and one that shares more of its words and does not.
QUESTIONS = """\
How tall is the tower in Paris?
The Eiffel Tower rises 330 metres above the Champ de Mars.
How is the weather in Paris? In June the evenings are mild.

Which animal sleeps most of the day?
Koalas sleep up to twenty hours, longer than any other creature.
Which of the shops is open most of the day?

Who wrote the book about the white whale?
Herman Melville published Moby-Dick, a novel of the sea, in 1851.
Who painted the kitchen white, and who wrote the letter about the colour?

Why do leaves turn red in autumn?
As nights grow longer, chlorophyll breaks down and other pigments show.
Why do prices turn down in the sales?

How is bread made to rise?
Yeast ferments sugar into carbon dioxide, and the dough expands.
How is rent made to rise every year?

How do I undo my last commit?
git reset --soft HEAD~1 moves the branch back and keeps your changes.
How do I find the last page of my diary?

When does the bank open on Saturday?
Weekend hours of our branch: money is paid out from nine to noon.
When does the film on the open air stage end?

What is a good cure for a headache?
Aspirin and a dark quiet room relieve most pain in the temples.
What is a good name for a band?"""
RETRIEVAL = [group.splitlines() for group in QUESTIONS.split("\n\n")]


def shared_words(one: str, other: str) -> int:
    words = [set(re.findall(r"\w+", text.lower())) for text in (one, other)]
    return len(words[0] & words[1])


async def test_the_right_passage_ranks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_module("bge", "schemas").Settings(
        model_name=str(minilm()), served_model_name="all-MiniLM-L6-v2"
    )
    monkeypatch.setattr(worker, "engine", worker.load(settings), raising=False)
    questions = [question for question, _, _ in RETRIEVAL]
    right = list(range(len(RETRIEVAL)))
    passages = [right for _, right, _ in RETRIEVAL] + [wrong for _, _, wrong in RETRIEVAL]
    for question, answer, wrong in RETRIEVAL:
        assert shared_words(question, wrong) > shared_words(question, answer), "words alone would be wrong"
    queries = await send(texts=questions, input_type="query")
    documents = await send(texts=passages)
    assert (queries["pooling"], queries["prompt"], documents["prompt"]) == ("mean", "", "")
    scores = np.array(queries["embeddings"]) @ np.array(documents["embeddings"]).T
    assert list(scores.argmax(1)) == right
    ranked = await asyncio.gather(*(send(query=text, documents=passages, top_n=1) for text in questions))
    assert [answer["results"][0]["index"] for answer in ranked] == right


# ---- under the local platform, with the unmodified SDK -------------------------------------------------


def runsync(platform: Any, **payload: Any) -> Any:
    request = urllib.request.Request(
        f"{platform.endpoint_url}/runsync",
        data=json.dumps({"input": payload}).encode(),
        headers={"Content-Type": "application/json", "Authorization": "Bearer local"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_clients_of_openai_and_of_rerankers_are_served() -> None:
    with running("bge", env=local_env("bge")) as platform:
        client = OpenAI(base_url=platform.openai_url, api_key="local")
        name = client.models.list().data[0].id
        asked = client.embeddings.create(model=name, input=[QUERY], extra_body={"input_type": "query"})
        stored = client.embeddings.create(model=name, input=DOCUMENTS)
        scores = np.array([row.embedding for row in stored.data]) @ np.array(asked.data[0].embedding)
        body = {"model": name, "query": QUERY, "documents": DOCUMENTS, "top_n": 2}
        ranked: Any = client.post("/rerank", body=body, cast_to=object)
        assert [result["index"] for result in ranked["results"]] == list(np.argsort(-scores)[:2])
        assert ranked["results"][0]["relevance_score"] == pytest.approx(scores.max(), abs=1e-5)
        native = runsync(platform, texts=[QUERY], input_type="query")
        assert native["status"] == "COMPLETED"
        assert native["output"]["prompt"] == BGE_QUERY
        np.testing.assert_allclose(native["output"]["embeddings"][0], asked.data[0].embedding, atol=1e-5)
        failed = runsync(platform, texts=["a", None])
        assert (failed["status"], json.loads(failed["error"])["param"]) == ("FAILED", "texts.1")


def test_a_reranker_is_served_and_a_classifier_is_refused(models: Path, use: Callable[..., Any]) -> None:
    with running("bge", env={"MODEL_NAME": str(models / "rank-bert"), "HF_HUB_OFFLINE": "1"}) as platform:
        answer = runsync(platform, query=QUERY, documents=DOCUMENTS, top_n=2)["output"]
        expected = asyncio.run(use("rank-bert").score(QUERY, DOCUMENTS)).values
        assert [result["index"] for result in answer["results"]] == list(np.argsort(expected)[:-3:-1])
        failed = runsync(platform, texts=["a"])
        assert (failed["status"], json.loads(failed["error"])["code"]) == ("FAILED", "no_embeddings")
    classifier = tiny.reranker(models / "nli", labels=3)
    with running("bge", env={"MODEL_NAME": str(classifier), "HF_HUB_OFFLINE": "1"}) as platform:
        failed = runsync(platform, query=QUERY, documents=DOCUMENTS)
        assert json.loads(failed["error"])["code"] == "unsupported_model"
