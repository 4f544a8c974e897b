"""The stand-in for TGI, held to the clients that Hugging Face has made for it and to its published source."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import text_generation
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import GenerationError, OverloadedError, ValidationError
from text_generation import errors as tgi_errors

from tools import tgi_stand_in
from tools.models import made, tiny_causal

pytestmark = [
    pytest.mark.engine,
    # text_generation's client leaves the connections of its streams to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
TALK = [{"role": "user", "content": "Name three rivers."}]


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub's clients call nobody while it is offline, as workers set it in other tests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=10).status_code == 200
    except requests.RequestException:
        return False


def launcher(*arguments: str, **env: str) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if key.lower() not in tgi_stand_in.ARGUMENTS}
    return subprocess.Popen(
        [sys.executable, tgi_stand_in.__file__, *arguments], env=clean | env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@contextmanager
def serving(model: Path, *arguments: str, **env: str) -> Iterator[str]:
    """The address of a stand-in that serves `model`."""
    port = str(free_port())
    process = launcher("--model-id", str(model), "--hostname", "127.0.0.1", "--port", port, *arguments, **env)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(url) or process.poll() is not None)
        assert process.poll() is None, process.communicate()[0]
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its template where TGI looks for it, and a token before every text."""
    return with_bos(made("huggingface", tiny_causal.make), tmp_path_factory.mktemp("model"))


def with_bos(source: Path, folder: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((source / name).read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }}" + tiny_causal.CHAT_TEMPLATE
    config["bos_token"] = "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with serving(model, "--max-concurrent-requests", "2", TGI_STAND_IN_KEEP_ALIVE="0.05") as url:
        yield url


def post(url: str, path: str, body: Any, **options: Any) -> requests.Response:
    return requests.post(url + path, json=body, timeout=60, **options)


def running(url: str) -> int:
    found = re.search(
        r"^tgi_batch_current_size (\d+)$", requests.get(f"{url}/metrics", timeout=60).text, re.M
    )
    assert found is not None
    return int(found[1])


def whole(text: str) -> str:
    """Without the character of which the last token has a part only: a stream never has it."""
    return text.rstrip("\ufffd")


# ---- the official clients ------------------------------------------------------------------------------


def test_the_client_of_text_generation(url: str) -> None:
    client = text_generation.Client(url, timeout=60)
    answer = client.generate("The river", max_new_tokens=9, top_n_tokens=2)
    assert answer.details.generated_tokens == len(answer.details.tokens) == 9
    assert answer.details.finish_reason == "length"
    assert answer.details.top_tokens is not None
    assert [len(top) for top in answer.details.top_tokens] == [2] * 9
    events = list(client.generate_stream("The river", max_new_tokens=9))
    assert "".join(event.token.text for event in events) == whole(answer.generated_text)
    assert events[-1].generated_text == answer.generated_text
    assert [event.details is None for event in events] == [True] * 8 + [False]
    assert client.generate("The river", max_new_tokens=9).generated_text == answer.generated_text


def test_the_client_of_text_generation_sees_errors(url: str) -> None:
    client = text_generation.Client(url, timeout=60)
    with pytest.raises(tgi_errors.ValidationError, match="Given: 2001 `inputs` tokens"):
        client.generate(" river" * 2000, max_new_tokens=50)
    with pytest.raises(tgi_errors.GenerationError):
        client.generate("[[fail 3]]")


