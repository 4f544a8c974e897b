"""Chat completions in HTTP mode: the process of the worker, OpenAI's client, and a slow model."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest

from tests.shared.http.servers import running
from tests.workers.llava.in_process import question
from tools.models import local_env

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("worker", "messages"),
    [("huggingface", [{"role": "user", "content": "Name three rivers."}]), ("llava", question("lime"))],
)
def test_a_streamed_chat(worker: str, messages: Any) -> None:
    """Each token is sent as soon as there is one, in chunks with the fields that OpenAI's have."""
    env = {**local_env(worker), "OMP_NUM_THREADS": "1", "PREWARM": "false"}
    with running(worker, module="tests.workers.slow_chat", **env) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
            request: dict[str, Any] = {
                "model": client.models.list().data[0].id, "messages": messages, "max_tokens": 40, "seed": 3,
                "extra_body": {"ignore_eos": True},
            }  # fmt: skip
            complete = client.chat.completions.create(**request)
            begin, chunks, seconds = time.monotonic(), [], []
            for chunk in client.chat.completions.create(
                **request, stream=True, stream_options={"include_usage": True}
            ):
                chunks.append(chunk)
                seconds.append(time.monotonic() - begin)
    assert seconds[0] < seconds[-1] / 4
    assert len(chunks) > 10
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.delta.content or "" for choice in choices) == complete.choices[0].message.content
    assert chunks[-1].usage == complete.usage
    deltas = [set(choice.delta.model_fields_set) for choice in choices]
    assert deltas == [{"role", "content"}, *[{"content"}] * (len(choices) - 2), set()]
    assert choices[-1].finish_reason == complete.choices[0].finish_reason == "length"
