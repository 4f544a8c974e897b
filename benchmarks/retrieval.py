"""256 embedding jobs at once, and 64 rerankings: workers/bge on a model of all-MiniLM-L6-v2's size.

Beside it the naive handler, and in processes of their own one offline `SentenceTransformer.encode` and one
`CrossEncoder.predict` over the same texts. What is compared is measured in turn, so that a machine that slows
down slows all of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.embeddings import middle
from benchmarks.harness import HERE, Burst, bare, burst, machine, table, texts, write
from local import running
from tools.models import made, minilm

WORKER = "bge"
NAIVE = HERE / "naive" / f"{WORKER}.py"
JOBS, NAIVE_JOBS, RANKINGS, DOCUMENTS, ROUNDS = 256, 24, 64, 8, 3
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def make_reranker(folder: Path) -> None:
    """A cross-encoder of ms-marco-MiniLM-L6's shape: all-MiniLM-L6-v2 with a head of random weights."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder)


def embed(values: Sequence[str]) -> dict[str, Any]:
    env = OFFLINE | {"MODEL_NAME": str(minilm())}
    ours: list[Burst] = []
    offline: list[float] = []
    handler: list[float] = []
    jobs = [{"texts": [value]} for value in values]
    with (
        running(WORKER, env=env) as worker,
        bare("encode", str(minilm()), env) as library,
        bare("jobs", WORKER, env) as direct,
    ):
        library.ask(values[:8])
        direct.ask(jobs[:8])
        burst(worker, jobs[:8])
        for number in range(ROUNDS):
            print(f"  round {number + 1} of {ROUNDS}: {JOBS} texts offline and as jobs", flush=True)
            seconds, vectors = library.ask(values)
            offline.append(seconds)
            handler.append(direct.ask(jobs)[0])
            ours.append(burst(worker, jobs))
    got = np.array([job["embeddings"][0] for job in ours[-1].outputs], np.float32)
    print(f"  the naive handler, {NAIVE_JOBS} jobs", flush=True)
    with running(NAIVE, env=env) as worker:
        slow = burst(worker, jobs[:NAIVE_JOBS])
    difference = float(np.abs(got - np.array(vectors, np.float32)).max())
    return {"ours": ours, "offline": offline, "handler": handler, "naive": slow, "difference": difference}


def rerank(values: Sequence[str]) -> dict[str, Any]:
    model = str(made("benchmark-reranker", make_reranker))
    env = OFFLINE | {"MODEL_NAME": model}
    queries = texts(RANKINGS, 4, 12, seed=2)
    sets = [values[start : start + DOCUMENTS] for start in range(0, RANKINGS * DOCUMENTS, DOCUMENTS)]
    jobs = [{"query": query, "documents": documents} for query, documents in zip(queries, sets, strict=True)]
    pairs: Any = [[query, text] for query, documents in zip(queries, sets, strict=True) for text in documents]
    ours: list[Burst] = []
    offline: list[float] = []
    with running(WORKER, env=env) as worker, bare("predict", model, env) as library:
        library.ask(pairs[:8])
        burst(worker, jobs[:8])
        for number in range(ROUNDS):
            print(f"  round {number + 1} of {ROUNDS}: {len(pairs)} pairs offline and as jobs", flush=True)
            seconds, scores = library.ask(pairs)
            offline.append(seconds)
            ours.append(burst(worker, jobs))
    got = [
        {result["index"]: result["relevance_score"] for result in job["results"]} for job in ours[-1].outputs
    ]
    flat = [row[index] for row in got for index in range(DOCUMENTS)]
    return {
        "ours": ours,
        "offline": offline,
        "difference": float(np.abs(np.array(flat) - np.array(scores)).max()),
    }


def report(
    embedded: dict[str, Any], ranked: dict[str, Any], where: dict[str, str]
) -> tuple[str, dict[str, Any]]:
    ours, slow = middle(embedded["ours"]), embedded["naive"]
    offline = JOBS / statistics.median(embedded["offline"])
    handler = JOBS / statistics.median(embedded["handler"])
    ranking = middle(ranked["ours"])
    pairs = ranking.rate * DOCUMENTS
    predicted = RANKINGS * DOCUMENTS / statistics.median(ranked["offline"])
    goals = [
        (
            "embedding jobs/s, times the naive handler",
            ours.rate / slow.rate,
            ">= 30",
            ours.rate / slow.rate >= 30,
        ),
        (
            "embedding jobs/s, times one offline encode",
            ours.rate / offline,
            ">= 1.0",
            ours.rate / offline >= 1,
        ),
        ("the same, the handler called without SDK and platform", handler / offline, "", None),
        ("pairs/s, times one offline CrossEncoder.predict", pairs / predicted, "", None),
        ("largest difference of an embedding", f"{embedded['difference']:.1e}", "", None),
        ("largest difference of a score", f"{ranked['difference']:.1e}", "", None),
    ]
    verdict = {True: "yes", False: "**no**", None: ""}
    rows = [
        (f"naive handler, {NAIVE_JOBS} jobs", slow.rate, *list(slow.summary().values())[2:]),
        (f"this worker, {JOBS} jobs of one text", ours.rate, *list(ours.summary().values())[2:]),
        (f"its handler called without SDK and platform, {JOBS} jobs", handler, "", "", ""),
        (f"offline encode of {JOBS} texts", offline, "", "", ""),
        (
            f"this worker, {RANKINGS} rerankings of {DOCUMENTS} documents, pairs/s",
            pairs,
            *list(ranking.summary().values())[2:],
        ),
        (f"offline predict of {RANKINGS * DOCUMENTS} pairs", predicted, "", "", ""),
    ]
    text = f"""# Retrieval

Jobs sent at once through `/runsync` of the local platform and the unmodified SDK; texts of 5 to 200 words,
documents of 5 to 60, queries of 4 to 12. Embeddings by all-MiniLM-L6-v2, scores by the same with a head of
random weights. Written by `python -m benchmarks retrieval`. Of {ROUNDS} rounds in turn, the median one.

{table(["", "measured", "aim", "reached"], [(*goal[:3], verdict[goal[3]]) for goal in goals])}

{table(["", "per second", "p50, s", "p95, s", "slowest, s"], rows)}

The naive handler gets fewer jobs because it does one a second, however long the queue is. It also pools every
model by the mean and puts an instruction before documents, which this does not show.

{table(["machine", ""], list(where.items()))}

Platform, client and worker share the machine's cores; the offline calls have them to themselves. A GPU was
not at hand.
"""
    numbers = {
        "machine": where,
        "embedding_jobs_per_second": [found.rate for found in embedded["ours"]],
        "offline_texts_per_second": [JOBS / seconds for seconds in embedded["offline"]],
        "handler_texts_per_second": [JOBS / seconds for seconds in embedded["handler"]],
        "naive": slow.summary(),
        "pairs_per_second": [found.rate * DOCUMENTS for found in ranked["ours"]],
        "offline_pairs_per_second": [RANKINGS * DOCUMENTS / seconds for seconds in ranked["offline"]],
        "goals": [
            {"what": what, "measured": value, "aim": aim, "reached": reached}
            for what, value, aim, reached in goals
        ],
    }
    return text, numbers


def main() -> None:
    where = machine("torch", "sentence-transformers", "transformers", "runpod")
    print("Embedding", flush=True)
    embedded = embed(texts(JOBS, 5, 200))
    print("Reranking", flush=True)
    ranked = rerank(texts(RANKINGS * DOCUMENTS, 5, 60, seed=3))
    write("retrieval", *report(embedded, ranked, where))


if __name__ == "__main__":
    main()
