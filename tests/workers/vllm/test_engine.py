"""The vllm worker with the real vLLM on the CPU, a tiny random Llama and a LoRA adapter for it.

One engine serves the module: it takes a minute to start. The tests that end it come last.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from local import Platform, Rules, running
from serving.engine_server import reaper
from tests.helpers import wait_until
from tests.shared.http import servers
from tools.models import local_env, made, tiny_causal, vllm_cpu
from tools.workers import ROOT

reason = vllm_cpu.missing()
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(reason is not None, reason=f"no vLLM here: {reason}"),
    pytest.mark.timeout(600),
]

NAME = "tiny-random/llama"
TALK: Any = [{"role": "user", "content": "Name three rivers."}]
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


def adapter(folder: Path) -> Path:
    """A LoRA adapter that changes what the tiny Llama says."""
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(2):
        for projection, rows in (("q_proj", 128), ("v_proj", 64)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            weights[f"{name}.lora_A.weight"] = torch.randn(8, 128, generator=random)
            weights[f"{name}.lora_B.weight"] = torch.randn(rows, 8, generator=random)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0,
        "bias": "none", "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": NAME,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    env = {
        **local_env("vllm"),
        "OMP_NUM_THREADS": "1",
        "MAX_MODEL_LEN": "1024",
        "LORA_MODULES": f"other={adapter(tmp_path_factory.mktemp('lora'))}",
        "ENABLE_AUTO_TOOL_CHOICE": "true",
        "TOOL_CALL_PARSER": "hermes",
    }
    # No second engine: what ends this one comes last. And patience: on a busy machine pings come late.
    rules = Rules(ping_interval=1, missed_pings=120, restarts=0, grace=30)
    with running("vllm", env=env, rules=rules, ready_timeout=500) as platform:
        yield platform


@pytest.fixture(scope="module")
def client(platform: Platform) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=platform.openai_url, api_key="any", max_retries=0, timeout=300) as client:
        yield client


class Engine:
    """The engine behind the worker, asked directly.

    To be made while it is at rest: /proc of a busy process may take seconds, in which jobs would be done.
    """

    def __init__(self, platform: Platform) -> None:
        log = "\n".join(platform.workers[0].lines)
        found = re.findall(r"vllm: process (\d+) at (http://[\d.:]+)", log)
        self.pid, self.url = int(found[-1][0]), found[-1][1]
        names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in reaper.members(self.pid)}
        (self.core,) = (pid for pid, name in names.items() if name.startswith("VLLM::EngineCor"))

    def metric(self, pattern: str) -> int:
        text = requests.get(f"{self.url}/metrics", timeout=60).text
        return int(sum(map(float, re.findall(rf"^vllm:{pattern} ([\d.]+)", text, re.MULTILINE))))

    def running(self) -> int:
        return self.metric(r"num_requests_(?:running|waiting)\{.*?\}")

    def made(self) -> int:
        """Tokens since the start."""
        return self.metric(r"generation_tokens_total\{.*?\}")

    def settle(self) -> None:
        """Wait until the server in front of a stopped core has read all that the core had sent."""
        seen, since = self.made(), time.monotonic()
        while time.monotonic() - since < 1:
            time.sleep(0.05)
            if (now := self.made()) != seen:
                seen, since = now, time.monotonic()


def held(platform: Platform, engine: Engine, answers: int, *orders: dict[str, Any]) -> list[str]:
    """Jobs in the middle of their answers, with the engine's core stopped, so that they stay there."""
    for _ in range(20):
        jobs = [call(platform, "POST", "run", {"input": order})["id"] for order in orders]

        def states(jobs: list[str] = jobs) -> set[str]:
            found = {call(platform, "GET", f"status/{job}")["status"] for job in jobs}
            assert found <= {"IN_QUEUE", "IN_PROGRESS", "COMPLETED"}
            return found

        wait_until(lambda: engine.running() >= answers or states() == {"COMPLETED"})
        os.kill(engine.core, signal.SIGSTOP)
        engine.settle()
        if engine.running() >= answers and states() == {"IN_PROGRESS"}:
            return jobs
        os.kill(engine.core, signal.SIGCONT)  # this machine was elsewhere meanwhile: once more
        wait_until(lambda: states() == {"COMPLETED"})
    pytest.fail("the jobs are over each time before they are looked at")


@pytest.fixture(scope="module")
def engine(platform: Platform) -> Engine:
    return Engine(platform)


def call(platform: Platform, method: str, path: str, body: Any = None) -> Any:
    url = f"{platform.endpoint_url}/{path}"
    return requests.request(method, url, json=body, headers={"Authorization": "any"}, timeout=300).json()


