"""serving.engine_server.client beside a small real server (engine.py)."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import aclosing
from typing import Any

import pytest

from serving.engine_server.client import EngineClient, parse_error_body, read_first
from serving.streaming import relay
from shared.errors import JobError
from tests.helpers import least_stall, until
from tests.serving.engine_server.watched import SECRET, Watched

# ---- requests ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"text": "na\u00efve \U0001f33f", "n": 1.5, "none": None, "large": 2**70, "tiny": 5e-324},
        {"text": "\ud800", "n": float("inf")},
    ],
    ids=["utf-8", "lone surrogate"],
)
async def test_a_request_returns_its_json_and_headers(shared_server: Watched, body: dict[str, Any]) -> None:
    answer, headers = await shared_server.call("POST", "/echo", body)
    assert answer["got"] == body
    assert answer["pid"] == shared_server.pid
    assert headers["content-type"].startswith("application/json")


async def test_connections_are_kept(shared_server: Watched) -> None:
    peers = {(await shared_server.request("POST", "/echo", {}))["peer"] for _ in range(5)}
    assert len(peers) < 5  # not 1: a machine that stands still for seconds lets one go


async def test_more_than_a_hundred_at_once(shared_server: Watched) -> None:
    """aiohttp's own pool stops at 100. Each waits until all are there, so none may be queued."""
    request = shared_server.request
    tasks = [asyncio.create_task(request("POST", "/wait", {"seconds": 600})) for _ in range(130)]
    await until(lambda: shared_server.waiting() == 130)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await until(shared_server.is_idle)


async def test_a_connection_that_was_dropped_unanswered_is_tried_again_once(shared_server: Watched) -> None:
    assert await shared_server.request("POST", "/drop", {}) == {"tries": 2}


def test_each_loop_has_a_session_of_its_own(shared_server: Watched) -> None:
    """prewarm runs in a loop before the SDK's. An open session would warn, which is an error here."""
    for number in range(2):
        answer = asyncio.run(shared_server.request("POST", "/echo", {"n": number}))
        assert answer["got"] == {"n": number}


async def test_a_large_request_and_answer_do_not_stall_the_loop(shared_server: Watched) -> None:
    vectors = [[number / 7 for number in range(1000)]] * 300

    async def echo() -> None:
        assert (await shared_server.request("POST", "/echo", {"data": vectors}))["got"]["data"] == vectors

    assert await least_stall(echo) < 0.1


# ---- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "error"),  # error: type, message, param, code
    [
        (400, {"error": {"message": "long", "type": "BadRequestError", "param": "body.prompt", "code": 400}},
         ("BadRequestError", "long", "prompt", 400)),
        (404, {"error": {"message": "no such model", "type": "NotFoundError", "code": "model_not_found"}},
         ("NotFoundError", "no such model", None, "model_not_found")),
        (422, {"error": "inputs must be <= 512", "error_type": "validation"},
         ("invalid_request_error", "inputs must be <= 512", None, "validation")),
        (405, {"detail": "Method Not Allowed"}, ("invalid_request_error", "Method Not Allowed", None, 405)),
        (500, "Internal Server Error", ("server_error", "Internal Server Error", None, 500)),
    ],
)  # fmt: skip
async def test_error_answers(shared_server: Watched, status: int, body: Any, error: tuple[Any, ...]) -> None:
    asked = {"status": status, "body": body}
    for answer in (
        shared_server.request("POST", "/refuse", asked),
        anext(shared_server.stream("/refuse", asked)),
    ):
        with pytest.raises(JobError) as caught:
            await answer
        assert tuple(caught.value.body().values()) == error


def test_an_error_carries_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert SECRET not in parse_error_body(400, {"error": {"message": f"bad {SECRET}"}}).message
    assert SECRET not in parse_error_body(400, SECRET).message


async def test_an_answer_that_is_not_json(shared_server: Watched) -> None:
    with pytest.raises(JobError) as caught:
        await shared_server.request("GET", "/metrics")
    assert caught.value.code == "bad_answer"
    assert (await shared_server.metrics()).startswith(b"waiting ")