def test_the_client_of_huggingface_hub(url: str) -> None:
    client = InferenceClient(model=url, timeout=60)
    answer = client.text_generation("The river", max_new_tokens=9, details=True)
    assert answer.details is not None
    assert answer.details.generated_tokens == 9
    *events, last = client.text_generation("The river", max_new_tokens=9, details=True, stream=True)
    assert "".join(it.token.text for it in [*events, last]) == whole(answer.generated_text)
    assert last.generated_text == answer.generated_text
    assert last.details is not None
    assert (last.details.input_length, last.details.finish_reason) == (3, "length")
    chat = client.chat_completion(TALK, max_tokens=9, logprobs=True, top_logprobs=2, temperature=0)
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert "".join(it.token for it in logprobs.content) == whole(chat.choices[0].message.content or "")
    chunks = list(
        client.chat_completion(
            TALK, max_tokens=9, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    said = "".join(it.choices[0].delta.content or "" for it in chunks if it.choices)
    assert said == whole(chat.choices[0].message.content or "")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == chat.usage.total_tokens
    assert requests.get(f"{url}/info", timeout=60).json()["max_total_tokens"] == 2048


async def test_the_asynchronous_client_of_huggingface_hub(url: str) -> None:
    client = AsyncInferenceClient(model=url, timeout=60)
    answers = await asyncio.gather(*(client.text_generation(t, max_new_tokens=30) for t in "ab"))
    streams = [await client.text_generation(text, max_new_tokens=30, stream=True) for text in "a"]
    assert ["".join([piece async for piece in it if piece != "<|im_end|>"]) for it in streams] == answers[:1]


def test_the_client_of_huggingface_hub_sees_errors(url: str) -> None:
    client = InferenceClient(model=url, timeout=60)
    with pytest.raises(ValidationError, match="`max_new_tokens` must be strictly positive"):
        client.text_generation("a", max_new_tokens=0)
    with pytest.raises(ValidationError, match="`top_p` must be"):
        client.text_generation("a", top_p=1.0)
    with pytest.raises(GenerationError, match="CUDA error"):
        list(client.text_generation("[[fail 2]]", stream=True))


async def test_what_is_too_much_is_refused_at_once(url: str) -> None:
    client = AsyncInferenceClient(model=url, timeout=60)
    slow = [
        asyncio.create_task(client.text_generation("[[slow 3600000]]", max_new_tokens=9)) for _ in range(2)
    ]
    await asyncio.to_thread(until, lambda: running(url) == 2)
    with pytest.raises(OverloadedError, match="Model is overloaded"):
        await client.text_generation("a")
    for task in slow:
        task.cancel()
    await asyncio.wait(slow)
    await asyncio.to_thread(until, lambda: running(url) == 0)


# ---- its HTTP, to the letter ---------------------------------------------------------------------------


def test_events_are_axums(url: str) -> None:
    """No blank before JSON, comments while nothing comes, and no [DONE] on TGI's own route."""
    body = {"inputs": "[[slow 150]]", "parameters": {"max_new_tokens": 2}}
    text = post(url, "/generate_stream", body).text
    events = text.strip().split("\n\n")
    assert ":" in events
    data = [event for event in events if event != ":"]
    assert len(data) == 2
    assert all(event.startswith('data:{"index"') for event in data)
    body = {"messages": TALK, "stream": True, "max_tokens": 2}
    events = post(url, "/v1/chat/completions", body).text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    assert events[0].startswith('data:{"object"')


@pytest.mark.parametrize("path", ["/generate_stream", "/v1/completions"])
def test_an_error_in_a_stream_comes_under_status_200(url: str, path: str) -> None:
    text = "[[fail 1]]"
    body = {"inputs": text} if path == "/generate_stream" else {"prompt": text, "stream": True}
    answer = post(url, path, body)
    assert answer.status_code == 200
    _, error = [event for event in answer.text.split("\n\n") if event.startswith("data:{")]
    told = json.loads(error[5:])["error"]
    if path == "/generate_stream":
        assert told.startswith("Request failed during generation")
    else:
        assert told["http_status_code"] == 422


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": -1}}, 422, ".max_new_tokens: "),
        ("/generate", {"inputs": "a", "parameters": {"do_sample": None}}, 422, "parameters.do_sample: "),
        ("/generate", {}, 422, "missing field `inputs`"),
        ("/v1/chat/completions", {"messages": TALK, "stop": "x"}, 422, "stop: "),
        ("/v1/chat/completions", {"messages": TALK, "stream_options": None}, 422, "stream_options: "),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 422, "messages[0]: "),
        ("/v1/completions", {"prompt": [[1, 2]]}, 422, "prompt: "),
        ("/v1/completions", {"prompt": list("abcde")}, 422, "maximum allowed batch size of 4"),
        ("/generate", {"inputs": ""}, 422, "`inputs` cannot be empty"),
        ("/generate", {"inputs": "a", "parameters": {"temperature": 0.0}}, 422, "strictly positive"),
        ("/generate", {"inputs": "a", "parameters": {"top_n_tokens": 6}}, 422, "<= 5. Given: 6"),
        ("/generate", {"inputs": "a", "parameters": {"stop": list("abcde")}}, 422, "up to 4 stop"),
        ("/generate", {"inputs": "a" * 2_000_000}, 413, "length limit exceeded"),
    ],
)  # fmt: skip
def test_what_is_refused_and_how(url: str, path: str, body: Any, status: int, said: str) -> None:
    answer = post(url, path, body)
    assert answer.status_code == status
    assert said in answer.text


