"""The huggingface worker under the local platform, with the unmodified SDK and OpenAI's client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from local import Platform, running
from tests.helpers import runsync
from tools.models import local_env

pytestmark = pytest.mark.engine
# The engine dies at the first step that both jobs of the last test are in. While one of them waits for the
# other, its steps take so long, and its answer is so far from an end, that it cannot be over before.
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


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    script = tmp_path_factory.mktemp("dying") / "handler.py"
    script.write_text(DYING)
    with running(script, env=local_env("huggingface")) as platform:
        yield platform


def test_completions_of_several_prompts(platform: Platform) -> None:
    request: Any = {"model": "tiny-random/llama", "prompt": ["The river", "the sea"], "n": 2, "max_tokens": 9}
    with openai.OpenAI(base_url=platform.openai_url, api_key="local", max_retries=0) as client:
        complete = client.completions.create(**request, temperature=0)
        texts = [choice.text for choice in complete.choices]
        assert texts[0] == texts[1] != texts[2] == texts[3]
        streamed = [""] * 4
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = client.completions.create(**request, temperature=0, **options)
    for chunk in chunks:
        (choice,) = chunk.choices
        streamed[choice.index] += choice.text
    assert (streamed, last.usage) == (texts, complete.usage)


def test_a_worker_whose_engine_dies_is_replaced(platform: Platform) -> None:
    """Its jobs fail with the cause, and the next job is answered by another process."""

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
