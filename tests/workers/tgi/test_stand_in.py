"""The stand-in for TGI, held to Hugging Face's own client and to its published source."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import requests
from huggingface_hub import InferenceClient
from huggingface_hub.errors import GenerationError, ValidationError

from tools.stand_ins import tgi as stand_in
from tools.workers import ROOT

pytestmark = pytest.mark.engine
TALK = [{"role": "user", "content": "Name three rivers."}]


@pytest.fixture
def url(worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """huggingface_hub's clients send nothing while it is offline, as workers set it in other tests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return str(worker.engine.client.url)


def test_text_generation_of_the_official_client(url: str) -> None:
    client, streaming = InferenceClient(f"{url}/generate"), InferenceClient(f"{url}/generate_stream")
    answer = client.text_generation("The river", max_new_tokens=9, details=True)
    assert answer.details is not None
    assert answer.details.generated_tokens == len(answer.details.tokens) == 9
    *events, last = streaming.text_generation("The river", max_new_tokens=9, details=True, stream=True)
    # A stream never has the last character where the last token has only a part of it.
    text = "".join(event.token.text for event in [*events, last])
    assert text == answer.generated_text.rstrip("\ufffd")
    assert last.generated_text == answer.generated_text
    assert last.details is not None
    assert (last.details.input_length, last.details.finish_reason) == (2, "length")
    with pytest.raises(ValidationError, match="Given: 2000 `inputs` tokens"):
        client.text_generation(" river" * 2000, max_new_tokens=50)
    with pytest.raises(ValidationError, match="`top_p` must be"):
        client.text_generation("a", top_p=1.0)
    with pytest.raises(GenerationError, match="CUDA error"):
        list(streaming.text_generation("[[fail 2]]", stream=True))


def test_chat_completion_of_the_official_client(url: str) -> None:
    client = InferenceClient(model=url, timeout=60)
    chat = client.chat_completion(TALK, max_tokens=9, logprobs=True, top_logprobs=2, temperature=0)
    logprobs, text = chat.choices[0].logprobs, (chat.choices[0].message.content or "").rstrip("\ufffd")
    assert logprobs is not None
    assert "".join(token.token for token in logprobs.content) == text
    options: Any = {"max_tokens": 9, "temperature": 0, "stream_options": {"include_usage": True}}
    chunks = list(client.chat_completion(TALK, stream=True, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == chat.usage.total_tokens


@pytest.mark.parametrize(
    ("path", "body", "text"),
    [
        ("/generate", {"inputs": "a", "parameters": {"do_sample": None}}, "do_sample: "),
        ("/generate", {}, "missing field `inputs`"),
        ("/generate", {"inputs": "a", "parameters": {"temperature": 0.0}}, "strictly positive"),
        ("/v1/chat/completions", {"messages": TALK, "stop": "x"}, "stop: "),
        ("/v1/chat/completions", {"messages": TALK, "stream_options": None}, "stream_options: "),
        ("/v1/completions", {"prompt": list("abcde")}, "maximum allowed batch size of 4"),
    ],
)
def test_what_tgi_refuses(url: str, path: str, body: dict[str, Any], text: str) -> None:
    answer = requests.post(url + path, json=body, timeout=60)
    assert answer.status_code == 422
    assert text in answer.text


def test_the_version_that_the_images_build_checks() -> None:
    command = [sys.executable, stand_in.__file__, "--version"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.split() == ["text-generation-launcher", stand_in.VERSION]
    dockerfile = (ROOT / "workers/tgi/Dockerfile").read_text()
    assert f'= "text-generation-launcher {stand_in.VERSION}"\n' in dockerfile
