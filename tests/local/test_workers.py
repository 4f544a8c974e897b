"""Worker processes: shared queue, crashes, hangs, drains, restarts, and nothing left behind."""

import asyncio
import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from local import Platform, WorkerFailed, WorkerProcess, running
from local.__main__ import main
from local.platform import ROOT
from tests.helpers import wait_until
from tests.local.conftest import HANDLERS, RULES, Client, workers_health

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def three(notes: Path) -> Iterator[Client]:
    """Three workers that take one job at a time."""
    env = {"NOTES": str(notes), "RUNPOD_LOG_LEVEL": "INFO"}
    with running(HANDLERS / "echo.py", workers=3, env=env, rules=RULES) as platform:
        yield Client(platform)


def group(pid: int) -> list[int]:
    """The living processes of a worker's process group."""
    living = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process.pid)
    return living


def who_runs(client: Client, name: str) -> WorkerProcess:
    job = client.wait(name, "IN_PROGRESS")
    return next(worker for worker in client.platform.workers if worker.id == job["workerId"])


async def workers_of(platform: Platform) -> Any:
    """The `workers` of /health."""
    return (await asyncio.to_thread(Client(platform).get, "health"))["workers"]


def starts(notes: Path, name: str) -> list[str]:
    """The workers that have started a job, in order."""
    return re.findall(rf"start {re.escape(name)} (\w+)", notes.read_text())


def test_three_workers_share_a_queue(three: Client) -> None:
    endless = [three.run(sleep=60) for _ in range(3)]
    assert len({three.wait(name, "IN_PROGRESS")["workerId"] for name in endless}) == 3
    names = [three.run(n=n) for n in range(9)]
    assert {three.get(f"status/{name}")["status"] for name in names} == {"IN_QUEUE"}
    for name in endless:
        three.post(f"cancel/{name}")
    assert {three.wait(name)["status"] for name in names} == {"COMPLETED"}


def test_the_platforms_environment_and_log(three: Client) -> None:
    worker = three.platform.workers[0]
    assert worker.ready_after is not None
    assert 0 < worker.ready_after < 60
    assert any("Starting Serverless Worker" in line for line in worker.lines)
    assert len(group(worker.pid)) >= 2  # The worker, its heartbeat and what multiprocessing may add.


def test_a_killed_worker_loses_its_job_to_another(three: Client, notes: Path, tmp_path: Path) -> None:
    name = three.run(gate=str(tmp_path / "gate"))
    victim = who_runs(three, name)
    wait_until(lambda: starts(notes, name) == [victim.id])
    os.kill(victim.pid, signal.SIGKILL)
    (tmp_path / "gate").touch()
    job = three.wait(name)
    assert (job["status"], job["retries"]) == ("COMPLETED", 1)
    assert job["workerId"] == job["output"]["worker"] != victim.id
    assert starts(notes, name) == [victim.id, job["workerId"]]
    wait_until(lambda: not group(victim.pid))  # Its heartbeat has gone with it.
    assert victim.returncode == -signal.SIGKILL
    late = three("POST", f"job-done/{victim.id}/{name}", {"output": "late"})
    assert late.status_code == 404
    assert three.get(f"status/{name}") == job
    three.platform.call(three.platform.wait_ready(60, count=3))
    assert three.get("health")["workers"]["idle"] == 3


def test_a_frozen_worker_loses_its_job(three: Client, notes: Path, tmp_path: Path) -> None:
    name = three.run(gate=str(tmp_path / "gate"))
    frozen = who_runs(three, name)
    wait_until(lambda: starts(notes, name) == [frozen.id])
    os.killpg(frozen.pid, signal.SIGSTOP)
    (tmp_path / "gate").touch()
    wait_until(lambda: three.get("health")["workers"]["unhealthy"] == 1)
    job = three.wait(name)
    assert job["workerId"] != frozen.id
    os.killpg(frozen.pid, signal.SIGCONT)
    wait_until(lambda: any("Failed to return job results" in line for line in frozen.lines))
    assert three.get(f"status/{name}") == job
    wait_until(lambda: three.get("health")["workers"]["idle"] == 3)


