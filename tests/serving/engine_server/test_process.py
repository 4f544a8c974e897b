"""serving.engine_server.process beside a small real server (engine.py): processes, sockets, signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys

import pytest

from serving.engine_server import reaper
from serving.engine_server.process import EngineFailed, EngineServer
from shared.errors import ENGINE_DIED, JobError, StartError
from shared.startup import classify
from tests.helpers import until, wait_until
from tests.serving.engine_server.watched import ENGINE, SECRET, Watched, command
from tools.workers import ROOT

# ---- start ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "token"), [({}, "***"), ({"HF_TOKEN": "inner-token"}, "***"), ({"HF_TOKEN": None}, "None")]
)
def test_its_environment_and_its_output_without_secrets(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    env: dict[str, str | None],
    token: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("OTHER_TOKEN", "inner-token")  # so that the log redacts it
    server = Watched(env=env)
    server.start()
    server.stop()
    assert server.last_lines == [f"starting with token {token}"]
    out = capsys.readouterr().out
    assert f"engine: starting with token {token}" in out
    assert SECRET not in out


def test_a_permanent_cause_in_the_log() -> None:
    server = Watched("--says", "loading\nvllm: error: unrecognized arguments: --no-such-flag\nsee above")
    with pytest.raises(StartError, match="--no-such-flag") as caught:
        server.start()
    assert caught.value.code == "bad_setting"
    assert server.pid is not None
    assert reaper.members(server.pid) == []


def test_another_cause_may_be_temporary() -> None:
    with pytest.raises(EngineFailed, match="status 3") as caught:
        Watched("--says", "Segmentation fault").start()
    assert classify(caught.value) is None


def test_a_command_that_is_not_there() -> None:
    server = EngineServer("engine", lambda _: ["/nowhere/engine"], on_death=lambda _: None)
    with pytest.raises(StartError, match="/nowhere/engine cannot be started: No such file") as caught:
        server.start()
    assert caught.value.code == "no_engine"


def test_an_engine_that_never_answers_is_given_up() -> None:
    server = Watched("--silent", "--child", start_timeout=2)
    with pytest.raises(EngineFailed, match="did not answer within 2 s"):
        server.start()
    assert server.pid is not None
    assert reaper.members(server.pid) == []


def test_a_port_in_use_is_left_to_its_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:
        taken = owner.getsockname()[1]
        server = Watched(port=taken)
        server.start()
        try:
            assert server.url != f"http://127.0.0.1:{taken}"
        finally:
            server.stop()
    server.start()  # the port is free now
    server.stop()
    assert server.url == f"http://127.0.0.1:{taken}"


def test_a_port_that_is_taken_before_the_child_binds_it() -> None:
    """The first child finds its port taken: its command gives it another port than the free one."""
    with socket.create_server(("127.0.0.1", 0)) as owner:
        ports = [owner.getsockname()[1]]
        seen = []

        def late(port: int) -> list[str]:
            seen.append(port)
            return command()(ports.pop() if ports else port)

        server = EngineServer("engine", late, start_timeout=60, on_death=lambda _: None)
        server.start()
        server.stop()
    assert len(seen) == 2


# ---- death ---------------------------------------------------------------------------------------------


async def test_jobs_in_flight_receive_the_crash(server: Watched) -> None:
    async def stream() -> None:
        async for _ in server.stream("/stream", {"count": 10**6, "seconds": 0.01}):
            pass

    work = [asyncio.create_task(server.request("POST", "/wait", {"seconds": 600})) for _ in range(3)]
    work += [asyncio.create_task(stream())]
    await until(lambda: server.waiting() == 4)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    for error in await asyncio.gather(*work, return_exceptions=True):
        assert isinstance(error, JobError)
        assert error.code == ENGINE_DIED
    await until(server.dead.is_set)
    await until(lambda: reaper.members(server.pid or 0) == [])  # its own children too
    with pytest.raises(JobError) as caught:
        await server.request("POST", "/echo", {})
    assert caught.value.code == ENGINE_DIED


async def test_a_crash_of_the_engine_behind_its_server(server: Watched) -> None:
    """vLLM answers 500 when its core has died, and exits with status 0 a second later."""
    with pytest.raises(JobError) as caught:
        await server.request("POST", "/sick", {})
    assert caught.value.code == ENGINE_DIED
    await until(server.dead.is_set)


async def test_a_hung_engine_is_ended() -> None:
    server = Watched("--deaf", "--child", hang_timeout=2)
    server.start()
    try:
        with pytest.raises(JobError) as caught:
            await server.request("POST", "/hang", {})
        assert caught.value.code == ENGINE_DIED
        assert "health was silent for 2 s" in caught.value.message
        await until(server.dead.is_set)
        assert server.pid is not None
        assert reaper.members(server.pid) == []
    finally:
        server.stop()


# ---- end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--child"], ["--deaf", "--child"]], ids=["SIGTERM", "SIGKILL"])
def test_stopping_ends_all_that_it_started_and_is_no_crash(flags: list[str]) -> None:
    server = Watched(*flags, grace=0.5 if "--deaf" in flags else 20)
    server.start()
    assert server.pid is not None
    wait_until(lambda: len(reaper.members(server.pid or 0)) == 3)  # itself, its child and that one's
    server.stop()
    assert reaper.members(server.pid) == []
    assert not server.dead.is_set()


WORKER = """
import sys, time
from serving.engine_server.process import EngineServer

engine = [sys.executable, "-u", sys.argv[1]]
server = EngineServer("engine", lambda port: [*engine, str(port), "--child"], grace=20)
server.start()
server.prove(lambda: None)
print("pid", server.pid, flush=True)
if sys.argv[2] == "exit":
    sys.exit(0)
time.sleep(3600)
"""


@pytest.mark.parametrize("end", ["exit", "SIGKILL", "SIGTERM", "engine"])
def test_no_process_outlives_the_worker(end: str) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(ENGINE), end], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    pid = next(int(line.split()[1]) for line in worker.stdout if line.startswith("pid"))
    if end == "engine":
        os.kill(pid, signal.SIGKILL)
        assert worker.wait(60) == 1
    elif end != "exit":
        worker.send_signal(getattr(signal, end))
    worker.wait(60)
    worker.stdout.close()
    wait_until(lambda: reaper.members(pid) == [])
