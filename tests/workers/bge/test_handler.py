"""The retrieval worker: the right pooling and prompt for each family, and reranking."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import re
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import OpenAI

from local import running
from shared import embeddings
from shared.errors import JobError, StartError
from shared.jobs import parse
from tools.models import local_env, minilm
from tools.models import tiny_retrieval as tiny
from tools.workers import load_handler

worker = load_handler("bge")

BGE_QUERY = "Represent this sentence for searching relevant passages: "
WEB_SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
QUERY = "what is the capital of france?"
DOCUMENTS = [
    "the giant panda eats bamboo",
    "paris is the capital and largest city of france",
    "query",
    "bears live in the mountains of china " * 4,
    "passage: the city",
]
LONG = "panda " * 300


async def send(**payload: Any) -> Any:
    return await worker.handler({"id": "job", "input": payload})


async def error(**payload: Any) -> dict[str, Any]:
    problem: dict[str, Any] = json.loads((await send(**payload))["error"])
    return problem


async def openai(route: str, **body: Any) -> Any:
    return await send(openai_route=route, openai_input=body)


# ---- no model: families, prompts, requests -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pooling", "query", "document"),
    [
        ("BAAI/bge-large-en-v1.5", "cls", BGE_QUERY, ""),
        ("BAAI/bge-small-en", "cls", BGE_QUERY, ""),
        ("BAAI/bge-base-zh-v1.5", "cls", "为这个句子生成表示以用于检索相关文章：", ""),
        ("BAAI/bge-m3", "cls", "", ""),
        ("intfloat/e5-base-v2", "mean", "query: ", "passage: "),
        ("intfloat/multilingual-e5-small", "mean", "query: ", "passage: "),
        ("intfloat/multilingual-e5-large-instruct", "mean", WEB_SEARCH + " ", ""),
        ("intfloat/e5-mistral-7b-instruct", "lasttoken", WEB_SEARCH + " ", ""),
        ("thenlper/gte-large", "mean", "", ""),
        ("thenlper/gte-base-zh", "mean", "", ""),
        ("Alibaba-NLP/gte-large-en-v1.5", "cls", "", ""),
        ("Alibaba-NLP/gte-multilingual-base", "cls", "", ""),
        ("Alibaba-NLP/gte-modernbert-base", "cls", "", ""),
        ("Alibaba-NLP/gte-Qwen2-7B-instruct", "lasttoken", WEB_SEARCH + " ", ""),
        ("Qwen/Qwen3-Embedding-0.6B", "lasttoken", WEB_SEARCH, ""),
        ("/models/models--BAAI--bge-large-en-v1.5/snapshots/0f3a", "cls", BGE_QUERY, ""),
        ("/data/bge-small-en/my-e5-small", "mean", "query: ", "passage: "),
    ],
)
def test_families_are_known_by_the_models_name(name: str, pooling: str, query: str, document: str) -> None:
    family = worker.find_family(None, name)
    assert (family.pooling, family.query, family.document) == (pooling, query, document)


def test_the_readme_has_each_familys_prompts() -> None:
    page = Path(worker.__file__).with_name("README.md").read_text()
    for family in worker.FAMILIES:
        for prompt in (family.query, family.document):
            shown = prompt.replace(WEB_SEARCH, "Instruct: <web search>\\nQuery:")
            assert f"`{shown}`" in page or not prompt
    assert WEB_SEARCH.removeprefix("Instruct: ").removesuffix("\nQuery:") in page


@pytest.mark.parametrize("name", ["sentence-transformers/all-MiniLM-L6-v2", "BAAI/bge-en-icl", "me/mine"])
def test_other_models_have_no_family(name: str) -> None:
    assert worker.find_family(None, name) is None
    assert worker.find_family("BAAI/bge-m3", name).pooling == "cls", "the served name counts first"


@pytest.mark.parametrize(
    ("own", "default", "query", "document"),
    [
        ({"query": "", "document": ""}, None, "query: ", "passage: "),
        ({}, None, "query: ", "passage: "),
        ({"query": "q: ", "document": ""}, None, "q: ", ""),
        ({"query": "q: ", "passage": "p: ", "document": ""}, None, "q: ", "p: "),
        ({"query": "", "document": "d: "}, None, "", "d: "),
        ({"query": "q: ", "document": ""}, "q: ", "q: ", ""),
        ({"query": "", "document": "", "both": "b: "}, "b: ", "b: ", "b: "),
        ({"query": "", "document": "", "topic": "t: "}, None, "", ""),
    ],
)
def test_what_the_models_files_say_comes_before_the_family(
    own: dict[str, str], default: str | None, query: str, document: str
) -> None:
    family = worker.find_family("intfloat/e5-base")
    assert worker.choose_prompts(own, default, family) == {"query": query, "document": document}
    if not any(own.values()):
        assert worker.choose_prompts(own, default, None) == {"query": "", "document": ""}


REQUESTS = (worker.RetrievalRequest, worker.RerankRequest)


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        ({"texts": ["a"], "instruction": "i"}, "RetrievalRequest"),
        ({"text": "a", "input_type": "query"}, "RetrievalRequest"),
        ({"query": "a", "documents": ["b"]}, "RerankRequest"),
        ({"query": "a", "documents": [{"text": "b", "id": 7}], "top_n": 1}, "RerankRequest"),
    ],
)
def test_the_fields_tell_what_is_wanted(payload: dict[str, Any], kind: str) -> None:
    assert type(parse({"id": "1", "input": payload}, REQUESTS, {})).__name__ == kind


@pytest.mark.parametrize(
    ("payload", "param", "says"),
    [
        ({"text": "a", "input_type": "passage"}, "input_type", "'query' or 'document'"),
        ({"text": "a", "instruction": 1}, "instruction", "string"),
        ({"text": "a", "instructions": "i"}, "instructions", "Did you mean 'instruction'?"),
        ({"texts": ["a"], "top_n": 1}, "top_n", "unknown field"),
        ({"query": "a"}, "documents", "required"),
        ({"documents": ["a"]}, "query", "required"),
        ({"query": "", "documents": ["a"]}, "query", "at least 1 character"),
        ({"query": "a", "documents": []}, "documents", "at least 1 item"),
        ({"query": "a", "documents": ["b"] * 16385}, "documents", "at most 16384"),
        ({"query": "a", "documents": ["b", 5]}, "documents", "number 1 is neither"),
        ({"query": "a", "documents": ["b", {"title": "c"}]}, "documents", "number 1 is neither"),
        ({"query": "a", "documents": "b"}, "documents", "list"),
        ({"query": "a", "documents": ["b"], "top_n": 0}, "top_n", "greater than or equal to 1"),
        ({"query": "a", "documents": ["b"], "top_k": 1}, "top_k", "Did you mean 'top_n'?"),
    ],
)
def test_a_wrong_field_is_named(payload: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(JobError) as caught:
        parse({"id": "1", "input": payload}, REQUESTS, {})
    assert caught.value.param == param
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["BertModel"]}, False),
        ({"architectures": ["XLMRobertaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}, True),
        ({"architectures": ["BertForSequenceClassification"], "num_labels": 1}, True),
        ({"architectures": None}, False),
        (None, False),
    ],
)
def test_a_cross_encoder_is_known_before_it_is_loaded(tmp_path: Path, config: Any, expected: bool) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert worker.is_cross_encoder(tmp_path, "some/model") is expected


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}},
            "3",
        ),
        ({"architectures": ["BertForSequenceClassification"]}, "2 labels"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "bge-reranker-v2-m3"),
    ],
)
def test_what_would_give_nonsense_is_refused_at_the_start(tmp_path: Path, config: Any, says: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartError, match=says) as caught:
        worker.is_cross_encoder(tmp_path, "Qwen/Qwen3-Reranker-0.6B")
    assert caught.value.code == "unsupported_model"


def test_sigmoid_takes_any_score() -> None:
    assert worker.sigmoid(0) == 0.5
    assert worker.sigmoid(-1e30) == 0
    assert worker.sigmoid(1e30) == 1
    assert math.isnan(worker.sigmoid(math.nan)), "no rank, but an error: shared.jobs refuses it"
    assert worker.sigmoid(2) == pytest.approx(1 - worker.sigmoid(-2))


# ---- tiny models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models, named so that their families are known.

    Those whose name ends in `-bare` have no files of sentence-transformers.
    """
    root = tmp_path_factory.mktemp("models")
    tiny.write_modules(tiny.bert(root / "bge-small-en"), "cls")
    tiny.write_modules(tiny.bert(root / "bge-small-zh"), "cls")
    tiny.write_modules(tiny.bert(root / "e5-small"), "mean")
    tiny.write_modules(tiny.xlm_roberta(root / "bge-m3"), "cls")
    tiny.write_modules(tiny.xlm_roberta(root / "multilingual-e5-large-instruct"), "mean")
    tiny.write_modules(tiny.qwen3(root / "qwen3-embedding"), "lasttoken")
    tiny.bert(root / "bge-small-en-bare")
    tiny.bert(root / "e5-small-bare")
    tiny.bert(root / "gte-small-bare")
    tiny.qwen3(root / "qwen3-embedding-bare")
    tiny.write_modules(tiny.bert(root / "e5-small-own"), "mean", {"query": "find: ", "passage": "text: "})
    tiny.reranker(root / "rank-bert")
    tiny.reranker(root / "bge-reranker-base", architecture="xlm-roberta")
    return root