def test_a_text_that_is_not_json_is_refused(url: str) -> None:
    headers = {"Content-Type": "application/json"}
    assert requests.post(f"{url}/generate", data="{", headers=headers, timeout=60).status_code == 400
    assert requests.post(f"{url}/generate", data="{}", timeout=60).status_code == 415


def test_the_same_is_the_same_and_sampling_counts(url: str) -> None:
    def text(**settings: Any) -> str:
        body = {"inputs": "The river", "parameters": {"max_new_tokens": 30, "do_sample": False, **settings}}
        return str(post(url, "/generate", body).json()["generated_text"])

    assert text() == text(seed=3)
    assert text(do_sample=True, seed=3) == text(do_sample=True, seed=3)
    others = [{"seed": 4}, {"top_k": 5}, {"top_p": 0.5}, {"typical_p": 0.5}, {"temperature": 2.0}]
    drawn = {text(do_sample=True, **{"seed": 3, **other}) for other in others}
    assert len(drawn) == 5
    assert len({text(), text(repetition_penalty=1.5), text(frequency_penalty=0.5)}) == 3


def test_ends(url: str) -> None:
    """At the end token, which is told and not part of the text, and at a stop text, which is part of it."""

    def made(prompt: str, **settings: Any) -> Any:
        parameters = {"max_new_tokens": 300, "do_sample": False, "details": True, **settings}
        return post(url, "/generate", {"inputs": prompt, "parameters": parameters}).json()

    found = [made(f"number {number}") for number in range(8)]
    ended = [it for it in found if it["details"]["finish_reason"] == "eos_token"]
    assert ended
    assert all(it["details"]["tokens"][-1]["text"] == "<|im_end|>" for it in ended)
    assert all("<|im_end|>" not in it["generated_text"] for it in ended)
    whole = next(it["generated_text"] for it in found if len(it["generated_text"].split()) > 3)
    number = next(n for n, it in enumerate(found) if it["generated_text"] == whole)
    stop = whole.split()[2]
    cut = made(f"number {number}", stop=[stop])
    assert cut["details"]["finish_reason"] == "stop_sequence"
    assert cut["generated_text"].endswith(stop)


def test_tokens_before_a_text(url: str) -> None:
    tokens = post(url, "/tokenize", {"inputs": "a"}).json()
    assert (tokens[0]["id"], tokens[0]["start"], tokens[0]["stop"]) == (0, 0, 0)
    answer = post(url, "/chat_tokenize", {"messages": TALK}).json()
    assert answer["templated_text"].startswith("<|endoftext|><|im_start|>user")
    assert answer["tokenize_response"][0]["text"] == "<|endoftext|>"
    chat = post(url, "/v1/chat/completions", {"messages": TALK, "max_tokens": 1}).json()
    assert chat["usage"]["prompt_tokens"] == len(answer["tokenize_response"])


