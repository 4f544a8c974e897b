"""multilingual-e5-small in the bge worker and MiniLM in sentence-transformers, beside the libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.helpers import send
from tests.quality import page
from tools.models import real_env
from tools.workers import load_handler

pytestmark = pytest.mark.engine
# Each query and the passage that answers it, mostly in another language. Neighbours share a subject.
LINES = Path(__file__).with_name("passages.tsv").read_text().splitlines()
QUERIES, PASSAGES = ([line.split("\t")[i] for line in LINES] for i in (0, 1))
SENTENCES = [
    "A man is eating food.", "Someone is having a meal.", "A man eats a piece of bread.",
    "The stock market fell sharply.", "Shares dropped this afternoon.", "The bank raised its rates.",
    "A girl plays the violin.", "A child is making music.", "Two dogs run through the snow.",
    "The dogs are playing outside.", "It will rain tomorrow.", "The forecast says sunshine.",
    "She closed the door quietly.", "He slammed the door.", "The train was late again.",
    "Our bus did not come.",
]  # fmt: skip
Vectors = NDArray[np.float32]


@pytest.fixture(scope="module")
def bge(fetched: Callable[[str], Path]) -> Iterator[ModuleType]:
    fetched("e5-small")
    yield from prepared("bge")


@pytest.fixture(scope="module")
def minilm(fetched: Callable[[str], Path]) -> Iterator[ModuleType]:
    fetched("minilm")
    yield from prepared("sentence-transformers")


def prepared(name: str) -> Iterator[ModuleType]:
    module = load_handler(name)
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in real_env(name).items():
            patch.setenv(variable, value)
        module.prepare()
    yield module
    del module.engine


async def embed(module: ModuleType, texts: list[str], **fields: Any) -> Vectors:
    answer = await send(module.handler, texts=texts, **fields)
    assert "error" not in answer, answer
    return np.array(answer["embeddings"], np.float32)


def plainly(texts: list[str]) -> Vectors:
    """The mean of the last states, by transformers alone, each text by itself."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = real_env("bge")["MODEL_NAME"]
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    vectors = []
    with torch.inference_mode():
        for text in texts:
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state  # (1, seq, width)
            vectors.append(torch.nn.functional.normalize(states.mean(1), dim=-1)[0].numpy())
    return np.stack(vectors)


def ndcg(scores: Vectors) -> float:
    """At ten, with one relevant passage for each query. scores: (queries, passages)."""
    ranks = (scores > scores.diagonal()[:, None]).sum(1)
    return float(np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean())


async def test_rankings_are_those_of_transformers_and_the_query_prefix_helps(bge: ModuleType) -> None:
    queries, passages = await embed(bge, QUERIES, input_type="query"), await embed(bge, PASSAGES)
    wanted = (
        plainly([f"query: {query}" for query in QUERIES])
        @ plainly([f"passage: {passage}" for passage in PASSAGES]).T
    )
    scores = queries @ passages.T
    assert np.abs(scores - wanted).max() < 1e-5
    # Scores that differ by less than rounding have no order.
    assert (np.take_along_axis(wanted, np.argsort(-scores), 1) - -np.sort(-wanted)).min() > -1e-5
    for i in (0, 13):
        answer = await send(bge.handler, query=QUERIES[i], documents=PASSAGES)
        ranked = [result["index"] for result in answer["results"]]
        assert (np.diff(wanted[i, ranked]) < 1e-5).all()
    as_documents = (await embed(bge, QUERIES)) @ passages.T
    without = (await embed(bge, QUERIES, instruction="")) @ (await embed(bge, PASSAGES, instruction="")).T
    RESULTS["bge: nDCG@10 with multilingual-e5-small's prefixes"] = ndcg(scores)
    RESULTS["bge: nDCG@10 with the passages' prefix before queries too"] = ndcg(as_documents)
    RESULTS["bge: nDCG@10 without prefixes"] = ndcg(without)
    RESULTS["bge: largest difference of a score from plain transformers'"] = float(
        np.abs(scores - wanted).max()
    )
    assert ndcg(scores) > 0.93
    assert ndcg(scores) > ndcg(as_documents) + 0.05


async def test_similarities_rank_as_the_librarys(minilm: ModuleType) -> None:
    from scipy.stats import spearmanr
    from sentence_transformers import SentenceTransformer

    ours = await embed(minilm, SENTENCES)
    model = SentenceTransformer(real_env("sentence-transformers")["MODEL_NAME"], device="cpu")
    theirs = model.encode(SENTENCES, normalize_embeddings=True)
    pairs = np.triu_indices(len(SENTENCES), 1)
    correlation = spearmanr((ours @ ours.T)[pairs], (theirs @ theirs.T)[pairs]).statistic
    RESULTS["sentence-transformers: Spearman's correlation with `encode`, 120 pairs"] = float(correlation)
    assert correlation == pytest.approx(1.0, abs=1e-6)


RESULTS: dict[str, float] = {}


@pytest.mark.quality
def test_the_page_has_them() -> None:
    """Last: what the tests above have measured."""
    assert len(RESULTS) == 5
    page.write("Embeddings", page.table(["", "measured"], [[name, value] for name, value in RESULTS.items()]))