async def test_a_server_that_does_not_listen() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client = EngineClient(f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(JobError) as caught:
            await client.request("POST", "/echo", {})
    assert caught.value.code == "engine_unreachable"
    assert client.get("/health") == (0, "")


def test_a_server_that_does_not_speak_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def greet() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"220 mail at your service\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        client = EngineClient(f"http://127.0.0.1:{listening.getsockname()[1]}")
        assert client.get("/health") == (0, "")
        thread.join()


# ---- streams -------------------------------------------------------------------------------------------


async def test_a_stream_consists_of_complete_events(shared_server: Watched) -> None:
    parts = [part async for part in shared_server.stream("/stream", {"count": 3})]
    events = [f'data: {{"n": {number}, "text": "\U0001f33f"}}\n\n' for number in range(3)]
    assert "".join(parts) == "".join([*events, "data: [DONE]\n\n"])
    assert all(part.startswith("data: ") and part.endswith("\n\n") for part in parts)


async def broken(server: Watched, **body: Any) -> tuple[str, JobError]:
    """What a stream yielded before its error, and the error."""
    before = ""
    try:
        async for part in server.stream("/stream", body):
            before += part
    except JobError as error:
        return before, error
    pytest.fail(f"no error after {before}")


@pytest.mark.parametrize(
    "event",
    ['data: {"error": %s}', 'data:{"error":%s}', 'event: error\ndata: {"type":"error","error":%s}'],
    ids=["vllm", "tgi", "anthropic"],
)
async def test_an_error_event_in_a_stream(shared_server: Watched, event: str) -> None:
    problem = '{"message": "it broke", "type": "InternalServerError", "param": null, "code": 500}'
    before, error = await broken(shared_server, count=2, then=[event % problem, "data: [DONE]"])
    assert before.count("data: ") == 2
    assert (error.message, error.type) == ("it broke", "InternalServerError")


async def test_a_stream_that_stops_before_its_end_is_a_lost_connection(shared_server: Watched) -> None:
    """The connection was cut, or closed in order although the engine had sent no last event."""
    assert (await broken(shared_server, count=2, then="cut"))[1].type == "server_error"
    text = 'data: {"text": "data: [DONE]\\\\nevent: message_stop"}'
    for last in ([], [text], ['data: {"generated_text":null}']):
        before, error = await broken(shared_server, count=2, then=last)
        assert before.count("data: {") == 2 + len(last)
        assert (error.code, error.type) == ("engine_unreachable", "server_error")


@pytest.mark.parametrize(
    "last",
    [
        "data: [DONE]", "data:[DONE]", "event: message_stop\ndata: {}", "event: response.completed\ndata: {}",
        "event: response.incomplete\ndata: {}", "event: response.failed\ndata: {}",
        'data:{"index":3,"token":{},"generated_text":"","details":null}',
    ],
)  # fmt: skip
async def test_the_last_events_of_a_stream(shared_server: Watched, last: str) -> None:
    parts = [part async for part in shared_server.stream("/stream", {"count": 1, "then": [last]})]
    assert "".join(parts).endswith(f"{last}\n\n")


@pytest.mark.parametrize("broken", [None, ConnectionResetError()])
async def test_what_arrives_right_after_the_first_read_joins_it(broken: Exception | None) -> None:
    """A body that has its second part at once, or a connection that has broken by then."""

    class Body:
        async def readany(self) -> bytes:
            return b"role "

        def exception(self) -> Exception | None:
            return broken

        def read_nowait(self) -> bytes:
            assert broken is None
            return b"token "

    assert await read_first(Body()) == (b"role " if broken else b"role token ")  # type: ignore[arg-type]


async def test_a_closed_stream_frees_the_engine(shared_server: Watched) -> None:
    async with aclosing(shared_server.stream("/stream", {"count": 10**6, "seconds": 0.01})) as events:
        await anext(events)
        await until(lambda: shared_server.waiting() == 1)
    await until(shared_server.is_idle)


async def test_a_cancelled_job_frees_the_engine(shared_server: Watched) -> None:
    async def job(body: dict[str, Any]) -> None:
        async for _ in relay(shared_server.stream("/stream", body)):
            await asyncio.sleep(3600)  # the SDK, posting

    for make in (
        lambda: job({"count": 10**6, "seconds": 0.01}),
        lambda: shared_server.request("POST", "/wait", {"seconds": 600}),
    ):
        task: asyncio.Task[Any] = asyncio.create_task(make())
        await until(lambda: shared_server.waiting() == 1)
        task.cancel()
        await asyncio.wait([task])
        await until(shared_server.is_idle)