def runsync(platform: Platform, **order: Any) -> Any:
    return call(platform, "POST", "runsync?wait=300000", {"input": order})


# ---- the pinned version --------------------------------------------------------------------------------


def test_the_kept_table_is_what_this_vllm_takes() -> None:
    folder = ROOT / "workers" / "vllm"
    done = subprocess.run(
        [str(vllm_cpu.PYTHON), str(folder / "dump_flags.py"), str(folder / "engine.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# ---- the worker's own input ----------------------------------------------------------------------------


def test_a_conversation(platform: Platform) -> None:
    answer = runsync(platform, messages=TALK, max_tokens=5, temperature=0.0)
    assert answer["status"] == "COMPLETED", answer
    [output] = answer["output"]
    assert output["object"] == "chat.completion"
    assert output["id"] == f"chatcmpl-{answer['id']}"
    assert output["model"] == NAME
    assert output["choices"][0]["message"]["role"] == "assistant"
    assert output["usage"]["completion_tokens"] == 5


def test_a_prompt(platform: Platform) -> None:
    answer = runsync(platform, prompt="The river", max_tokens=4, n=2, seed=3, logprobs=1)
    [output] = answer["output"]
    assert output["object"] == "text_completion"
    assert output["id"] == f"cmpl-{answer['id']}"
    assert [choice["index"] for choice in output["choices"]] == [0, 1]
    assert len(output["choices"][0]["logprobs"]["tokens"]) == 4


def test_the_default_length(platform: Platform) -> None:
    [output] = runsync(platform, prompt="The river", ignore_eos=True)["output"]
    assert output["usage"]["completion_tokens"] == 512


def test_a_stream_has_complete_events(platform: Platform) -> None:
    answer = runsync(platform, messages=TALK, max_tokens=6, temperature=0.0, stream=True)
    assert answer["status"] == "COMPLETED", answer
    for part in answer["output"]:
        assert part.startswith("data: ")
        assert part.endswith("\n\n")
    events = "".join(answer["output"]).split("\n\n")[:-1]
    assert events[-1] == "data: [DONE]"
    last = json.loads(events[-2].removeprefix("data: "))
    assert last["usage"]["completion_tokens"] == 6
    assert last["id"] == f"chatcmpl-{answer['id']}"
    [plain] = runsync(platform, messages=TALK, max_tokens=6, temperature=0.0)["output"]
    texts = [
        choice["delta"].get("content") or ""
        for event in events[:-1]
        for choice in json.loads(event.removeprefix("data: "))["choices"]
    ]
    assert "".join(texts) == plain["choices"][0]["message"]["content"]


def test_an_error_keeps_vllms_form(platform: Platform) -> None:
    answer = runsync(platform, prompt="a", max_tokens=5000)
    assert answer["status"] == "FAILED"
    error = json.loads(answer["error"])
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", "max_tokens", 400)
    assert "5000" in error["message"]
    answer = runsync(platform, prompt="a", max_token=5)
    assert "Did you mean 'max_tokens'?" in json.loads(answer["error"])["message"]


# ---- the official client -------------------------------------------------------------------------------


def test_chat_with_logprobs_n_and_a_seed(client: openai.OpenAI) -> None:
    answers = [
        client.chat.completions.create(
            model=NAME, messages=TALK, max_tokens=5, n=2, seed=5, logprobs=True, top_logprobs=2,
            extra_body={"top_k": 50, "ignore_eos": True},
        )
        for _ in range(2)
    ]  # fmt: skip
    first, second = ([choice.message.content for choice in answer.choices] for answer in answers)
    assert first == second
    assert first[0] != first[1]
    assert answers[0].usage is not None
    assert answers[0].usage.prompt_tokens > 10  # the chat template's
    logprobs = answers[0].choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [len(token.top_logprobs) for token in logprobs.content] == [2] * 5


def test_characters_are_not_split(client: openai.OpenAI) -> None:
    """Random tokens are parts of characters of two to four bytes; the text must be what it is unstreamed."""
    options: Any = {"model": NAME, "max_tokens": 200, "temperature": 1.5, "seed": 11}
    options["extra_body"] = {"ignore_eos": True}
    text = client.completions.create(prompt="\u4f60\u597d \U0001f33f caf\u00e9", **options).choices[0].text
    stream = client.completions.create(prompt="\u4f60\u597d \U0001f33f caf\u00e9", stream=True, **options)
    assert "".join(choice.text for chunk in stream for choice in chunk.choices) == text
    assert any(ord(character) > 0xFF for character in text)


def test_an_answer_in_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["river", "sea"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=NAME, messages=TALK, max_tokens=200, temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "water", "schema": schema}},
    )  # fmt: skip
    assert json.loads(answer.choices[0].message.content or "")["kind"] in ("river", "sea")


def test_an_answer_that_matches_a_pattern(platform: Platform) -> None:
    [output] = runsync(platform, messages=TALK, structured_outputs={"regex": "[ab]{3}"})["output"]
    assert re.fullmatch("[ab]{3}", output["choices"][0]["message"]["content"])


def test_tools(client: openai.OpenAI) -> None:
    """A random model calls nothing of itself, so its call is written for it: the parser is the real one."""
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 7}}\n</tool_call>'
    answer = client.chat.completions.create(
        model=NAME, messages=TALK, tools=[ADD], tool_choice="auto", max_tokens=200, temperature=0,
        extra_body={"structured_outputs": {"choice": [text]}},
    )  # fmt: skip
    calls: Any = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert (calls[0].function.name, json.loads(calls[0].function.arguments)) == ("add", {"a": 7})