@pytest.fixture(scope="module")
def load(models: Path) -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    def load(name: str, **settings: Any) -> Any:
        key = name + json.dumps(settings)
        if key not in loaded:
            loaded[key] = worker.load(worker.Settings(model_name=str(models / name), **settings))
        return loaded[key]

    return load


@pytest.fixture
def use(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Puts a model into the handler's module, as `prepare()` does, and returns it."""

    def use(name: str, **settings: Any) -> Any:
        engine = load(name, **settings)
        monkeypatch.setattr(worker, "engine", engine, raising=False)
        return engine

    return use


def plainly(folder: Path, pooling: str, texts: list[str]) -> np.ndarray:
    """Embeddings by transformers alone: one text at a time, so that nothing is padded."""
    import torch
    from transformers import AutoModel, AutoTokenizer

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


@pytest.mark.engine
@pytest.mark.parametrize(("name", "pooling", "query", "document"), FAMILIES)
async def test_each_family_gets_its_pooling_and_its_prompts(
    use: Callable[..., Any], models: Path, name: str, pooling: str, query: str, document: str
) -> None:
    use(name)
    for fields, prompt in [({}, document), ({"input_type": "query"}, query), ({"instruction": "i "}, "i ")]:
        answer = await send(texts=DOCUMENTS, **fields)
        assert (answer["pooling"], answer["prompt"]) == (pooling, prompt)
        expected = plainly(models / name, pooling, [prompt + text for text in DOCUMENTS])
        np.testing.assert_allclose(answer["embeddings"], expected, atol=1e-6)


@pytest.mark.engine
@pytest.mark.parametrize("name", ["bge-small-en", "e5-small", "qwen3-embedding"])
async def test_a_vector_does_not_depend_on_its_neighbours(use: Callable[..., Any], name: str) -> None:
    use(name)
    texts = [*DOCUMENTS, "", LONG]
    alone = [(await send(text=text))["embeddings"][0] for text in texts]
    together = (await send(texts=texts))["embeddings"]
    jobs = await asyncio.gather(*(send(text=text) for text in texts * 3))
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose([job["embeddings"][0] for job in jobs], alone * 3, atol=1e-6)


@pytest.mark.engine
async def test_who_decides_on_the_prompt(use: Callable[..., Any]) -> None:
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


@pytest.mark.engine
async def test_prompts_of_the_models_files_can_be_named(use: Callable[..., Any]) -> None:
    use("e5-small-own")
    assert (await send(text="a", prompt_name="passage"))["prompt"] == "text: "
    assert (await send(text="a", prompt_name="document"))["prompt"] == "text: "


@pytest.mark.engine
async def test_the_answer_says_what_was_done(use: Callable[..., Any]) -> None:
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


@pytest.mark.engine
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


@pytest.mark.engine
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
    problem = json.loads((await openai("/v1/embeddings", input="a", input_type="passage"))["error"])
    assert problem["param"] == "input_type"
    assert [model["id"] for model in (await openai("/v1/models"))["data"]] == ["intfloat/e5-small"]


@pytest.mark.engine
@pytest.mark.parametrize("name", ["bge-small-en", "e5-small", "rank-bert"])
async def test_required_fields_are_enough(use: Callable[..., Any], name: str) -> None:
    engine = use(name)
    if isinstance(engine.model, worker.Encoder):
        assert (await send(texts=["a"]))["count"] == 1
        assert (await openai("/v1/embeddings", input="a"))["data"][0]["index"] == 0
    assert len((await send(query="a", documents=["b"]))["results"]) == 1
    assert len((await openai("/v1/rerank", query="a", documents=["b"]))["results"]) == 1


# ---- reranking -----------------------------------------------------------------------------------------


def predicted(folder: Path, query: str, documents: list[str]) -> list[float]:
    """The scores that sentence-transformers gives, one pair at a time."""
    import torch
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device="cpu", activation_fn=torch.nn.Identity())
    return [float(model.predict([(query, text)], show_progress_bar=False)[0]) for text in documents]


