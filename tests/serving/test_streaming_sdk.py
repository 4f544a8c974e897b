"""serving.streaming under the unmodified SDK, on the local platform.

Run as a program, this file is the worker. Each of its posts takes 100 ms; it prints their sizes, and what its
engine reports.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from local import running
from serving.streaming import STREAM_LIMIT, coalesce
from tests.helpers import wait_until
from tests.local.conftest import RULES, Client

pytestmark = pytest.mark.engine

TOKEN_S = 0.005
TOKENS = list("Grüße 漢字かな 😀👍🏽 👨‍👩‍👧‍👦 e\u0301 " * 10)[:200]


async def handler(job: dict[str, Any]) -> AsyncIterator[str]:
    async for chunk in coalesce(engine(job["id"], **job["input"])):
        yield chunk


async def engine(job: str, units: list[str], gap_s: float, fails: bool = False) -> AsyncIterator[str]:
    """A unit each `gap_s` by the clock; reports how many it has given when it is closed."""
    started, given = time.monotonic(), 0
    try:
        for given, unit in enumerate(units, 1):
            await asyncio.sleep(started + given * gap_s - time.monotonic())
            yield unit
        if fails:
            raise RuntimeError("engine died")
    finally:
        print(json.dumps({"closed": job, "given": given}), flush=True)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with running(__file__, env={"RUNPOD_LOG_LEVEL": "INFO"}, rules=RULES) as platform:
        yield Client(platform)


def printed(client: Client, key: str) -> list[dict[str, Any]]:
    lines = client.platform.workers[0].lines
    return [json.loads(line) for line in list(lines) if line.startswith(f'{{"{key}"')]


def parts_of(client: Client, name: str) -> list[str]:
    return [item["output"] for item in client.get(f"stream/{name}")["stream"]]


def test_tokens_arrive_about_as_fast_as_they_are_made(client: Client) -> None:
    """200 tokens take the engine a second, and one yield a token would take 200 posts of 100 ms: 20 s."""
    name = client.run(units=TOKENS, gap_s=TOKEN_S)
    output = client.wait(name)["output"]
    parts = parts_of(client, name)
    assert "".join(parts) == "".join(output) == "".join(TOKENS)
    assert len(parts) < len(TOKENS) / 2
    assert len(parts[0]) < len(TOKENS) / 2, "the first does not wait for the others"


@pytest.mark.parametrize("gap_s", [TOKEN_S, 0.5], ids=["in a post", "waiting for the engine"])
def test_a_cancelled_job_closes_its_source_and_others_go_on(client: Client, gap_s: float) -> None:
    cancelled = client.run(units=["x"] * 100_000, gap_s=gap_s)
    kept = client.run(units=TOKENS, gap_s=TOKEN_S)
    wait_until(lambda: parts_of(client, cancelled))
    client.post(f"cancel/{cancelled}")
    wait_until(lambda: any(report["closed"] == cancelled for report in printed(client, "closed")), 10)
    assert "".join(client.wait(kept)["output"]) == "".join(TOKENS)


def test_no_post_is_over_a_megabyte(client: Client) -> None:
    units = ["a\n" * 300_000, "漢" * 700_000, "😀" * 10]
    assert "".join(client.wait(client.run(units=units, gap_s=0))["output"]) == "".join(units)
    sizes = [post["stream_bytes"] for post in printed(client, "stream_bytes")]
    assert STREAM_LIMIT / 2 < max(sizes) <= STREAM_LIMIT


def test_an_error_comes_after_the_text(client: Client) -> None:
    name = client.run(units=TOKENS[:50], gap_s=TOKEN_S, fails=True)
    assert "engine died" in client.wait(name)["error"]
    assert "".join(parts_of(client, name)) == "".join(TOKENS[:50])


if __name__ == "__main__":
    import runpod
    from runpod.serverless.modules import rp_http

    transmit = rp_http._transmit

    async def slow_transmit(session: Any, url: str, data: str) -> None:
        if "stream" in url:
            print(json.dumps({"stream_bytes": len(data.encode())}), flush=True)
            await asyncio.sleep(0.1)
        await transmit(session, url, data)

    rp_http._transmit = slow_transmit
    runpod.serverless.start(
        {"handler": handler, "return_aggregate_stream": True, "concurrency_modifier": lambda _: 4}
    )
