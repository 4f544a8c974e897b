"""The tgi worker under the local platform, with the unmodified SDK and the official client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from local import Platform, Rules, WorkerFailed, running
from local.workers import WorkerProcess
from serving.engine_server import reaper
from tests.helpers import wait_until
from tools.models import local_env
from tools.workers import ROOT

pytestmark = pytest.mark.engine
TALK: Any = [{"role": "user", "content": "Name three rivers."}]
SECRET = "hf_" + "s" * 30
# A local worker that fails is replaced quickly.
QUICK = Rules(restart_delay=0.1)


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volume")


@pytest.fixture(scope="module")
def platform(volume: Path) -> Iterator[Platform]:
    """As in TGI's image, on an endpoint with a volume."""
    env = {"HF_TOKEN": SECRET, "API_KEY": SECRET, "HF_HOME": "/data", "RUNPOD_VOLUME_PATH": str(volume)}
    with running("tgi", env={**local_env("tgi"), **env}) as platform:
        yield platform


@pytest.fixture(scope="module")
def client(platform: Platform) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=platform.openai_url, api_key="local", max_retries=0) as client:
        yield client


def runsync(platform: Platform, payload: dict[str, Any]) -> Any:
    headers = {"Authorization": "Bearer local"}
    url = f"{platform.endpoint_url}/runsync"
    return requests.post(url, json={"input": payload}, headers=headers, timeout=90).json()


def test_openai_client(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "stand-in/no-model"
    asked: dict[str, Any] = {"model": model.id, "messages": TALK, "max_tokens": 20, "seed": 3, "top_p": 1}
    plain = client.chat.completions.create(**asked)
    assert plain.id.startswith("chatcmpl-")
    assert plain.model == model.id
    (end,) = plain.choices
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].usage == plain.usage
    assert {chunk.id[:9] for chunk in chunks} == {"chatcmpl-"}
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.delta.content or "" for choice in choices) == (end.message.content or "").rstrip(
        "\ufffd"
    )
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


def test_errors_on_openai_routes(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "stand-in/no-model", "messages": TALK}
    for wrong, code in (
        ({"model": "gpt-4o"}, "model_not_found"),
        ({"n": 2}, "unsupported"),
        ({"max_tokens": 5000}, "too_long"),
        ({"top_logprobs": 9, "logprobs": True}, "invalid_value"),
    ):
        answer = client.chat.completions.with_raw_response.create(**{**asked, **wrong})
        assert code in answer.text


def test_many_clients_at_once(platform: Platform) -> None:
    def ask(number: int) -> Any:
        body = runsync(platform, {"prompt": "The river", "max_tokens": 30, "seed": number % 8})
        assert body["status"] == "COMPLETED", body
        return body["output"][0]["response"]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(32)))
    assert answers == answers[:8] * 4
    assert len(set(answers)) > 4


def test_no_secret_is_logged(platform: Platform) -> None:
    """TGI's launcher logs its arguments, and the worker the launcher's command line."""
    runsync(platform, {"prompt": "[[fail 1]]"})
    (worker,) = platform.workers
    log = "\n".join(worker.lines)
    assert "text-generation-launcher --model-id" in log
    assert SECRET not in log


def launcher_of(worker: WorkerProcess) -> int:
    """The process id of the launcher that a worker has started."""
    # -ww: the line is cut at 80 columns otherwise, and a path may be longer.
    listed = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    for line in listed.splitlines():
        pid, parent, *words = line.split()
        if parent == str(worker.pid) and "stand_ins/tgi.py" in " ".join(words):
            return int(pid)
    raise AssertionError(listed)


def test_tgis_downloads_go_to_the_volume(platform: Platform, volume: Path) -> None:
    given = Path(f"/proc/{launcher_of(platform.workers[0])}/environ").read_text().split("\0")
    assert f"HF_HOME={volume / 'huggingface-cache'}" in given


