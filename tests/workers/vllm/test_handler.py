"""The vllm worker under the local platform: its failures, beside a small stand-in for the engine.

test_engine.py has the real one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from local import Platform, Rules, WorkerFailed, running
from serving.engine_server import reaper
from tests.helpers import wait_until
from tools.models import local_env

pytestmark = pytest.mark.engine
STAND_IN = Path(__file__).parent / "vllm_like.py"

RULES = Rules(ping_interval=1, missed_pings=3, restart_delay=0.1, grace=30)


def env_of(**env: str) -> dict[str, str]:
    stand_in = {"ENGINE_COMMAND": f"{sys.executable} -u {STAND_IN} {{model}}"}
    return {**local_env("vllm"), **stand_in, "PREWARM": "false", **env}


@contextmanager
def worker(**env: str) -> Iterator[Platform]:
    with running("vllm", env=env_of(**env), rules=RULES, ready_timeout=150) as platform:
        yield platform


class Client:
    def __init__(self, platform: Platform) -> None:
        self.platform = platform

    def __call__(self, method: str, path: str, body: Any = None) -> Any:
        url = f"{self.platform.endpoint_url}/{path}"
        answer = requests.request(method, url, json=body, headers={"Authorization": "any"}, timeout=120)
        return answer.json()

    def run(self, **order: Any) -> str:
        return str(self("POST", "run", {"input": order})["id"])

    def wait(self, job: str, *states: str) -> Any:
        """The job once it is in one of `states` or at its end."""
        answer: Any = None

        def has_state() -> bool:
            nonlocal answer
            answer = self("GET", f"status/{job}")
            return str(answer["status"]) in (*states, "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")

        wait_until(has_state)
        return answer

    def log(self) -> str:
        return "\n".join(line for process in self.platform.workers for line in process.lines)

    def received(self, order: str) -> int:
        """How many jobs with this order have reached the living workers' engines.

        A job is IN_PROGRESS before: when it is on its way to its worker, which may end meanwhile.
        """
        return self.log().count(f"received {order}")

    def engine(self) -> int:
        """The process id of the running worker's engine."""
        pids = [int(pid) for pid in re.findall(r"vllm: process (\d+)", self.log())]
        return pids[-1]


@pytest.fixture(scope="module")
def supervised() -> Iterator[Client]:
    """One endpoint whose engine the tests break one after another; its worker is replaced each time."""
    with (
        socket.create_server(("127.0.0.1", 0)) as owner,  # the engine's port is in use
        worker(VLLM_PORT=str(owner.getsockname()[1]), HEALTH_TIMEOUT="8") as platform,
    ):
        client = Client(platform)
        yield client
        last = client.engine()
    assert reaper.members(last) == []


def test_a_port_in_use_and_the_concurrency(supervised: Client) -> None:
    log = supervised.log()
    assert re.search(r"port \d+ is in use, taking another one", log)
    assert "concurrency=14" in log
    answer = supervised.wait(supervised.run(prompt="hello"))
    assert answer["status"] == "COMPLETED", answer
    assert answer["output"][0]["id"] == f"cmpl-{answer['id']}"


def test_a_stream_that_stops_before_its_end_is_no_answer(supervised: Client) -> None:
    answer = supervised.wait(supervised.run(prompt="stop", stream=True))
    assert answer["status"] == "FAILED", answer
    assert json.loads(answer["error"])["code"] == "engine_unreachable"
    complete = supervised.wait(supervised.run(prompt="hello", stream=True))
    assert complete["status"] == "COMPLETED", complete
    assert "".join(complete["output"]).endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("way", ["with jobs", "hung", "between jobs"])
def test_a_dead_engine_ends_its_jobs_and_its_worker_is_replaced(supervised: Client, way: str) -> None:
    before = supervised.platform.workers[0].id
    engine_was = supervised.engine()
    waiting = []
    if way != "between jobs":
        waiting = [supervised.run(prompt="wait 600", stream=stream) for stream in (False, True, True)]
        wait_until(lambda: supervised.received("wait 600") == 3)
    began = time.monotonic()
    if way == "hung":
        supervised.run(prompt="hang")
    else:
        os.kill(engine_was, signal.SIGKILL)
    for job in waiting:
        answer = supervised.wait(job)
        assert answer["status"] == "FAILED", answer
        error = json.loads(answer["error"])
        assert (error["type"], error["code"]) == ("server_error", "engine_died")
    assert time.monotonic() - began < 60
    wait_until(lambda: reaper.members(engine_was) == [])  # the one that would hold the GPU, too
    wait_until(lambda: [worker.id for worker in supervised.platform.workers] != [before])
    answer = supervised.wait(supervised.run(prompt="hello"))
    assert answer["status"] == "COMPLETED"


def test_a_permanent_cause_is_answered_to_every_job() -> None:
    with worker(FAKE_SAYS="vllm: error: argument --dtype: invalid choice: 'int3'") as platform:
        client = Client(platform)
        for _ in range(2):
            answer = client.wait(client.run(prompt="hello"))
            assert answer["status"] == "FAILED"
            error = json.loads(answer["error"])
            assert error["code"] == "bad_setting"
            assert "--dtype: invalid choice: 'int3'" in error["message"]
        assert len(platform.workers) == 1
        assert client.log().count("start failed") == 1


def test_another_cause_ends_the_worker() -> None:
    failing = worker(FAKE_SAYS="Segmentation fault (core dumped)")
    with pytest.raises(WorkerFailed, match="vllm ended with status 1 before it was ready"), failing:
        pass


def test_too_little_memory_is_tried_again_with_smaller_settings(tmp_path: Path) -> None:
    says = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"
    with worker(FAKE_SAYS_ONCE=f"{tmp_path / 'tried'}:{says}", MAX_NUM_SEQS="7") as platform:
        client = Client(platform)
        assert "Trying once more with smaller settings: max-model-len, max-num-batched-tokens" in client.log()
        argv = client.wait(client.run(prompt="hello"))["output"][0]["argv"]
        assert argv[argv.index("--max-model-len") + 1] == "auto"
        assert argv[argv.index("--max-num-seqs") + 1] == "7"  # the user's own
        assert "concurrency=7" in client.log()


def test_too_little_memory_twice_is_permanent() -> None:
    with worker(FAKE_SAYS="torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB") as platform:
        client = Client(platform)
        error = json.loads(client.wait(client.run(prompt="hello"))["error"])
        assert error["code"] == "out_of_memory"
        assert client.log().count("Trying once more") == 1


def test_sigterm_ends_the_jobs_first_and_then_the_engine() -> None:
    with worker() as platform:
        client = Client(platform)
        child = client.engine()
        assert len(reaper.members(child)) == 2
        job = client.run(prompt="wait 3")
        wait_until(lambda: client.received("wait 3") == 1)
        process = platform.workers[0]
        platform.call(_soon(process.terminate))
        assert client.wait(job)["status"] == "COMPLETED"
        wait_until(lambda: process.returncode is not None)
        assert process.returncode == 0
        wait_until(lambda: reaper.members(child) == [])


async def _soon(function: Callable[[], None]) -> None:
    function()
