"""The load balancer: requests go to ready workers as they are, by RunPod's rules."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from openai import OpenAI

from local import Platform, Rules, WorkerFailed, running
from tests.helpers import wait_until
from tests.local.conftest import HANDLERS
from tools.models import local_env

pytestmark = pytest.mark.engine

RULES = Rules(
    ping_interval=1, missed_pings=2, restart_delay=0.1, grace=10, worker_wait=20, request_timeout=3,
    http_bytes=2_000_000,
)  # fmt: skip
KEY = {"Authorization": "Bearer any"}


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("notes") / "notes"
    path.touch()
    return path


@pytest.fixture(scope="module")
def endpoint(notes: Path) -> Iterator[Platform]:
    env = {"NOTES": str(notes)}
    with running(HANDLERS / "web.py", mode="http", workers=2, env=env, rules=RULES) as platform:
        yield platform


def call(endpoint: Platform, path: str, method: str = "GET", **options: Any) -> requests.Response:
    options.setdefault("headers", KEY)
    return requests.request(method, f"{endpoint.endpoint_url}{path}", timeout=60, **options)


def test_a_request_and_its_answer_pass_as_they_are(endpoint: Platform) -> None:
    answer = call(
        endpoint, "/echo?status=418&a=b%20c", "PUT", data=b"x" * 1000, headers=KEY | {"X-Sent": "1"}
    )
    assert answer.status_code == 418
    assert answer.headers["X-Sent"] == "1"
    assert answer.headers["X-Runpod-Worker-Id"] in {worker.id for worker in endpoint.workers}
    expected = {"method": "PUT", "path": "/echo?status=418&a=b%20c", "bytes": 1000}
    assert answer.json().items() >= expected.items()


def test_a_request_without_a_key_is_refused_at_the_edge(endpoint: Platform) -> None:
    assert call(endpoint, "/echo", headers={}).status_code == 401


def test_the_worker_with_the_fewest_requests_is_next(endpoint: Platform) -> None:
    with ThreadPoolExecutor() as pool:
        held = [pool.submit(call, endpoint, "/hold?seconds=1") for _ in range(6)]
        pids = [future.result().json()["pid"] for future in held]
    assert sorted(pids.count(pid) for pid in set(pids)) == [3, 3]


def test_a_part_arrives_before_the_next_is_made(endpoint: Platform) -> None:
    with call(endpoint, "/parts", stream=True) as answer:
        parts = answer.iter_content(None)
        assert next(parts) == b"data: 1\n\n"
        worker = next(w for w in endpoint.workers if w.id == answer.headers["X-Runpod-Worker-Id"])
        requests.get(f"http://127.0.0.1:{worker.env['PORT']}/go", timeout=10)
        assert next(parts) == b"data: 2\n\n"


def test_a_client_that_hangs_up_ends_its_request_at_the_worker(notes: Path) -> None:
    env = {"NOTES": str(notes)}
    with running(HANDLERS / "web.py", mode="http", env=env, rules=RULES) as endpoint:
        answer = call(endpoint, "/parts", stream=True)
        next(answer.iter_content(None))
        answer.close()
        wait_until(lambda: "hung up" in notes.read_text(), 10)


@pytest.mark.parametrize("declared", [True, False])
def test_a_large_body_is_refused(endpoint: Platform, declared: bool) -> None:
    body: Any = bytes(3_000_000) if declared else (bytes(100_000) for _ in range(30))
    assert call(endpoint, "/echo", "POST", data=body).status_code == 413


def test_a_large_answer_is_cut_off(endpoint: Platform) -> None:
    assert len(call(endpoint, "/large?bytes=2000000").content) == 2_000_000
    with pytest.raises(requests.exceptions.RequestException):
        call(endpoint, "/large?bytes=9000000")


def test_a_long_request_ends(endpoint: Platform) -> None:
    begin = time.monotonic()
    assert call(endpoint, "/hold?seconds=60").status_code == 504
    assert time.monotonic() - begin < 10


def test_a_killed_worker_fails_its_request_and_is_replaced(notes: Path) -> None:
    env = {"NOTES": str(notes)}
    with running(HANDLERS / "web.py", mode="http", env=env, rules=RULES) as endpoint:
        (worker,) = endpoint.workers
        answers: list[requests.Response] = []
        thread = threading.Thread(target=lambda: answers.append(call(endpoint, "/hold?seconds=2")))
        thread.start()
        wait_until(lambda: f"held {worker.pid}" in notes.read_text(), 20)
        worker.kill()
        thread.join()
        assert answers[0].status_code == 502
        assert call(endpoint, "/echo").json()["pid"] != worker.pid, "the request waited for the new worker"


def test_a_request_without_a_ready_worker_is_told_so_in_time(notes: Path) -> None:
    rules = replace(RULES, worker_wait=0.5, restart_delay=30)
    with running(HANDLERS / "web.py", mode="http", env={"NOTES": str(notes)}, rules=rules) as endpoint:
        endpoint.workers[0].kill()
        wait_until(lambda: not endpoint.workers[0].alive, 10)
        answer = call(endpoint, "/echo")
        assert (answer.status_code, answer.json()) == (400, {"error": "no workers available"})


def test_a_worker_that_is_never_ready_fails_the_start(notes: Path) -> None:
    env = {"NOTES": str(notes), "PING": "204"}
    with (
        pytest.raises((TimeoutError, WorkerFailed)),
        running(HANDLERS / "web.py", mode="http", env=env, rules=RULES, ready_timeout=2),
    ):
        pass


def test_a_real_worker_drains_at_the_end() -> None:
    env = local_env("sentence-transformers")
    with running("sentence-transformers", mode="http", env=env) as endpoint:
        client = OpenAI(base_url=endpoint.openai_url, api_key="any", max_retries=0)
        answer = client.embeddings.create(model="all-MiniLM-L6-v2", input=["a", "b"])
        assert [len(item.embedding) for item in answer.data] == [384, 384]
        body = {"input": {"texts": ["some words"] * 2000, "encoding_format": "base64"}}
        with ThreadPoolExecutor() as pool:
            last = pool.submit(call, endpoint, "/runsync", "POST", json=body)
            wait_until(lambda: call(endpoint, "/health").json()["in_flight"], 30)
            (worker,) = endpoint.workers
            worker.terminate()
            assert last.result().json()["status"] == "COMPLETED"
        wait_until(lambda: worker.returncode is not None, 30)
        assert worker.returncode == 0