def test_a_lora_adapter(client: openai.OpenAI, platform: Platform) -> None:
    def says(model: str) -> Any:
        answer = client.chat.completions.create(model=model, messages=TALK, max_tokens=8, temperature=0)
        return answer.choices[0].message.content

    assert [model.id for model in client.models.list()] == [NAME, "other"]
    assert says("other") != says(NAME)
    [native] = runsync(platform, messages=TALK, max_tokens=8, temperature=0.0, model="other")["output"]
    assert native["choices"][0]["message"]["content"] == says("other")


def test_other_routes(platform: Platform) -> None:
    def ask(route: str, **body: Any) -> Any:
        return runsync(platform, openai_route=route, openai_input=body)

    tokens = ask("/tokenize", prompt="The river")["output"][0]["tokens"]
    assert ask("/v1/detokenize", tokens=tokens)["output"][0]["prompt"] == "The river"
    messages = ask("/v1/messages", model=NAME, messages=TALK, max_tokens=4)["output"][0]
    assert messages["type"] == "message"
    refused = json.loads(ask("/v1/embeddings", input="a")["error"])
    assert refused["code"] == "unknown_route"
    assert "/v1/embeddings" in refused["message"]
    body = {"prompt": "The river", "max_tokens": 2}
    [official] = runsync(platform, route="/v1/completions", body=body)["output"]
    assert official["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("route", "body", "last"),
    [
        ("/v1/messages", {"messages": TALK, "max_tokens": 4}, "event: message_stop"),
        ("/v1/responses", {"input": "Hi.", "max_output_tokens": 4}, "event: response."),
        ("/v1/chat/completions", {"messages": TALK, "max_tokens": 4}, "data: [DONE]"),
    ],
)
def test_a_stream_of_each_kind_has_its_end(
    platform: Platform, route: str, body: dict[str, Any], last: str
) -> None:
    """A stream without its end is a lost connection."""
    answer = runsync(platform, openai_route=route, openai_input={"model": NAME, "stream": True, **body})
    assert answer["status"] == "COMPLETED", answer
    assert "".join(answer["output"]).split("\n\n")[-2].startswith(last)


def test_errors_in_openais_shape(client: openai.OpenAI, platform: Platform) -> None:
    url, headers = f"{platform.openai_url}/chat/completions", {"Authorization": "any"}

    def error(**body: Any) -> Any:
        return requests.post(url, json={"messages": TALK, **body}, headers=headers, timeout=300).json()[
            "error"
        ]

    unknown = error(model="no-such-model")
    assert (unknown["type"], unknown["param"], unknown["code"]) == ("NotFoundError", "model", 404)
    wrong = error(temperature="warm")
    assert (wrong["param"], wrong["code"]) == ("temperature", 400)
    long = error(messages=[{"role": "user", "content": "river " * 2000}])
    assert (long["type"], long["code"]) == ("BadRequestError", 400)
    with pytest.raises(openai.APIError) as caught:
        list(client.chat.completions.create(model="no-such-model", messages=TALK, stream=True))
    assert "no-such-model" in str(caught.value)


# ---- many at once, and leaving -------------------------------------------------------------------------


