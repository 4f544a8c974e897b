"""The huggingface worker under the local platform, with the unmodified SDK and OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from local import Platform, running
from tests.workers.huggingface.in_process import MESSAGES
from tools.models import local_env

pytestmark = pytest.mark.engine
MODEL = "tiny-random/llama"


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with running("huggingface", env=local_env("huggingface")) as platform:
        yield platform


@pytest.fixture(scope="module")
def client(platform: Platform) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=platform.openai_url, api_key="local", max_retries=0) as client:
        yield client


def runsync(platform: Platform, **payload: Any) -> Any:
    return requests.post(
        f"{platform.endpoint_url}/runsync",
        json={"input": payload},
        headers={"Authorization": "Bearer local"},
        timeout=120,
    ).json()


def test_chat_completions(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    request: dict[str, Any] = {
        "model": MODEL, "messages": MESSAGES, "max_tokens": 20, "seed": 3, "extra_body": {"top_k": 20},
    }  # fmt: skip
    complete = client.chat.completions.create(**request)
    (choice,) = complete.choices
    assert choice.finish_reason == "length"
    assert complete.usage is not None
    assert complete.usage.completion_tokens == 20
    options = {"include_usage": True}
    *chunks, last = client.chat.completions.create(**request, stream=True, stream_options=options)
    assert last.usage == complete.usage
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.delta.content or "" for choice in choices) == choice.message.content
    assert choices[0].delta.role == "assistant"
    assert [choice.finish_reason for choice in choices[-2:]] == [None, "length"]


def test_completions_of_several_prompts(client: openai.OpenAI) -> None:
    prompts = ["The river", "the sea"]
    request: dict[str, Any] = {"model": MODEL, "prompt": prompts, "n": 2, "max_tokens": 9, "temperature": 0}
    texts = [choice.text for choice in client.completions.create(**request).choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    streamed = [""] * 4
    for chunk in client.completions.create(**request, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.text
    assert streamed == texts


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"model": "gpt-4o"}, "model_not_found"),
        ({"extra_body": {"echo": True}}, "unsupported"),
        ({"extra_body": {"num_beams": 2}}, "unsupported"),
        ({"max_tokens": 5000}, "too_long"),
    ],
)
def test_errors(client: openai.OpenAI, fields: dict[str, Any], code: str) -> None:
    request = {"model": MODEL, "messages": MESSAGES, **fields}
    assert code in client.chat.completions.with_raw_response.create(**request).text


def test_jobs_of_many_clients_get_their_own_answers(platform: Platform) -> None:
    def ask(number: int) -> Any:
        body = runsync(platform, prompt="The river", max_tokens=30, seed=number % 8, temperature=1.0)
        assert body["status"] == "COMPLETED", body
        return body["output"][0]["response"]

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(48)))
    assert answers == answers[:8] * 6
    assert len(set(answers)) > 4


def test_without_streaming_the_answer_is_the_object_itself() -> None:
    with running("huggingface", env={**local_env("huggingface"), "STREAMING": "false"}) as platform:
        answer = runsync(platform, prompt="The river", max_tokens=3)
        assert answer["output"]["finish_reason"] == "length"
        assert "STREAMING=false" in runsync(platform, prompt="The river", stream=True)["error"]


# The engine dies at the first step that both jobs are in. While one of them waits for the other, its steps
# take so long, and its answer is so far from an end, that it cannot be over before.
DYING = """
import runpy, time
from serving.continuous_batching.generator import Generator

decode = Generator.decode

def fail(self, batch):
    max_tokens = {sequence.params.max_tokens for sequence in batch.sequences}
    if {77, 1500} <= max_tokens:
        raise RuntimeError("CUDA error: device-side assert triggered")
    if max_tokens & {77, 1500}:
        self.eos_token_ids = frozenset()
        time.sleep(1)
    return decode(self, batch)

Generator.decode = fail
runpy.run_module("workers.huggingface.handler", run_name="__main__", alter_sys=True)
"""


def test_a_worker_whose_engine_dies_is_replaced(tmp_path: Path) -> None:
    """Its jobs fail with the cause, and the next job is answered by another process."""
    script = tmp_path / "handler.py"
    script.write_text(DYING)
    with running(script, env=local_env("huggingface")) as platform:

        def ask(max_tokens: int) -> Any:
            return runsync(platform, prompt="The river", max_tokens=max_tokens)

        first = platform.workers[0]
        with ThreadPoolExecutor(2) as pool:
            for answer in pool.map(ask, (1500, 77)):
                assert answer["status"] == "FAILED", answer
                assert json.loads(answer["error"])["code"] == "engine_died"
        answer = ask(5)
        assert answer["status"] == "COMPLETED", answer
        assert first not in platform.workers