def test_a_worker_whose_tgi_dies_is_replaced() -> None:
    """In the middle of answers: all jobs fail, and another process answers the next one."""
    with running("tgi", env=local_env("tgi"), rules=QUICK) as platform:
        first = platform.workers[0]
        session = launcher_of(first)
        with ThreadPoolExecutor(2) as pool:
            beside = pool.submit(runsync, platform, {"prompt": "[[slow 3600000]]", "stream": True})
            wait_until(lambda: platform.call(health(platform))["jobs"]["inProgress"] == 1)
            bad = runsync(platform, {"prompt": "[[die 3]]"})
            for answer in (bad, beside.result()):
                assert answer["status"] == "FAILED", answer
                assert json.loads(answer["error"])["code"] == "engine_died"
        good = runsync(platform, {"prompt": "The river", "max_tokens": 5})
        assert good["status"] == "COMPLETED", good
        assert first not in platform.workers
        assert reaper.members(session) == []
        # Between jobs: nobody asks, and it is replaced all the same.
        second = platform.workers[0]
        os.kill(launcher_of(second), signal.SIGKILL)
        wait_until(lambda: second not in platform.workers)
        good = runsync(platform, {"prompt": "The river", "max_tokens": 5})
        assert good["status"] == "COMPLETED", good


async def health(platform: Platform) -> Any:
    import aiohttp

    headers = {"Authorization": "Bearer local"}
    url = f"{platform.endpoint_url}/health"
    async with aiohttp.ClientSession(headers=headers) as session, session.get(url) as response:
        return await response.json()


def test_a_worker_whose_tgi_hangs_is_replaced() -> None:
    env = {**local_env("tgi"), "HEALTH_TIMEOUT": "8"}
    with running("tgi", env=env, rules=QUICK) as platform:
        first = platform.workers[0]
        bad = runsync(platform, {"prompt": "[[hang 2]]"})
        assert bad["status"] == "FAILED", bad
        assert json.loads(bad["error"])["code"] == "engine_died"
        good = runsync(platform, {"prompt": "The river", "max_tokens": 5})
        assert good["status"] == "COMPLETED", good
        assert first not in platform.workers


def test_a_worker_finishes_its_jobs_at_sigterm() -> None:
    with running("tgi", env=local_env("tgi"), rules=QUICK) as platform:
        (worker,) = platform.workers
        session = launcher_of(worker)
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(
                runsync, platform, {"prompt": "[[slow 300]] go", "max_tokens": 15, "temperature": 0}
            )
            wait_until(lambda: job.done() or platform.call(health(platform))["jobs"]["inProgress"] == 1)
            worker.terminate()
            assert job.result()["status"] == "COMPLETED"
        wait_until(lambda: worker.returncode is not None)
        assert worker.returncode == 0
        assert reaper.members(session) == []


@pytest.mark.parametrize(
    ("env", "code", "text"),
    [
        ({"TGI_STAND_IN_START": "oom"}, "out_of_memory", "CUDA out of memory"),
        ({"MODEL_NAME": ""}, "bad_setting", "MODEL_ID"),
        ({"TGI_EXTRA_ARGS": "--max-model-len 9"}, "bad_setting", "--max-model-len"),
        ({"MAX_BATCH_TOTAL_TOKENS": "9", "MAX_TOTAL_TOKENS": "10"}, "bad_setting", "max_total_tokens"),
    ],
    ids=["memory", "model", "argument", "validation"],
)  # fmt: skip
def test_a_permanent_cause_is_answered_to_every_job(env: dict[str, str], code: str, text: str) -> None:
    with running("tgi", env={**local_env("tgi"), **env}) as platform:
        answer = runsync(platform, {"prompt": "a"})
        assert answer["status"] == "FAILED", answer
        problem = json.loads(answer["error"])
        assert problem["code"] == code, problem
        assert text in problem["message"]


def test_another_cause_ends_the_worker() -> None:
    env = {**local_env("tgi"), "TGI_STAND_IN_START": "crash"}
    with pytest.raises(WorkerFailed, match="tgi ended with status 1"), running("tgi", env=env):
        pass


def test_complete_answers_where_streaming_is_false() -> None:
    with running("tgi", env={**local_env("tgi"), "STREAMING": "false"}) as platform:
        answer = runsync(platform, {"prompt": "The river", "max_tokens": 1})
        assert answer["output"]["finish_reason"] == "length"
        assert "STREAMING=false" in runsync(platform, {"prompt": "The river", "stream": True})["error"]


def test_make_run_says_that_it_is_not_tgi() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.start", "run", "tgi"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stand-in" in done.stderr
    assert "stand-in/no-model" in done.stdout