def test_presence_penalty_is_a_repetition_penalty(url: str) -> None:
    """TGI adds 2 to it."""

    def text(**settings: Any) -> str:
        body = {"messages": TALK, "temperature": 0, "max_tokens": 20, **settings}
        return str(post(url, "/v1/chat/completions", body).json()["choices"][0]["message"]["content"])

    assert text() == text(presence_penalty=-1.0) != text(presence_penalty=0.0)


# ---- the launcher --------------------------------------------------------------------------------------


def ended(*arguments: str, **env: str) -> tuple[int, str]:
    process = launcher(*arguments, **env)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_version() -> None:
    """What the image's build compares with."""
    dockerfile = (Path(__file__).parents[3] / "workers/tgi/Dockerfile").read_text()
    status, output = ended("--version")
    assert (status, output.split()) == (0, ["text-generation-launcher", tgi_stand_in.VERSION])
    assert f'= "text-generation-launcher {tgi_stand_in.VERSION}"\n' in dockerfile


@pytest.mark.parametrize(
    ("arguments", "env", "status", "said"),
    [
        (["--max-input-tokens", "9", "--max-input-length", "9"], {}, 1, "Both `max_input_tokens` (9)"),
        (["--max-input-tokens", "9"], {"MAX_INPUT_LENGTH": "9"}, 1, "Both `max_input_tokens` (9)"),
        (["--max-input-tokens", "9", "--max-total-tokens", "9"], {}, 1, "must be < `max_total_tokens`(9)"),
        ([], {"MAX_INPUT_TOKENS": ""}, 2, "cannot parse integer from empty string"),
        ([], {"QUANTIZE": ""}, 2, "invalid value '' for '--quantize"),
        ([], {"TRUST_REMOTE_CODE": "1"}, 2, "[possible values: true, false]"),
        (["--max-model-len", "9"], {}, 2, "unexpected argument '--max-model-len' found"),
        (["--model-id", "${MODEL_ID}"], {}, 1, "Repository Not Found"),
        ([], {}, 1, "bigscience/bloom-560m"),
    ],
)
def test_what_the_launcher_refuses(arguments: list[str], env: dict[str, str], status: int, said: str) -> None:
    got, output = ended(*arguments, **env)
    assert got == status, output
    assert said in output


def test_the_command_line_wins_over_the_environment(model: Path) -> None:
    with serving(model, "--max-total-tokens", "100", MAX_TOTAL_TOKENS="200", MAX_BEST_OF="7") as url:
        info = requests.get(f"{url}/info", timeout=60).json()
    assert (info["max_total_tokens"], info["max_best_of"], info["max_input_tokens"]) == (100, 7, 99)


def test_faults_of_the_start(model: Path) -> None:
    for fault, said in (("crash", "NCCL error"), ("oom", "CUDA out of memory")):
        status, output = ended("--model-id", str(model), TGI_STAND_IN_START=fault)
        assert status == 1
        assert said in output
        assert "Error: ShardCannotStart" in output


def test_the_launcher_ends_when_its_router_dies(model: Path) -> None:
    port = str(free_port())
    process = launcher("--model-id", str(model), "--hostname", "127.0.0.1", "--port", port)
    until(lambda: answers(f"http://127.0.0.1:{port}"))
    with pytest.raises(requests.ConnectionError):
        post(f"http://127.0.0.1:{port}", "/generate", {"inputs": "[[die 1]]"})
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Webserver Crashed" in output


async def test_told_to_end_it_finishes_what_it_has(model: Path) -> None:
    port = str(free_port())
    process = launcher("--model-id", str(model), "--hostname", "127.0.0.1", "--port", port)
    url = f"http://127.0.0.1:{port}"
    await asyncio.to_thread(until, lambda: answers(url))
    client = AsyncInferenceClient(model=url, timeout=60)

    async def pieces() -> AsyncIterator[str]:
        async for piece in await client.text_generation("[[slow 100]]", max_new_tokens=9, stream=True):
            yield piece

    seen = 0
    async for _ in pieces():
        seen += 1
        if seen == 1:
            process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(process.communicate)
    assert process.returncode == 0
    assert seen == 9