@pytest.mark.engine
@pytest.mark.parametrize("name", ["rank-bert", "bge-reranker-base"])
async def test_a_cross_encoder_ranks_as_the_library_does(
    use: Callable[..., Any], models: Path, name: str
) -> None:
    use(name)
    documents = [*DOCUMENTS, "", LONG]
    expected = predicted(models / name, QUERY, documents)
    assert max(expected) - min(expected) > 0.1, "scores that hardly differ would prove nothing"
    answer = await send(query=QUERY, documents=documents, raw_scores=True)
    order = [result["index"] for result in answer["results"]]
    assert order == sorted(range(len(documents)), key=lambda index: -expected[index])
    for result in answer["results"]:
        assert set(result) == {"index", "relevance_score"}
        assert type(result["relevance_score"]) is float
        assert result["relevance_score"] == pytest.approx(expected[result["index"]], abs=1e-5)
    assert (answer["method"], answer["truncated"]) == ("cross-encoder", 1)
    jobs = await asyncio.gather(*(send(query=QUERY, documents=[text]) for text in documents))
    for job, score in zip(jobs, expected, strict=True):
        assert job["results"][0]["relevance_score"] == pytest.approx(1 / (1 + math.exp(-score)), abs=1e-5)


@pytest.mark.engine
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


