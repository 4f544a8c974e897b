"""The stand-in for TGI, held to Hugging Face's own client and to its published source."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from huggingface_hub import InferenceClient
from huggingface_hub.errors import GenerationError, ValidationError

from tests.helpers import wait_until
from tools.models import made, tiny_causal
from tools.stand_ins import tgi as stand_in
from tools.workers import ROOT

pytestmark = pytest.mark.engine
TALK = [{"role": "user", "content": "Name three rivers."}]


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub's clients send nothing while it is offline, as workers set it in other tests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def launcher(*arguments: str, **env: str) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if key.lower() not in stand_in.ARGUMENTS}
    return subprocess.Popen(
        [sys.executable, stand_in.__file__, *arguments], env=clean | env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@contextmanager
def serving(model: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a stand-in that serves `model`, and its process."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    process = launcher("--model-id", str(model), "--hostname", "127.0.0.1", "--port", port, *arguments)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return process.poll() is not None or requests.get(f"{url}/health", timeout=10).ok
        except requests.RequestException:
            return False

    try:
        wait_until(answers)
        assert process.poll() is None, process.communicate()[0]
        yield url, process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def with_bos(source: Path, folder: Path) -> Path:
    """The model in `source` with its template where TGI looks for it, and a token before every text."""
    (folder / "config.json").write_text((source / "config.json").read_text())
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }}" + tiny_causal.CHAT_TEMPLATE
    config["bos_token"] = "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_bos(made("huggingface", tiny_causal.make), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with serving(model) as (url, _):
        yield url


def post(url: str, path: str, **body: Any) -> requests.Response:
    return requests.post(url + path, json=body, timeout=60)


# ---- the official clients ------------------------------------------------------------------------------


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
    assert (last.details.input_length, last.details.finish_reason) == (3, "length")
    with pytest.raises(ValidationError, match="Given: 2001 `inputs` tokens"):
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


# ---- its HTTP ------------------------------------------------------------------------------------------


def test_events_have_axums_form(url: str) -> None:
    """No blank before JSON, comments in between, and no [DONE] on TGI's own route."""
    events = post(url, "/generate_stream", inputs="a", parameters={"max_new_tokens": 2}).text.split("\n\n")
    assert [event[:13] for event in events] == ['data:{"index"', ":", 'data:{"index"', ":", ""]
    events = post(url, "/v1/chat/completions", messages=TALK, stream=True, max_tokens=2).text.split("\n\n")
    assert events[0].startswith('data:{"object"')
    assert events[-2] == "data: [DONE]"


@pytest.mark.parametrize("path", ["/generate_stream", "/v1/completions"])
def test_an_error_in_a_stream_comes_under_status_200(url: str, path: str) -> None:
    fields = (
        {"inputs": "[[fail 1]]"} if path == "/generate_stream" else {"prompt": "[[fail 1]]", "stream": True}
    )
    answer = post(url, path, **fields)
    assert answer.status_code == 200
    _, event = [event for event in answer.text.split("\n\n") if event.startswith("data:{")]
    error = json.loads(event[5:])["error"]
    assert (error if isinstance(error, str) else error["message"]).startswith("Request failed during gener")


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
    answer = post(url, path, **body)
    assert answer.status_code == 422
    assert text in answer.text


def test_sampling_parameters_change_the_text(url: str) -> None:
    def text(**parameters: Any) -> str:
        body = {"max_new_tokens": 30, "do_sample": False, **parameters}
        return str(post(url, "/generate", inputs="The river", parameters=body).json()["generated_text"])

    assert text() == text(seed=3)
    assert text(do_sample=True, seed=3) == text(do_sample=True, seed=3)
    others: list[Any] = [
        {"seed": 4},
        {"top_k": 5},
        {"top_p": 0.5},
        {"typical_p": 0.5},
        {"temperature": 2.0},
    ]
    assert len({text(do_sample=True, **{"seed": 3, **other}) for other in others}) == 5
    assert len({text(), text(repetition_penalty=1.5), text(frequency_penalty=0.5)}) == 3


def test_tokens_before_a_text(url: str) -> None:
    tokens = post(url, "/tokenize", inputs="a").json()
    assert (tokens[0]["id"], tokens[0]["start"], tokens[0]["stop"]) == (0, 0, 0)
    answer = post(url, "/chat_tokenize", messages=TALK).json()
    assert answer["templated_text"].startswith("<|endoftext|><|im_start|>user")
    chat = post(url, "/v1/chat/completions", messages=TALK, max_tokens=1).json()
    assert chat["usage"]["prompt_tokens"] == len(answer["tokenize_response"])


# ---- the launcher --------------------------------------------------------------------------------------


def test_the_version_that_the_images_build_checks() -> None:
    output, _ = launcher("--version").communicate(timeout=60)
    assert output.split() == ["text-generation-launcher", stand_in.VERSION]
    dockerfile = (ROOT / "workers/tgi/Dockerfile").read_text()
    assert f'= "text-generation-launcher {stand_in.VERSION}"\n' in dockerfile


@pytest.mark.parametrize(
    ("arguments", "env", "text"),
    [
        ([], {"MAX_INPUT_TOKENS": ""}, "invalid int value"),
        (["--max-model-len", "9"], {}, "unrecognized arguments: --max-model-len"),
        ([], {}, "bigscience/bloom-560m"),
    ],
)
def test_what_the_launcher_refuses(arguments: list[str], env: dict[str, str], text: str) -> None:
    process = launcher(*arguments, **env)
    assert text in process.communicate(timeout=60)[0]
    assert process.returncode > 0


def test_the_launcher_exits_when_its_router_dies(model: Path) -> None:
    with serving(model) as (url, process):
        with pytest.raises(requests.ConnectionError):
            post(url, "/generate", inputs="[[die 1]]")
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Webserver Crashed" in output
