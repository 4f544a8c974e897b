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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from local import Platform, Rules, WorkerFailed, running
from serving.engine_server import reaper
from tests.helpers import runsync, wait_until
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


def log(platform: Platform) -> str:
    """Of the living workers."""
    return "\n".join(line for process in platform.workers for line in process.lines)


def received(platform: Platform, order: str) -> int:
    """How many jobs with this order have reached the engine, which is later than IN_PROGRESS."""
    return log(platform).count(f"received {order}")


def engine(platform: Platform) -> int:
    """The process id of the running worker's engine."""
    return int(re.findall(r"vllm: process (\d+)", log(platform))[-1])


@pytest.fixture(scope="module")
def supervised() -> Iterator[Platform]:
    """One endpoint whose engine the tests break one after another; its worker is replaced each time."""
    with (
        socket.create_server(("127.0.0.1", 0)) as owner,  # the engine's port is in use
        worker(VLLM_PORT=str(owner.getsockname()[1]), HEALTH_TIMEOUT="8") as platform,
    ):
        yield platform


def test_a_port_in_use_and_the_concurrency(supervised: Platform) -> None:
    assert re.search(r"port \d+ is in use, taking another one", log(supervised))
    assert "concurrency=14" in log(supervised)
    answer = runsync(supervised, prompt="hello")
    assert answer["status"] == "COMPLETED", answer
    assert answer["output"][0]["id"] == f"cmpl-{answer['id']}"


@pytest.mark.parametrize("way", ["hung", "between jobs"])
def test_a_dead_engine_ends_its_jobs_and_its_worker_is_replaced(supervised: Platform, way: str) -> None:
    before, engine_was = supervised.workers[0].id, engine(supervised)
    with ThreadPoolExecutor(4) as pool:
        if way == "hung":
            jobs = [pool.submit(runsync, supervised, prompt="wait 600", stream=s) for s in (False, True)]
            wait_until(lambda: received(supervised, "wait 600") == 2)
            jobs.append(pool.submit(runsync, supervised, prompt="hang"))
            for job in jobs:
                error = json.loads(job.result()["error"])
                assert (error["type"], error["code"]) == ("server_error", "engine_died")
        else:
            os.kill(engine_was, signal.SIGKILL)
    wait_until(lambda: reaper.members(engine_was) == [])  # the one that would hold the GPU, too
    wait_until(lambda: [worker.id for worker in supervised.workers] != [before])
    assert runsync(supervised, prompt="hello")["status"] == "COMPLETED"


def test_sigterm_ends_the_jobs_first_and_then_the_engine(supervised: Platform) -> None:
    """Last: the module's worker ends."""
    child, process = engine(supervised), supervised.workers[0]
    assert len(reaper.members(child)) == 2
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(runsync, supervised, prompt="wait 3")
        wait_until(lambda: received(supervised, "wait 3") == 1)
        process.terminate()
        assert job.result()["status"] == "COMPLETED"
    wait_until(lambda: process.returncode is not None)
    assert process.returncode == 0
    wait_until(lambda: reaper.members(child) == [])


def test_a_permanent_cause_is_answered_to_every_job() -> None:
    with worker(FAKE_SAYS="vllm: error: argument --dtype: invalid choice: 'int3'") as platform:
        for _ in range(2):
            answer = runsync(platform, prompt="hello")
            assert answer["status"] == "FAILED"
            error = json.loads(answer["error"])
            assert error["code"] == "bad_setting"
            assert "--dtype: invalid choice: 'int3'" in error["message"]
        assert len(platform.workers) == 1
        assert log(platform).count("start failed") == 1


def test_another_cause_ends_the_worker() -> None:
    failing = worker(FAKE_SAYS="Segmentation fault (core dumped)")
    with pytest.raises(WorkerFailed, match="vllm ended with status 1 before it was ready"), failing:
        pass


def test_too_little_memory_is_tried_again_with_smaller_settings(tmp_path: Path) -> None:
    says = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"
    with worker(FAKE_SAYS_ONCE=f"{tmp_path / 'tried'}:{says}", MAX_NUM_SEQS="7") as platform:
        lowered = "max-model-len, max-num-batched-tokens"
        assert f"Trying once more with smaller settings: {lowered}" in log(platform)
        argv = runsync(platform, prompt="hello")["output"][0]["argv"]
        assert argv[argv.index("--max-model-len") + 1] == "auto"
        assert argv[argv.index("--max-num-seqs") + 1] == "7"  # the user's own
        assert "concurrency=7" in log(platform)
