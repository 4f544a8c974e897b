"""Memory of the worker process over thousands of jobs, in both modes."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import psutil
import pytest

from local import running
from tools.models import local_env

pytestmark = [pytest.mark.engine, pytest.mark.soak]
JOBS, CLIENTS = 5000, 32
BAD: list[dict[str, Any]] = [
    {},
    {"texts": ["a", None]},
    {"text": "a", "dimensions": 999},
    {"text": "a", "unknown": "x" * 10_000},
    {"texts": ["half \ud83d"] * 20},
    {"texts": ["a"] * 10_000},
    {"text": "word " * 400, "truncate": False},
    {"openai_route": "/v1/embeddings", "openai_input": {"input": [1, 2, 3]}},
]


def good(rng: random.Random) -> dict[str, Any]:
    texts = [" ".join(["word"] * rng.choice([1, 5, 20, 100])) for _ in range(rng.choice([1, 1, 1, 4, 16]))]
    if rng.random() < 0.3:
        return {"openai_route": "/v1/embeddings", "openai_input": {"input": texts}}
    return {"texts": texts, "encoding_format": rng.choice(["float", "base64"])}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", ["queue", "http"])
def test_memory_is_flat_after_the_first_fifth(mode: Literal["queue", "http"]) -> None:
    """Mixed jobs, a third of them bad. MiB of resident memory after each fifth."""
    rng = random.Random(0)
    jobs = [(number % 3 == 0, rng.choice(BAD) if number % 3 == 0 else good(rng)) for number in range(JOBS)]
    with running("sentence-transformers", mode=mode, env=local_env("sentence-transformers")) as platform:
        worker = psutil.Process(platform.workers[0].pid)
        headers = {"Authorization": "Bearer local", "Content-Type": "application/json"}
        with (
            httpx.Client(base_url=platform.endpoint_url, headers=headers, timeout=120) as client,
            ThreadPoolExecutor(CLIENTS) as threads,
        ):

            def fails(payload: dict[str, Any]) -> bool:
                answer = client.post("/runsync", content=json.dumps({"input": payload}))  # \ud83d as it is
                return answer.json()["status"] == "FAILED"

            resident = []
            for start in range(0, JOBS, JOBS // 5):
                part = jobs[start : start + JOBS // 5]
                assert list(threads.map(fails, [payload for _, payload in part])) == [bad for bad, _ in part]
                resident.append(worker.memory_info().rss / 2**20)
    print(mode, [round(size) for size in resident])
    # The allocator may keep freed memory; growth beyond the bound would be a leak.
    assert resident[-1] < resident[0] * 1.06, resident
