"""`make run`: the embeddings worker under the local platform, from cold start to a table of similarities."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
import urllib.request
from typing import Any

import numpy as np
from openai import OpenAI

from local import running
from local.endpoint import Endpoint
from tools.models import real_env

WORKER = "sentence-transformers"
SENTENCES = [
    "A man is eating food.",
    "Someone is having a meal.",
    "The stock market fell sharply.",
    "Shares dropped this afternoon.",
]


def runsync(platform: Endpoint, payload: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The job's answer, and the milliseconds from the request to it. Raises RuntimeError if it failed."""
    request = urllib.request.Request(  # noqa: S310, the address is loopback
        f"{platform.endpoint_url}/runsync",
        data=json.dumps({"input": payload}).encode(),
        headers={"Content-Type": "application/json", "Authorization": "Bearer local"},
    )
    begin = time.monotonic()
    with urllib.request.urlopen(request, timeout=90) as response:  # noqa: S310
        answer: dict[str, Any] = json.load(response)
    if answer["status"] != "COMPLETED":
        raise RuntimeError(f"The job ended as {answer['status']}: {answer.get('error')}")
    return answer, (time.monotonic() - begin) * 1000


def similarities(vectors: np.ndarray) -> str:
    """The cosine of each pair of unit vectors, as a table."""
    width = max(map(len, SENTENCES))
    lines = [" " * (width + 6) + "".join(f"{i + 1:>7}" for i in range(len(SENTENCES)))]
    for number, (sentence, scores) in enumerate(zip(SENTENCES, vectors @ vectors.T, strict=True)):
        lines.append(f"  {number + 1}  {sentence:<{width}} " + "".join(f"{score:7.2f}" for score in scores))
    return "\n".join(lines)


def main() -> None:
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"  # a proxy cannot reach this machine's own
    version = importlib.metadata.version("runpod")
    print(f"Starting workers/{WORKER} under the local platform, with runpod {version} in production mode ...")
    with running(WORKER, env=real_env(WORKER)) as platform:
        worker = platform.workers[0]
        print("\nCold start, seconds")
        for name, seconds in worker.phases.items():
            print(
                f"  {name:<10}{seconds:7.2f}" + ("  from the start of the process" if name == "ready" else "")
            )
        if worker.ready_after is not None:
            print(f"  {'first poll':<10}{worker.ready_after:7.2f}  when the worker polled for its first job")

        answer, milliseconds = runsync(platform, {"texts": SENTENCES})
        output = answer["output"]
        print(f"\nPOST /runsync  {milliseconds:.0f} ms, of which {answer['executionTime']} ms in the worker")
        print(f"  model {output['model']}, {output['count']} texts, {output['dimensions']} dimensions,")
        print(f"  {output['usage']['prompt_tokens']} tokens\n")
        print(similarities(np.array(output["embeddings"])))

        client = OpenAI(base_url=platform.openai_url, api_key="local")
        begin = time.monotonic()
        reply = client.embeddings.create(model=output["model"], input=SENTENCES)
        milliseconds = (time.monotonic() - begin) * 1000
        vectors = np.array([item.embedding for item in reply.data])
        difference = np.abs(vectors - output["embeddings"]).max()
        print(f"\nPOST /openai/v1/embeddings, by the openai client  {milliseconds:.0f} ms")
        print(f"  {len(vectors)} vectors of {vectors.shape[1]}, at most different by {difference:.1e}")
        if difference > 1e-6:
            raise SystemExit("The two answers should be the same.")
    print("\nIt works. make serve-sentence-transformers leaves it running.")


if __name__ == "__main__":
    main()
