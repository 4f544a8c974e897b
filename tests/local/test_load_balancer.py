"""The load balancer: requests go to ready workers as they are, by RunPod's rules."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests

from local import LoadBalancer, Rules, running
from local.examples import http_commands, openai_example
from local.platform import ROOT
from tests.helpers import wait_until
from tests.local.conftest import HANDLERS
from tools.models import real_env

pytestmark = pytest.mark.engine

RULES = Rules(
    ping_interval=1, missed_pings=2, restart_delay=0.1, grace=30, worker_wait=60, request_timeout=60,
    http_bytes=2_000_000,
)  # fmt: skip
TOY = ROOT / "tests" / "shared" / "http" / "toy.py"

Start = Callable[..., AbstractContextManager[LoadBalancer]]


@pytest.fixture
def start(notes: Path) -> Start:
    """Starts an endpoint of one worker for a test that harms it."""
    notes.write_text("")

    def start(rules: Rules = RULES, **env: str) -> AbstractContextManager[LoadBalancer]:
        return running(HANDLERS / "web.py", mode="http", env={"NOTES": str(notes), **env}, rules=rules)  # type: ignore[return-value]

    return start


@pytest.fixture(scope="module")
def endpoint(notes: Path) -> Iterator[LoadBalancer]:
    env = {"NOTES": str(notes)}
    with running(HANDLERS / "web.py", mode="http", workers=2, env=env, rules=RULES) as endpoint:
        yield endpoint  # type: ignore[misc]


@pytest.fixture(scope="module")
def toy() -> Iterator[LoadBalancer]:
    """A worker with a JobHandler, in its HTTP mode."""
    with running(TOY, mode="http", rules=RULES) as endpoint:
        yield endpoint  # type: ignore[misc]


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(150) as pool:
        yield pool


def call(endpoint: LoadBalancer, path: str, method: str = "GET", **options: Any) -> requests.Response:
    options = {"headers": {"Authorization": "any"}, "timeout": 120} | options
    return requests.request(method, f"{endpoint.base_url}{path}", **options)


def release(endpoint: LoadBalancer) -> None:
    """Let the workers answer /hold and /parts from now on."""
    for worker in endpoint.workers:
        requests.get(f"{endpoint.worker_url(worker)}/release", timeout=60)


def error(answer: requests.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]


def test_a_request_and_its_answer_pass_as_they_are(endpoint: LoadBalancer) -> None:
    connection = http.client.HTTPConnection(endpoint.base_url.removeprefix("http://"), timeout=60)
    connection.putrequest("PROPFIND", path := "/echo/%2e%2F/../x?a=b%20c&a=%C3%A9", skip_accept_encoding=True)
    for header in (("Authorization", "any"), ("X-Twice", "a"), ("X-Twice", "b"), ("Content-Length", "3")):
        connection.putheader(*header)
    connection.endheaders(b"abc")
    answer = connection.getresponse()
    assert answer.status == 418
    assert answer.headers.get_all("X-Twice") == ["1", "2"]
    assert answer.headers["X-Runpod-Worker-Id"] in {worker.id for worker in endpoint.workers}
    seen = json.load(answer)
    assert (seen["method"], seen["path"], seen["bytes"]) == ("PROPFIND", path, 3)
    sent = [["host", endpoint.base_url.removeprefix("http://")], ["authorization", "any"]]
    sent += [["x-twice", "a"], ["x-twice", "b"], ["content-length", "3"]]
    assert sorted(seen["headers"]) == sorted(sent), "none is added, none is lost"


def test_a_request_without_a_key_is_refused_at_the_edge(endpoint: LoadBalancer) -> None:
    assert error(call(endpoint, "/echo", headers={})) == (401, "unauthorized")


@pytest.mark.parametrize("declared", [True, False])
def test_a_large_body_is_refused(endpoint: LoadBalancer, declared: bool) -> None:
    body: Any = bytes(3_000_000) if declared else (bytes(100_000) for _ in range(30))
    assert error(call(endpoint, "/echo", "POST", data=body)) == (413, "the body is too large")
    assert call(endpoint, "/echo", "POST", data=bytes(2_000_000)).json()["bytes"] == 2_000_000


def test_a_large_answer_is_refused_or_cut_off(endpoint: LoadBalancer) -> None:
    assert len(call(endpoint, "/large?bytes=2000000").content) == 2_000_000
    assert error(call(endpoint, "/large?bytes=2000001")) == (413, "the answer is too large")
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        call(endpoint, "/large?chunked&bytes=9000000")


def test_a_part_arrives_before_the_next_is_made(endpoint: LoadBalancer) -> None:
    with call(endpoint, "/parts", stream=True) as answer:
        parts = answer.iter_content(None)
        assert next(parts) == b"data: 1\n\n"
        release(endpoint)
        assert next(parts) == b"data: 2\n\n"


def test_least_connections_are_chosen(start: Start, notes: Path, pool: ThreadPoolExecutor) -> None:
    env = {"NOTES": str(notes)}
    with running(HANDLERS / "web.py", mode="http", workers=2, env=env, rules=RULES) as endpoint:
        held = [pool.submit(call, endpoint, "/hold") for _ in range(150)]  # type: ignore[arg-type]
        wait_until(lambda: notes.read_text().count("held") == 150)
        assert [worker.state for worker in endpoint.workers] == ["running", "running"]
        release(endpoint)  # type: ignore[arg-type]
        assert list(Counter(future.result().json()["pid"] for future in held).values()) == [75, 75]
        wait_until(lambda: [worker.state for worker in endpoint.workers] == ["idle", "idle"])


def test_a_client_that_hangs_up_ends_its_request_at_the_worker(start: Start, notes: Path) -> None:
    with start() as endpoint:
        answer = call(endpoint, "/parts", stream=True)
        next(answer.iter_content(None))
        answer.close()
        wait_until(lambda: "hung up" in notes.read_text())
        with pytest.raises(requests.exceptions.ReadTimeout):
            call(endpoint, "/hold", timeout=2)
        wait_until(lambda: notes.read_text().count("hung up") == 2)
        assert call(endpoint, "/echo").status_code == 418


def test_a_long_request_ends(start: Start, notes: Path) -> None:
    with start(replace(RULES, request_timeout=0.5)) as endpoint:
        assert error(call(endpoint, "/hold")) == (504, "the request took too long")
        wait_until(lambda: "hung up" in notes.read_text())


def test_a_killed_worker_is_replaced(start: Start, notes: Path, pool: ThreadPoolExecutor) -> None:
    with start() as endpoint:
        (worker,) = endpoint.workers
        held = pool.submit(call, endpoint, "/hold")
        wait_until(lambda: "held" in notes.read_text())
        os.kill(worker.pid, signal.SIGKILL)
        status, cause = error(held.result())
        assert status == 502
        assert "the worker did not answer" in cause
        assert call(endpoint, "/echo").json()["pid"] != worker.pid, "the request waited for the new worker"
        assert endpoint.workers[0].id != worker.id


def test_a_worker_that_is_ill_is_taken_out_and_replaced(start: Start) -> None:
    with start() as endpoint:
        (worker,) = endpoint.workers
        requests.get(f"{endpoint.worker_url(worker)}/get_ill?status=500", timeout=60)
        wait_until(lambda: endpoint.workers[0].id != worker.id)
        assert call(endpoint, "/echo").json()["pid"] != worker.pid


def test_a_worker_that_loads_again_is_taken_out_and_kept(start: Start) -> None:
    with start(replace(RULES, worker_wait=2.5)) as endpoint:
        (worker,) = endpoint.workers
        requests.get(f"{endpoint.worker_url(worker)}/get_ill?status=204", timeout=60)
        wait_until(lambda: call(endpoint, "/echo").status_code == 400)
        assert endpoint.workers == [worker]
        requests.get(f"{endpoint.worker_url(worker)}/get_ill?status=200", timeout=60)
        assert call(endpoint, "/echo").json()["pid"] == worker.pid


def test_a_request_without_a_ready_worker_is_refused_in_time(start: Start) -> None:
    with start(replace(RULES, worker_wait=0.5, restart_delay=60)) as endpoint:
        endpoint.workers[0].kill()
        begin = time.monotonic()
        assert error(call(endpoint, "/echo")) == (400, "no workers available")
        assert time.monotonic() - begin >= 0.5


def test_a_worker_that_is_never_ready_fails_the_start(notes: Path) -> None:
    env = {"NOTES": str(notes), "PING": "204"}
    with (
        pytest.raises(TimeoutError, match="not 1 workers are ready"),
        running(HANDLERS / "web.py", mode="http", env=env, rules=RULES, ready_timeout=1.5),
    ):
        pass


def test_no_request_is_lost_at_the_end(pool: ThreadPoolExecutor) -> None:
    with running(TOY, mode="http", workers=2, rules=RULES) as endpoint:
        bodies = [{"input": {"seconds": 1, "parts": 2, "stream": n % 2 == 1}} for n in range(8)]
        held: list[Future[requests.Response]] = [
            pool.submit(call, endpoint, "/runsync", "POST", json=body)  # type: ignore[arg-type]
            for body in bodies
        ]
        workers = endpoint.workers
        urls = [endpoint.worker_url(worker) for worker in workers]  # type: ignore[attr-defined]
        wait_until(
            lambda: sum(requests.get(f"{url}/health", timeout=60).json()["in_flight"] for url in urls) == 8
        )
    answers = [future.result() for future in held]
    assert [answer.status_code for answer in answers] == [200] * 8
    assert all("COMPLETED" in answer.text or answer.text.count("data: ") == 2 for answer in answers)
    assert [worker.returncode for worker in workers] == [0, 0]


@pytest.mark.parametrize(
    ("route", "by_curl", "by_client"),
    [
        ("/v1/chat/completions", '{"content": "a"}', "abc"),
        ("/v1/audio/transcriptions", '"3 bytes"', "3 bytes"),
        ("/v1/audio/speech", "", "3000"),
    ],
)
def test_the_examples_that_serve_prints_work(
    toy: LoadBalancer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    route: str,
    by_curl: str,
    by_client: str,
) -> None:
    test_input = tmp_path / "test_input.json"
    test_input.write_text('{"input": {"audio": "YWJj"}}')
    (command,) = http_commands([route], url=toy.base_url, test_input=test_input, model="toy")
    program = openai_example([route], url=toy.openai_url, test_input=test_input, mode="http")
    assert program is not None
    monkeypatch.chdir(tmp_path)
    for run, printed in (
        (lambda: subprocess.run(["bash", "-c", command], check=True), by_curl),
        (lambda: exec(program, {}), by_client),
    ):
        run()
        assert printed in capfd.readouterr().out
        if route == "/v1/audio/speech":
            assert (tmp_path / "speech.mp3").read_bytes() == b"\1" * 3000


def test_the_command_line_serves_a_real_worker() -> None:
    command = [sys.executable, "-m", "local", "serve", "sentence-transformers", "--mode=http", "--port=0"]
    env = os.environ | real_env("sentence-transformers")
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=env, **pipes) as server:
        assert server.stdout is not None
        guide = ""
        while "Ctrl-C" not in guide:
            guide += (line := server.stdout.readline())
            assert line, "the endpoint has ended"
        match = re.search(
            r"With curl:\n\n(.+)\n\nWith OpenAI's client, in Python:\n\n(.+)\n\nCtrl-C", guide, re.S
        )
        assert match is not None
        curl = subprocess.run(["bash", "-c", match[1]], capture_output=True, text=True, check=True).stdout
        assert '"object":"embedding"' in curl
        assert '"status": "COMPLETED"' in curl
        python = [sys.executable, "-c", match[2]]
        assert subprocess.run(python, capture_output=True, text=True, check=True).stdout == "[384, 384]\n"
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
