"""The llava worker under the local platform, with the unmodified SDK and OpenAI's client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import requests

from local import Platform, running
from tests.helpers import wait_until
from tests.workers.llava.in_process import WHAT, answer_to, png, question
from tools.models import local_env
from tools.models.tiny_llava import ANSWERS, ENDLESS

pytestmark = pytest.mark.engine

# An answer of 4050 tokens takes two minutes, so that it is far from its end on any machine.
SLOW = """
import runpy, time
from serving.continuous_batching.generator import Generator

decode = Generator.decode

def slow(self, batch):
    time.sleep(0.03 if any(sequence.params.max_tokens == 4050 for sequence in batch.sequences) else 0)
    return decode(self, batch)

Generator.decode = slow
runpy.run_module("workers.llava.handler", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    script = tmp_path_factory.mktemp("slow") / "handler.py"
    script.write_text(SLOW)
    # One thread, since tensors this small are much slower on two.
    env = {**local_env("llava"), "OMP_NUM_THREADS": "1", "MAX_BATCH_TOKENS": "4200"}
    with running(script, env=env) as platform:
        yield platform


def call(platform: Platform, path: str, **payload: Any) -> Any:
    """The platform's answer; without a payload to GET."""
    return requests.request(
        "POST" if payload or path.startswith("cancel") else "GET",
        f"{platform.endpoint_url}/{path}",
        json=payload or None,
        headers={"Authorization": "Bearer any"},
        timeout=120,
    ).json()


def test_the_official_client_is_served(platform: Platform) -> None:
    with openai.OpenAI(base_url=platform.openai_url, api_key="any", max_retries=0) as client:
        request: dict[str, Any] = {"model": client.models.list().data[0].id, "messages": question("lime")}
        complete = client.chat.completions.create(**request)
        assert complete.choices[0].message.content == answer_to("lime")
        assert complete.choices[0].finish_reason == "stop"
        options = {"include_usage": True}
        *chunks, last = client.chat.completions.create(**request, stream=True, stream_options=options)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer_to("lime")
        assert last.usage == complete.usage


def test_jobs_of_many_clients(platform: Platform) -> None:
    colours = [list(ANSWERS)[number % 4] for number in range(32)]
    ids = [
        call(platform, "run", input={"image": png(colour), "prompt": WHAT, "stream": number % 2 == 1})["id"]
        for number, colour in enumerate(colours)
    ]
    for job_id, colour in zip(ids, colours, strict=True):
        wait_until(lambda job_id=job_id: call(platform, f"status/{job_id}")["status"] == "COMPLETED")
        parts = call(platform, f"status/{job_id}")["output"]
        assert "".join(part["response"] for part in parts) == answer_to(colour)
    failed = call(platform, "runsync", input={"image": "AAAA", "prompt": WHAT})
    assert failed["status"] == "FAILED"
    assert json.loads(failed["error"])["code"] == "bad_image"


def test_cancelling_a_job_frees_the_worker(platform: Platform) -> None:
    """The endless answer fills the cache, and would take two minutes."""
    endless = {"image": png("red"), "prompt": ENDLESS, "max_tokens": 4050, "stream": True}
    job_id = call(platform, "run", input=endless)["id"]
    wait_until(lambda: call(platform, f"stream/{job_id}")["stream"])
    call(platform, f"cancel/{job_id}")
    begin = time.monotonic()
    answer = call(platform, "runsync", input={"image": png("red"), "prompt": WHAT, "max_tokens": 200})
    assert answer["output"][0]["response"] == answer_to("red")
    assert time.monotonic() - begin < 40
    assert call(platform, f"status/{job_id}")["status"] == "CANCELLED"
