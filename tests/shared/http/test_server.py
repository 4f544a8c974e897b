"""The life of a worker in HTTP mode: start, load beyond its limits, drain, death."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.helpers import wait_until
from tests.shared.http.servers import Server, free_port, running

pytestmark = pytest.mark.engine


# ---- start ------------------------------------------------------------------------------------------------


def test_it_listens_while_the_model_loads() -> None:
    with running(until_ping=204, LOAD_SECONDS="3") as server:
        refused = server.work(text="hi")
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert json.loads(refused.json()["error"])["code"] == "not_ready"
        assert "swagger" in httpx.get(f"{server.url}/docs").text
        assert httpx.get(f"{server.url}/openapi.json").json()["paths"]
        wait_until(lambda: server.ping() == 200, 30)
        assert server.work(text="hi").json()["output"] == {"text": "hi", "modules": [], "usage": {}}


def test_neither_the_sdk_nor_a_model_library_is_imported(server: Server) -> None:
    private = {"file": f"{server.url}/ping"}
    assert "non-public" in httpx.post(f"{server.url}/v1/audio/transcriptions", json=private).text
    assert server.work(text="hi").json()["output"]["modules"] == []
    assert any("SERVE_MODE" not in line and f"PORT={server.port}" in line for line in server.log)


def test_a_start_that_cannot_succeed_is_answered_to_every_request() -> None:
    with running(LOAD_FAILS="always") as server:
        wait_until(lambda: server.health()["state"] == "failed", 30)
        for _ in range(2):
            answer = server.work(text="hi")
            assert answer.status_code == 503
            error = json.loads(answer.json()["error"])
            assert (error["code"], error["message"]) == ("broken_toy", "The toy is broken. Buy another.")
            assert "retry-after" not in answer.headers, "another attempt meets the same cause"
        answer = httpx.get(f"{server.url}/v1/models")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "broken_toy")
        assert server.health()["cause"] == "The toy is broken. Buy another."
        assert server.ping() == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


@pytest.mark.parametrize("env", [{"MAX_WAITING": "many"}, {"MAX_CONCURRENCY": "0"}])
def test_a_wrong_setting_is_answered_too(env: dict[str, str]) -> None:
    with running(**env) as server:
        wait_until(lambda: server.health()["state"] == "failed", 30)
        assert next(iter(env)) in server.work(text="hi").json()["error"]


def test_a_failure_that_may_pass_exits_so_that_the_worker_is_replaced() -> None:
    with running(until_ping=None, LOAD_FAILS="once") as server:
        assert server.end() == 1
        assert any("the hub does not answer" in line for line in server.log)


def test_a_port_that_is_taken_exits() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with running(until_ping=None, port=taken.getsockname()[1]) as server:
            assert server.end() == 3  # uvicorn's status
            assert any("address already in use" in line for line in server.log)


def test_the_health_check_may_have_its_own_port_and_path() -> None:
    port = free_port()
    with running(until_ping=None, PORT_HEALTH=str(port), HEALTH_CHECK_PATH="/live") as server:

        def live() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/live").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(live, 30)
        assert httpx.get(f"{server.url}/live").status_code == 200
        assert server.work(text="hi").status_code == 200
        assert any(f"expose {server.port}/http, {port}/http" in line for line in server.log)
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


def test_the_key_and_the_origins_come_from_the_environment() -> None:
    with running(API_KEY="s3cret-key", CORS_ORIGINS="https://a.example, https://b.example") as server:
        assert server.work(text="hi").status_code == 401
        headers = {"authorization": "Bearer s3cret-key", "origin": "https://b.example"}
        answer = httpx.post(f"{server.url}/runsync", json={"input": {}}, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://b.example"
        assert not any("s3cret-key" in line for line in server.log)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


# ---- load -------------------------------------------------------------------------------------------------


async def post_all(server: Server, count: int, **payload: object) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=60) as http:
        body = {"input": payload}
        return await asyncio.gather(*(http.post(f"{server.url}/runsync", json=body) for _ in range(count)))


def test_beyond_those_that_run_and_wait_requests_are_refused_at_once(server: Server) -> None:
    answers = asyncio.run(post_all(server, 200, seconds=3))
    assert Counter(answer.status_code for answer in answers) == {200: 16, 429: 184}
    refused = [answer for answer in answers if answer.status_code == 429]
    assert all(answer.headers["retry-after"] == "2" for answer in refused)
    assert max(answer.elapsed.total_seconds() for answer in refused) < 3  # all were sent before one ended
    waits = sorted(answer.json()["delayTime"] for answer in answers if answer.status_code == 200)
    assert waits[7] < 1000 < 2500 < waits[8]  # ms: 8 run at once, 8 follow
    assert server.health()["waiting"] == 0


def test_thousands_of_requests_on_kept_connections_leave_nothing_behind(server: Server) -> None:
    body = {"input": {"text": "x" * 1000}}

    def ask(count: int) -> None:
        with httpx.Client(timeout=30) as http:
            for number in range(count):
                stream = {"stream": number % 2 == 0}
                answer = http.post(f"{server.url}/runsync", json={"input": body["input"] | stream})
                assert answer.status_code == 200

    ask(300)
    descriptors, memory = server.descriptors(), server.rss()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ask, [800, 800]))
    wait_until(lambda: server.descriptors() <= descriptors, 10)
    assert server.rss() - memory < 3e6


def read_answers(connection: socket.socket, count: int) -> bytes:
    data = b""
    while data.count(b"HTTP/1.1 ") < count or not data.endswith(b"}"):
        received = connection.recv(65536)
        if not received:
            break
        data += received
    return data


def test_pipelined_requests_are_answered_in_their_order(server: Server) -> None:
    with server.connect() as connection:
        for text in ("one", "two", "three"):
            body = json.dumps({"input": {"text": text, "seconds": 0.1 if text == "one" else 0}}).encode()
            head = f"POST /runsync HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
        answers = read_answers(connection, 3)
    assert re.findall(rb'"text":"(\w+)"', answers) == [b"one", b"two", b"three"]


# ---- the end ----------------------------------------------------------------------------------------------


def test_sigterm_under_load_loses_nothing() -> None:
    with running() as server:
        stopped = time.monotonic() + 1
        answered: list[tuple[float, int]] = []  # when it was asked, status
        ended = threading.Event()

        def ask(_: int) -> None:
            """Transport errors are refusals; no request from before the signal may meet one."""
            body = {"input": {"seconds": 0.3, "size": 9}}
            with httpx.Client(timeout=30) as http:
                while not ended.is_set():
                    begin = time.monotonic()
                    try:
                        answer = http.post(f"{server.url}/runsync", json=body)
                        assert answer.status_code != 200 or answer.json()["output"]["text"] == "x" * 9
                        answered.append((begin, answer.status_code))
                    except httpx.TransportError:
                        answered.append((begin, 0))

        head = b"POST /runsync HTTP/1.1\r\nhost: x\r\ncontent-length: 29\r\n\r\n"
        upload = server.connect()
        upload.sendall(head + b'{"input": {"te')
        stream = server.send("/runsync", b'{"input": {"stream": true, "seconds": 0.7}}')
        with ThreadPoolExecutor(12) as pool:
            asks = pool.map(ask, range(12))
            time.sleep(1)
            stopped = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.ping() == 503, 5)
            refused = server.work(text="late")
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            assert refused.headers["connection"] == "close"
            time.sleep(0.5)
            assert server.process.poll() is None  # the upload is not complete
            upload.sendall(b'xt": "upload"}}')
            assert b'"upload"' in read_answers(upload, 1)
            assert server.end() == 0
            ended.set()
            list(asks)
        before = Counter(status for begin, status in answered if begin < stopped)
        assert before[200] >= 24
        # 429: on a busy machine a client asks again before its last slot is free. 503: after the signal.
        assert set(before) <= {200, 429, 503}
        assert {status for begin, status in answered if begin > stopped + 0.2} <= {0, 503}
        parts = b""
        while received := stream.recv(65536):
            parts += received
        assert parts.count(b"data: ") == 3
        assert parts.endswith(b"0\r\n\r\n")


def test_a_second_sigterm_ends_at_once() -> None:
    with running(MAX_CONCURRENCY="1", MAX_WAITING="0") as server:
        connection = server.send("/runsync", b'{"input": {"seconds": 60}}')
        wait_until(lambda: server.health()["in_flight"] == 1, 10)
        assert server.work().status_code == 429
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.ping() == 503, 10)
        server.process.send_signal(signal.SIGTERM)
        assert server.end(5) == 128 + signal.SIGTERM
        connection.close()


@pytest.mark.parametrize("until_ping", [None, 204], ids=["before it listens", "while the model loads"])
def test_sigterm_ends_a_start_at_once(until_ping: int | None) -> None:
    with running(until_ping=until_ping, LOAD_SECONDS="60") as server:
        wait_until(lambda: server.log, 30)
        server.process.send_signal(signal.SIGTERM)
        assert server.end(10) == 128 + signal.SIGTERM


def test_a_dead_engine_answers_what_runs_and_exits() -> None:
    with running() as server:
        with ThreadPoolExecutor(1) as pool:
            runs = pool.submit(server.work, seconds=2, text="hi")
            wait_until(lambda: server.health()["in_flight"] == 1, 10)
            answer = server.work(fail="dead")
            assert answer.status_code == 503
            assert json.loads(answer.json()["error"])["code"] == "engine_died"
            assert server.ping() == 503
            assert server.work(text="hi").status_code == 503
            assert runs.result().json()["output"]["text"] == "hi"
        assert server.end() == 1