@pytest.mark.engine
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
    problem = json.loads((await openai("/v1/rerank", model="other", query="a", documents=["b"]))["error"])
    assert (problem["param"], problem["code"]) == ("model", "model_not_found")


@pytest.mark.engine
@pytest.mark.parametrize("name", ["rank-bert", "bge-reranker-base", "bge-small-en"])
async def test_a_long_document_is_cut_and_a_long_query_is_not(use: Callable[..., Any], name: str) -> None:
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


@pytest.mark.engine
async def test_a_reranker_says_that_it_gives_no_embeddings(use: Callable[..., Any]) -> None:
    use("rank-bert", served_model_name="me/ranker")
    for answer in (await send(texts=["a"]), await openai("/v1/embeddings", input="a"), await send()):
        problem = json.loads(answer["error"])
        assert problem["code"] == "no_embeddings"
        assert "me/ranker is a reranker" in problem["message"]
        assert "query and documents" in problem["message"]


# ---- batching ------------------------------------------------------------------------------------------


class Watch:
    """Notes the batches that an engine runs: the lengths of the items in each."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch, most: int = 10**9) -> None:
        import torch

        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self._waiting = lambda: len(model._batcher._waiting)
        run = model._batcher._run

        def watched(items: list[Any]) -> Any:
            self.batches.append([len(item.tokens) for item in items])
            assert self.gate.wait(60)
            if len(items) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return run(items)

        monkeypatch.setattr(model._batcher, "_run", watched)

    async def gathered(self, jobs: list[Any], items: int) -> list[Any]:
        """The answers of `jobs`, which run from the moment that all of their items have come in."""
        self.gate.clear()
        answers = asyncio.gather(*jobs)
        async with asyncio.timeout(60):
            while sum(map(len, self.batches)) + self._waiting() < items:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        self.gate.set()
        return list(await answers)


@pytest.mark.engine
@pytest.mark.parametrize("name", ["bge-small-en", "rank-bert"])
async def test_jobs_run_together_within_the_budget(
    use: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in (worker, embeddings):
        monkeypatch.setattr(module, "parallel_batches", lambda _: 2)
    engine = use(name, max_batch_tokens=100)
    watch = Watch(engine.model, monkeypatch)
    texts = [" ".join(["panda"] * (1 + 7 * i % 30)) for i in range(40)] + [LONG]
    if name == "rank-bert":
        sent = [send(query="a", documents=[text, "b"]) for text in texts]
    else:
        sent = [send(texts=[text, "b"]) for text in texts]
    jobs = await watch.gathered(sent, 2 * len(texts))
    assert not any("error" in job for job in jobs)
    assert sum(map(len, watch.batches)) == 2 * len(texts)
    assert len(watch.batches) < len(texts)
    assert [128] in watch.batches, "what is longer than the budget runs alone"
    for batch in watch.batches:
        assert len(batch) == 1 or max(batch) * len(batch) <= 100
        assert batch == sorted(batch, reverse=True)


@pytest.mark.engine
@pytest.mark.parametrize("name", ["bge-small-en", "rank-bert"])
async def test_out_of_memory_halves_the_batch(
    use: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engine = use(name)
    payload = {"query": "a", "documents": DOCUMENTS * 4} if name == "rank-bert" else {"texts": DOCUMENTS * 4}
    expected = await send(**payload)
    watch = Watch(engine.model, monkeypatch, most=3)
    answer = await send(**payload)
    assert max(map(len, watch.batches)) > 3, "it did run out of memory"
    if name == "rank-bert":
        scores, same = ({r["index"]: r["relevance_score"] for r in a["results"]} for a in (answer, expected))
        assert scores == pytest.approx(same, abs=1e-5)
    else:
        np.testing.assert_allclose(answer["embeddings"], expected["embeddings"], atol=1e-5)


@pytest.mark.engine
@pytest.mark.parametrize("name", ["bge-small-en", "rank-bert"])
async def test_what_cannot_be_tokenized_fails_alone(use: Callable[..., Any], name: str) -> None:
    use(name)
    texts = ["a", "half a character \ud83d", "b"]
    if name == "rank-bert":
        jobs = await asyncio.gather(*(send(query="q", documents=[text]) for text in texts))
    else:
        jobs = await asyncio.gather(*(send(text=text) for text in texts))
    assert ["error" in job for job in jobs] == [False, True, False]
    problem = json.loads(jobs[1]["error"])
    assert problem["code"] == "invalid_value"
    assert "half of a surrogate pair" in problem["message"]


@pytest.mark.engine
@pytest.mark.parametrize("name", ["bge-small-en", "rank-bert"])
async def test_what_goes_before_each_text_cannot_fill_the_memory(use: Callable[..., Any], name: str) -> None:
    """A request of 40 kB would become one of 320 MB."""
    use(name)
    many, long = ["a"] * 8000, "x " * 20_000
    if name == "rank-bert":
        answer, param = await send(query=long, documents=many), "query"
    else:
        answer, param = await send(texts=many, instruction=long, dimensions=2), "instruction"
    problem = json.loads(answer["error"])
    assert (problem["code"], problem["param"]) == ("too_large", param)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "field"), [("bge-small-en", "prompt"), ("bge-small-en", "instruction"), ("rank-bert", "query")]
)
async def test_an_error_about_what_goes_before_each_text_names_that(
    use: Callable[..., Any], name: str, field: str
) -> None:
    use(name)
    texts = {"documents" if field == "query" else "texts": ["a"]}
    assert json.loads((await send(**texts, **{field: "\ud83d"}))["error"])["param"] == field


@pytest.mark.engine
async def test_two_thousand_documents_in_one_job(use: Callable[..., Any]) -> None:
    use("rank-bert")
    documents = [DOCUMENTS[i % 5] for i in range(2000)]
    answer = await send(query=QUERY, documents=documents, top_n=5)
    few = await send(query=QUERY, documents=DOCUMENTS)
    assert {result["index"] % 5 for result in answer["results"]} == {few["results"][0]["index"]}
    assert answer["usage"]["total_tokens"] == 400 * few["usage"]["total_tokens"]


# ---- a real model --------------------------------------------------------------------------------------

# A question, the passage that answers it, and one that shares more of its words and does not.
RETRIEVAL = [
    (
        "How tall is the tower in Paris?",
        "The Eiffel Tower rises 330 metres above the Champ de Mars.",
        "How is the weather in Paris? In June the evenings are mild.",
    ),
    (
        "Which animal sleeps most of the day?",
        "Koalas sleep up to twenty hours, longer than any other creature.",
        "Which of the shops is open most of the day?",
    ),
    (
        "Who wrote the book about the white whale?",
        "Herman Melville published Moby-Dick, a novel of the sea, in 1851.",
        "Who painted the kitchen white, and who wrote the letter about the colour?",
    ),
    (
        "Why do leaves turn red in autumn?",
        "As nights grow longer, chlorophyll breaks down and other pigments show.",
        "Why do prices turn down in the sales?",
    ),
    (
        "How is bread made to rise?",
        "Yeast ferments sugar into carbon dioxide, and the dough expands.",
        "How is rent made to rise every year?",
    ),
    (
        "How do I undo my last commit?",
        "git reset --soft HEAD~1 moves the branch back and keeps your changes.",
        "How do I find the last page of my diary?",
    ),
    (
        "When does the bank open on Saturday?",
        "Weekend hours of our branch: money is paid out from nine to noon.",
        "When does the film on the open air stage end?",
    ),
    (
        "What is a good cure for a headache?",
        "Aspirin and a dark quiet room relieve most pain in the temples.",
        "What is a good name for a band?",
    ),
]


def shared_words(one: str, other: str) -> int:
    words = [set(re.findall(r"\w+", text.lower())) for text in (one, other)]
    return len(words[0] & words[1])


@pytest.mark.engine
async def test_the_right_passage_ranks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = worker.Settings(model_name=str(minilm()), served_model_name="all-MiniLM-L6-v2")
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


@pytest.mark.engine
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


@pytest.mark.engine
def test_a_reranker_is_served_and_a_classifier_is_refused(models: Path) -> None:
    with running("bge", env={"MODEL_NAME": str(models / "rank-bert"), "HF_HUB_OFFLINE": "1"}) as platform:
        answer = runsync(platform, query=QUERY, documents=DOCUMENTS, top_n=2)["output"]
        expected = predicted(models / "rank-bert", QUERY, DOCUMENTS)
        assert [result["index"] for result in answer["results"]] == list(np.argsort(expected)[:-3:-1])
        failed = runsync(platform, texts=["a"])
        assert (failed["status"], json.loads(failed["error"])["code"]) == ("FAILED", "no_embeddings")
    classifier = tiny.reranker(models / "nli", labels=3)
    with running("bge", env={"MODEL_NAME": str(classifier), "HF_HUB_OFFLINE": "1"}) as platform:
        failed = runsync(platform, query=QUERY, documents=DOCUMENTS)
        assert json.loads(failed["error"])["code"] == "unsupported_model"
