"""The tgi worker under the local platform, with the unmodified SDK and the official client."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from local import Platform, Rules, running
from local.workers import WorkerProcess
from serving.engine_server import reaper
from tests.helpers import runsync, wait_until
from tools.models import local_env
from tools.stand_ins import tgi as stand_in
from tools.workers import ROOT

pytestmark = pytest.mark.engine
TALK: Any = [{"role": "user", "content": "Name three rivers."}]
SECRET = "hf_" + "s" * 30


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volume")


@pytest.fixture(scope="module")
def platform(volume: Path) -> Iterator[Platform]:
    """As in TGI's image, on an endpoint with a volume, where a worker that fails is replaced quickly."""
    env = {"HF_TOKEN": SECRET, "API_KEY": SECRET, "HF_HOME": "/data", "RUNPOD_VOLUME_PATH": str(volume)}
    env |= {**local_env("tgi"), "HEALTH_TIMEOUT": "8"}
    with running("tgi", env=env, rules=Rules(restart_delay=0.1)) as platform:
        yield platform


@pytest.fixture(scope="module")
def client(platform: Platform) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=platform.openai_url, api_key="local", max_retries=0) as client:
        yield client


def test_openai_client(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "stand-in/no-model"
    asked: dict[str, Any] = {"model": model.id, "messages": TALK, "max_tokens": 20, "seed": 3, "top_p": 1}
    plain = client.chat.completions.create(**asked)
    assert plain.id.startswith("chatcmpl-")
    assert plain.model == model.id
    (end,) = plain.choices
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
    assert chunks[-1].usage == plain.usage
    assert {chunk.id[:9] for chunk in chunks} == {"chatcmpl-"}
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    text = "".join(choice.delta.content or "" for choice in choices)
    assert text == (end.message.content or "").rstrip("\ufffd")
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + [end.finish_reason]


def test_openai_completions_of_several_prompts(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "stand-in/no-model", "prompt": ["The river", "the sea"], "max_tokens": 9, "temperature": 0,
    }  # fmt: skip
    plain = client.completions.create(**asked)
    texts = {choice.index: choice.text.rstrip("\ufffd") for choice in plain.choices}
    streamed = dict.fromkeys(texts, "")
    usage = None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts
    assert usage == plain.usage


def test_openai_tools_schemas_and_logprobs(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    asked: Any = {"model": "stand-in/no-model", "messages": TALK, "max_tokens": 5, "temperature": 0}
    plain = client.chat.completions.create(**asked, tools=[tool], tool_choice="required").choices[0]
    assert plain.finish_reason in ("tool_calls", "length")
    assert plain.message.tool_calls is not None
    assert plain.message.tool_calls[0].function.name == "add"
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert client.chat.completions.create(**asked, response_format=form).choices[0].message.content
    logprobs = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [len(token.top_logprobs) for token in logprobs.content] == [3] * 5


def launcher_of(worker: WorkerProcess) -> int:
    """The process id of the launcher that a worker has started."""
    children = psutil.Process(worker.pid).children()
    (pid,) = (child.pid for child in children if stand_in.__file__ in child.cmdline())
    return int(pid)


def test_the_launchers_environment_and_the_log(platform: Platform, volume: Path) -> None:
    """TGI's downloads go to the volume. Its launcher logs its arguments, and the worker the command line."""
    runsync(platform, prompt="[[fail 1]]")
    (worker,) = platform.workers
    environment = psutil.Process(launcher_of(worker)).environ()
    assert environment["HF_HOME"] == str(volume / "huggingface-cache")
    log = "\n".join(worker.lines)
    assert "text-generation-launcher --model-id" in log
    assert SECRET not in log


def waiting(pool: ThreadPoolExecutor, platform: Platform, **payload: Any) -> Future[Any]:
    """A job that has reached the worker."""
    job = pool.submit(runsync, platform, **payload)
    url, headers = f"{platform.endpoint_url}/health", {"Authorization": "Bearer local"}
    wait_until(lambda: job.done() or httpx.get(url, headers=headers).json()["jobs"]["inProgress"] == 1)
    return job


@pytest.mark.parametrize("prompt", ["[[die 3]]", "[[hang 2]]"])
def test_a_worker_whose_tgi_dies_or_hangs_is_replaced(platform: Platform, prompt: str) -> None:
    """In the middle of answers: all jobs fail, and another process answers the next one."""
    first = platform.workers[0]
    session = launcher_of(first)
    with ThreadPoolExecutor(1) as pool:
        beside = waiting(pool, platform, prompt="[[slow 3600000]]", stream=True)
        for answer in (runsync(platform, prompt=prompt), beside.result()):
            assert answer["status"] == "FAILED", answer
            assert json.loads(answer["error"])["code"] == "engine_died"
    good = runsync(platform, prompt="The river", max_tokens=5)
    assert good["status"] == "COMPLETED", good
    assert first not in platform.workers
    assert reaper.members(session) == []


def test_a_worker_finishes_its_jobs_at_sigterm(platform: Platform) -> None:
    """Last: the module's worker ends."""
    (worker,) = platform.workers
    session = launcher_of(worker)
    with ThreadPoolExecutor(1) as pool:
        job = waiting(pool, platform, prompt="[[slow 300]] go", max_tokens=15, temperature=0)
        worker.terminate()
        assert job.result()["status"] == "COMPLETED"
    wait_until(lambda: worker.returncode is not None)
    assert worker.returncode == 0
    assert reaper.members(session) == []


def test_a_permanent_cause_is_answered_to_every_job() -> None:
    with running("tgi", env={**local_env("tgi"), "TGI_STAND_IN_START": "oom"}) as platform:
        answer = runsync(platform, prompt="a")
        assert answer["status"] == "FAILED", answer
        problem = json.loads(answer["error"])
        assert problem["code"] == "out_of_memory"
        assert "CUDA out of memory" in problem["message"]


def test_make_run_says_that_it_is_not_tgi() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.start", "run", "tgi"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stand-in" in done.stderr
    assert "stand-in/no-model" in done.stdout