def test_a_job_that_kills_its_workers_fails(three: Client, notes: Path) -> None:
    name = three.run(exit=True)
    job = three.wait(name)
    assert (job["status"], job["error"]) == ("FAILED", "job timed out after 1 retries")
    assert len(set(starts(notes, name))) == 2
    three.platform.call(three.platform.wait_ready(60, count=3))


def test_sigterm_lets_the_job_finish_and_no_other_start(three: Client, notes: Path, tmp_path: Path) -> None:
    name = three.run(gate=str(tmp_path / "gate"))
    leaver = who_runs(three, name)
    wait_until(lambda: starts(notes, name) == [leaver.id])
    leaver.terminate()
    assert leaver.state == "draining"
    others = [three.run(n=n) for n in range(6)]
    (tmp_path / "gate").touch()
    job = three.wait(name)
    assert (job["status"], job["workerId"]) == ("COMPLETED", leaver.id)
    assert leaver.id not in {three.wait(other)["workerId"] for other in others}
    wait_until(lambda: leaver.returncode is not None, RULES.grace)
    assert leaver.returncode == 0
    assert len(three.platform.workers) == 2  # It is not replaced.


def test_stop_pod_replaces_a_worker_after_its_other_jobs(notes: Path, tmp_path: Path) -> None:
    env = {"NOTES": str(notes), "RUNPOD_LOG_LEVEL": "INFO", "CONCURRENCY": "4"}
    with running(HANDLERS / "echo.py", env=env, rules=RULES) as platform:
        client = Client(platform)
        (first,) = platform.workers
        slow = client.run(gate=str(tmp_path / "gate"))
        wait_until(lambda: starts(notes, slow) == [first.id])
        refresh = client.runsync(**{"return": "refresh"})
        assert refresh["output"] == {"worker": first.id}
        assert client.get("health")["workers"]["idle"] == 0
        after = client.run(n=1)
        (tmp_path / "gate").touch()
        assert client.wait(slow)["workerId"] == first.id
        assert client.wait(after)["workerId"] != first.id
        assert first.returncode == 0
        begin = time.monotonic()
    # Left alone, the SDK waits for the end of its long poll, 30 s.
    assert time.monotonic() - begin < RULES.grace


async def test_a_worker_that_never_gets_ready_shows_in_health(tmp_path: Path) -> None:
    platform = Platform(rules=RULES)
    await platform.start()
    env = {"START": "hang", "STARTS": str(tmp_path / "starts")}
    worker = await platform.add_worker([sys.executable, "start.py"], cwd=HANDLERS, env=env)
    await asyncio.to_thread(wait_until, lambda: len(worker.phases) == 2)
    with pytest.raises(TimeoutError, match=r"INFO    phase=load seconds=1\.500"):
        await platform.wait_ready(0.5)
    assert worker.state == "initializing"
    assert worker.phases == {"import": 0.25, "load": 1.5}
    assert (await workers_of(platform))["initializing"] == 1
    begin = time.monotonic()
    await platform.stop()
    assert time.monotonic() - begin < RULES.grace
    assert not group(worker.pid)


async def test_a_worker_that_fails_is_restarted_with_growing_pauses(tmp_path: Path) -> None:
    platform = Platform(rules=replace(RULES, restarts=3, restart_delay=0.3))
    await platform.start()
    log = tmp_path / "starts"
    env = {"START": "exit", "STARTS": str(log)}
    await platform.add_worker([sys.executable, "start.py"], cwd=HANDLERS, env=env)
    with pytest.raises(WorkerFailed, match=r"(?s)status 1 .*no such model"):
        await platform.wait_ready(30)
    await asyncio.to_thread(wait_until, lambda: log.read_text().count("\n") == 4)
    await asyncio.sleep(1)
    times = [float(line) for line in log.read_text().splitlines()]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(times) == 4  # Once and three times again, and no more.
    assert [pause >= least for pause, least in zip(pauses, (0.3, 0.6, 1.2), strict=True)] == [True] * 3
    assert await workers_of(platform) == workers_health(unhealthy=1)
    with pytest.raises(WorkerFailed):
        await platform.wait_ready(30)
    await platform.stop()


def test_running_reports_why_a_worker_failed(tmp_path: Path) -> None:
    env = {"START": "exit", "STARTS": str(tmp_path / "starts")}
    with pytest.raises(WorkerFailed, match="no such model"), running(HANDLERS / "start.py", env=env):
        pass
    with pytest.raises(FileNotFoundError, match="sentence-transformers"), running("no-such-worker"):
        pass


