"""Answers on the wire: unmodified clients, streams, errors in mid-stream, hang-ups, slow readers."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import Any

import httpx
import openai
import pytest

from shared import http_response, telemetry
from shared.http_app import make_app
from shared.telemetry import Record
from tests.helpers import sse_events, until, wait_until
from tests.shared.http.servers import Server
from tests.shared.http.test_app import CHAT, client, ready
from tests.shared.http.toy import make_handler

pytestmark = pytest.mark.engine


@pytest.fixture
def ai(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def chat(ai: openai.OpenAI, **extra: Any) -> Any:
    messages: Any = CHAT["messages"]
    return ai.chat.completions.create(model="toy", messages=messages, extra_body=extra)


# ---- the openai client ------------------------------------------------------------------------------------


def test_the_openai_client_reads_answers_and_streams(ai: openai.OpenAI) -> None:
    assert chat(ai).choices[0].message.content == "a b c"
    messages: Any = CHAT["messages"]
    parts = ai.chat.completions.create(model="toy", messages=messages, stream=True)
    assert [part.choices[0].delta.content for part in parts] == ["a", "b", "c"]
    assert [model.id for model in ai.models.list()] == ["toy", "org/toy"]
    assert ai.models.retrieve("org/toy").id == "org/toy"


def test_a_stream_that_fails_after_its_first_part_raises_in_the_openai_client(ai: openai.OpenAI) -> None:
    messages: Any = CHAT["messages"]
    parts = ai.chat.completions.create(
        model="toy", messages=messages, stream=True, extra_body={"fail": "invalid", "fail_after": 2}
    )
    received = []
    with pytest.raises(openai.APIError, match="not to the toy's liking"):
        received.extend(part.choices[0].delta.content for part in parts)
    assert received == ["a", "b"]


# ---- streams ----------------------------------------------------------------------------------------------


def test_each_part_is_one_event_that_is_sent_at_once(server: Server) -> None:
    payload = {"stream": True, "text": "hi", "seconds": 0.2, "parts": 4}
    times, events, begin = [], [], time.monotonic()
    with httpx.stream("POST", f"{server.url}/runsync", json={"input": payload}) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["cache-control"] == "no-cache"
        for text in answer.iter_text():
            times.append(time.monotonic() - begin)
            events.append(text)
    assert [json.loads(event.removeprefix("data: "))["number"] for event in events] == [0, 1, 2, 3]
    assert times[0] < 0.15
    assert times[-1] > 0.55


@pytest.mark.parametrize("native", [True, False])
def test_a_stream_that_fails_at_once_has_an_error_status(server: Server, native: bool) -> None:
    fault = {"stream": True, "fail": "invalid", "fail_after": 0}
    path, body = ("/runsync", {"input": fault}) if native else ("/v1/chat/completions", CHAT | fault)
    answer = httpx.post(server.url + path, json=body)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"


def test_a_stream_that_fails_later_ends_in_an_event(server: Server) -> None:
    fault = {"stream": True, "fail": "crash", "fail_after": 1}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT | fault)
    first, last = sse_events([answer.text])
    assert first["choices"][0]["delta"]["content"] == "a"
    assert last["error"]["code"] == "internal_error"
    answer = httpx.post(f"{server.url}/runsync", json={"input": fault})
    events = [json.loads(event.removeprefix("data: ")) for event in answer.text.strip().split("\n\n")]
    assert events[0]["number"] == 0
    assert events[1]["error"]["code"] == "internal_error"


def test_audio_that_fails_later_is_cut_off(server: Server) -> None:
    body = {"input": "hi", "fail": "crash", "fail_after": 1}
    with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
        httpx.post(f"{server.url}/v1/audio/speech", json=body)


def test_a_stream_of_no_part_is_an_empty_stream(server: Server) -> None:
    answer = httpx.post(f"{server.url}/runsync", json={"input": {"stream": True, "parts": 0}})
    assert (answer.status_code, answer.text) == (200, "")


def test_a_result_over_the_limit_is_refused(server: Server) -> None:
    assert len(server.work(size=29_000_000).content) > 29_000_000
    answer = server.work(size=30_000_001)
    assert answer.status_code == 413
    assert "BUCKET" not in answer.text


# ---- hang-ups and slow readers ----------------------------------------------------------------------------


def busy(server: Server) -> int:
    state = server.health()
    return int(state["in_flight"] + state["waiting"])


@pytest.mark.parametrize(
    "payload",
    [
        {"seconds": 60},
        {"seconds": 60, "stream": True},
        {"seconds": 0.001, "stream": True, "parts": 10**9},
    ],
    ids=["complete", "before the second part", "between parts"],
)
def test_a_disconnect_frees_its_slot_within_a_second(server: Server, payload: dict[str, Any]) -> None:
    connection = server.send("/runsync", json.dumps({"input": payload}).encode())
    wait_until(lambda: server.health()["in_flight"] == 1, 10)
    begin = time.monotonic()
    connection.close()
    wait_until(lambda: busy(server) == 0, 10)
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b"])
def test_a_client_that_hangs_up_in_mid_upload_is_forgotten_within_a_second(server: Server, kind: str) -> None:
    connection = server.connect()
    head = f"POST /v1/audio/transcriptions HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\n"
    connection.sendall(f"{head}content-length: 1000000\r\n\r\n--b".encode())
    wait_until(lambda: server.health()["waiting"] == 1, 10)
    begin = time.monotonic()
    connection.close()
    wait_until(lambda: busy(server) == 0, 10)
    assert time.monotonic() - begin < 1


def test_a_slow_reader_holds_a_bounded_amount_of_memory(server: Server) -> None:
    payload = {"stream": True, "size": 100_000, "parts": 10**6}  # 100 GB in all
    before = server.rss()
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"input": payload}).encode()
        head = f"POST /runsync HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        connection.sendall(head + body)
        connection.recv(100)
        time.sleep(1.5)
        assert server.health()["in_flight"] == 1
        assert server.work(text="hi").status_code == 200  # others are served meanwhile
        assert server.rss() - before < 20e6
    wait_until(lambda: busy(server) == 0, 10)


async def test_a_reader_that_takes_nothing_counts_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, with the app called as a server calls it."""
    monkeypatch.setattr(http_response, "STALL_S", 0.05)
    admission, records = ready(), list[Record]()
    telemetry.add_sink("http", records.append)
    body = json.dumps({"input": {"stream": True, "parts": 10}}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    scope = {
        "type": "http", "method": "POST", "path": "/runsync", "raw_path": b"/runsync", "root_path": "",
        "query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http",
    }  # fmt: skip
    async with asyncio.timeout(5):
        await make_app(make_handler(), admission, worker="toy")(scope, receive, send)
    assert admission.idle.is_set()
    assert [record.status for record in records] == [499]


async def test_an_answer_that_is_complete_is_not_counted_as_hung_up() -> None:
    records = list[Record]()
    telemetry.add_sink("http", records.append)
    http = client()
    for stream in (True, False):
        await http.post("/runsync", json={"input": {"stream": stream}})
    await until(lambda: len(records) == 2)
    assert [record.status for record in records] == [200, 200]
    assert "first_token" in records[0].values
    assert {"queue", "model", "total"} <= records[1].values.keys()