async def test_sixteen_streams(platform: Platform) -> None:
    """Each gets its own complete answer, which begins with its own prompt."""
    prompts = [f"River number {number} is" for number in range(16)]
    options: Any = {"model": NAME, "max_tokens": 48, "echo": True, "extra_body": {"ignore_eos": True}}
    options["stream_options"] = {"include_usage": True}

    async with openai.AsyncOpenAI(base_url=platform.openai_url, api_key="any", timeout=300) as client:

        async def one(prompt: str) -> tuple[str, int]:
            text, tokens = "", 0
            async for chunk in await client.completions.create(prompt=prompt, stream=True, **options):
                text += "".join(choice.text for choice in chunk.choices)
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            return text, tokens

        answers = await asyncio.gather(*map(one, prompts))
    for prompt, (text, tokens) in zip(prompts, answers, strict=True):
        assert text.startswith(prompt)
        assert tokens == 48
    assert len({text.removeprefix(prompt) for prompt, (text, _) in zip(prompts, answers, strict=True)}) > 8


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_job_frees_its_slot(platform: Platform, engine: Engine, stream: bool) -> None:
    wait_until(lambda: engine.running() == 0)
    before = engine.made()
    order = {"prompt": "The river", "max_tokens": 1000, "ignore_eos": True, "n": 32, "stream": stream}
    (job,) = held(platform, engine, 32, order)
    call(platform, "POST", f"cancel/{job}")
    os.kill(engine.core, signal.SIGCONT)
    wait_until(lambda: engine.running() == 0)
    assert (engine.made() - before) % 32_000 > 0  # it did not go on to the end
    assert call(platform, "GET", f"status/{job}")["status"] == "CANCELLED"


def test_the_log_has_the_phases_of_a_start(platform: Platform) -> None:
    process = platform.workers[0]
    assert {"resolve", "load", "prewarm", "ready"} <= process.phases.keys()
    log = "\n".join(process.lines)
    assert re.search(r"concurrency=\d+", log)


# ---- the end of the engine -----------------------------------------------------------------------------


def test_a_killed_core_ends_the_jobs_and_the_worker(platform: Platform, engine: Engine) -> None:
    """Last: kill -9 of the process that runs the model, while it streams."""
    process = platform.workers[0]
    order = {"prompt": "The river", "max_tokens": 1000, "ignore_eos": True, "n": 16}
    jobs = held(platform, engine, 32, {**order, "stream": True}, order)
    began = time.monotonic()
    os.kill(engine.core, signal.SIGKILL)
    for job in jobs:

        def has_ended(job: str = job) -> bool:
            return call(platform, "GET", f"status/{job}")["status"] in ("FAILED", "COMPLETED")

        wait_until(has_ended)
        answer = call(platform, "GET", f"status/{job}")
        assert answer["status"] == "FAILED", answer
        assert json.loads(answer["error"])["code"] == "engine_died"
    assert time.monotonic() - began < 60
    wait_until(lambda: process.returncode is not None)
    wait_until(lambda: reaper.members(engine.pid) == [])


# ---- HTTP mode -----------------------------------------------------------------------------------------


@contextmanager
def http_worker(**env: str) -> Iterator[servers.Server]:
    env = {**local_env("vllm"), "OMP_NUM_THREADS": "1", "MAX_MODEL_LEN": "1024", **env}
    with servers.running(module="workers.vllm.handler", until_ping=None, **env) as server:
        wait_until(lambda: server.ping() == 200 or server.process.poll() is not None, 500)
        yield server


def test_http_mode() -> None:
    with http_worker() as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
        asked: Any = {"model": NAME, "messages": TALK, "temperature": 0}
        plain = client.chat.completions.create(**asked, max_completion_tokens=9).choices[0].message.content
        chunks = list(client.chat.completions.create(**asked, max_completion_tokens=9, stream=True))
        assert len(chunks) > 5
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(**asked, max_completion_tokens=5000, stream=stream)
            assert caught.value.param == "max_completion_tokens"
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(**{**asked, "model": "no-such-model"}, stream=stream)
        *_, last = client.responses.create(model=NAME, input="Hi.", max_output_tokens=9, stream=True)
        assert last.type in ("response.completed", "response.incomplete")
        assert "\nvllm:generation_tokens_total{" in requests.get(f"{server.url}/metrics", timeout=60).text


def test_a_model_that_the_kernels_refuse_is_no_crash_loop() -> None:
    """The engine is ready before its first forward pass ends it: heads are of 16 numbers."""
    with http_worker(MODEL_NAME=str(made("huggingface", tiny_causal.make))) as server:
        answer = server.work(prompt="The river")
        assert answer.status_code == 503
        assert "died of its first requests: RuntimeError: Unsupported CPU attention" in answer.text