def test_a_taken_port_is_an_error(three: Client) -> None:
    port = int(three.platform.base_url.rpartition(":")[2].partition("/")[0])
    with pytest.raises(OSError, match="in use"), running(HANDLERS / "echo.py", port=port):
        pass


async def test_a_worker_that_does_not_leave_is_killed(tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(600)"
    platform = Platform(rules=replace(RULES, grace=0.5))
    await platform.start()
    worker = await platform.add_worker([sys.executable, "-u", "-c", stubborn], cwd=tmp_path)
    await asyncio.to_thread(wait_until, lambda: "up" in worker.lines)
    await platform.stop()
    assert worker.returncode == -signal.SIGKILL
    assert platform.workers == []


DEAF = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal = lambda *_: None  # The SDK's own handler is not to take its place,
sys.stdout = open(os.devnull, "w")  # and no broken pipe is to end it.
"""


@pytest.mark.parametrize("deaf", ["", DEAF], ids=["listens", "deaf"])
def test_workers_end_with_a_platform_that_is_killed(tmp_path: Path, deaf: str) -> None:
    handler = tmp_path / "handler.py"
    handler.write_text(deaf + (HANDLERS / "echo.py").read_text())
    script = textwrap.dedent(f"""
        import time
        from local import Rules, running
        with running({str(handler)!r}, rules=Rules(grace={1 if deaf else 30})) as platform:
            print(platform.workers[0].pid, flush=True)
            time.sleep(600)
    """)
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert len(group(pid)) >= 2
        process.kill()
    wait_until(lambda: not group(pid))


async def test_a_failed_start_leaves_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = []

    async def start(*command: str, **options: object) -> asyncio.subprocess.Process:
        if started:  # the guard
            raise OSError("no more processes")
        started.append(await real(*command, **options))  # type: ignore[arg-type]
        return started[0]

    real = asyncio.create_subprocess_exec
    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    platform = Platform(rules=RULES)
    await platform.start()
    with pytest.raises(OSError, match="no more processes"):
        await platform.add_worker([sys.executable, "-c", "import time; time.sleep(600)"], cwd=tmp_path)
    await platform.stop()
    assert await asyncio.wait_for(started[0].wait(), 60) == -signal.SIGKILL


def test_the_command_line_runs_the_test_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    handler = tmp_path / "handler.py"
    shutil.copy(HANDLERS / "echo.py", handler)
    (tmp_path / "test_input.json").write_text('{"input": {"n": 1, "big": 5000}}')
    assert main(["run", str(handler)]) == 0
    printed = capsys.readouterr().out
    assert '"status": "COMPLETED"' in printed
    assert "(5000 characters)" in printed
    assert re.search(r"request to answer +\d+\.\d ms", printed)
    (tmp_path / "test_input.json").write_text('{"input": {"raise": "oh no"}}')
    assert main(["run", str(handler)]) == 1


@pytest.mark.skipif(not shutil.which("curl"), reason="the example that it pastes is a curl command")
def test_the_command_line_serves_and_its_example_works(tmp_path: Path) -> None:
    handler = tmp_path / "handler.py"
    shutil.copy(HANDLERS / "tokens.py", handler)
    (tmp_path / "test_input.json").write_text('{"input": {"count": 1, "text": "it\'s naïve"}}')
    command = [sys.executable, "-m", "local", "serve", str(handler), "--port", "0", "--env", "A=b"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as server:
        assert server.stdout is not None
        guide = ""
        while "Ctrl-C" not in guide:
            guide += server.stdout.readline()
        curl = guide[guide.index("curl -s") : guide.index("\n\nCtrl-C")]
        answer = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True).stdout
        assert "it's naïve" in answer
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    url = re.search(r"http://\S+/v2/local", guide)
    assert url is not None
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url[0]}/health")


def test_the_command_line_can_be_interrupted_while_the_worker_loads(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    command = [sys.executable, "-m", "local", "serve", str(HANDLERS / "start.py"), "--port", "0"]
    command += ["--env", "START=hang", "--env", f"STARTS={log}"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        wait_until(lambda: log.exists() and bool(log.read_text()))
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 130
        assert "Traceback" not in (errors := server.stderr.read())
        assert "phase=load" in errors
