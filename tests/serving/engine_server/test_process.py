"""shared.engine_server beside a small real server (engines/engine.py): processes, sockets, signals."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from shared import engine_server, jobs, reaper
from shared.engine_server import EngineClient, EngineFailed, EngineServer, problem
from shared.errors import JobError, StartError
from shared.jobs import Request, job_handler
from shared.startup import classify, classify_log
from shared.streaming import relay
from tools.workers import ROOT

ENGINE = Path(__file__).parent / "engine.py"
SECRET = "hf_" + "s" * 30


def command(*flags: str) -> Callable[[int], list[str]]:
    return lambda port: [sys.executable, "-u", str(ENGINE), str(port), *flags]


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


async def soon(condition: Callable[[], Any], seconds: float = 60) -> None:
    await asyncio.to_thread(until, condition, seconds)


class Watched(EngineServer):
    """A server whose death is noted instead of ending the tests."""

    def __init__(self, *flags: str, **options: Any) -> None:
        self.dead = threading.Event()
        options = {"start_timeout": 60, "grace": 20, **options}
        super().__init__("engine", command(*flags), on_death=self.dead.set, **options)

    def waiting(self) -> int:
        return int(self.get("/metrics")[1].split()[1])


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Watched]:
    server = Watched()
    server.start()
    yield server
    server.stop()
    assert not server.dead.is_set()


@pytest.fixture
def server() -> Iterator[Watched]:
    """One of the test's own."""
    server = Watched("--child")
    server.start()
    yield server
    session = server.pid
    server.stop()
    assert session is not None
    assert reaper.members(session) == []


# ---- requests ------------------------------------------------------------------------------------------


async def test_a_request_gets_its_json(shared_server: Watched) -> None:
    answer = await shared_server.request(
        "POST", "/echo", {"text": "na\u00efve \U0001f33f", "n": 1.5, "none": None}
    )
    assert answer["got"] == {"text": "na\u00efve \U0001f33f", "n": 1.5, "none": None}
    assert answer["pid"] == shared_server.pid


async def test_a_call_has_the_headers_too(shared_server: Watched) -> None:
    answer, headers = await shared_server.call("POST", "/echo", {"n": 1})
    assert answer["got"] == {"n": 1}
    assert headers["content-type"].startswith("application/json")


async def test_connections_are_kept(shared_server: Watched) -> None:
    peers = {(await shared_server.request("POST", "/echo", {}))["peer"] for _ in range(5)}
    assert len(peers) < 5  # not 1: a machine that stands still for seconds lets one go


async def test_more_than_a_hundred_at_once(shared_server: Watched) -> None:
    """aiohttp's own pool stops at 100. Each waits until all are there, so none may be queued."""
    tasks = [
        asyncio.create_task(shared_server.request("POST", "/wait", {"seconds": 600})) for _ in range(130)
    ]
    await soon(lambda: shared_server.waiting() == 130)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await soon(lambda: shared_server.waiting() == 0)


async def test_a_connection_that_was_dropped_unanswered_is_tried_again_once(shared_server: Watched) -> None:
    assert await shared_server.request("POST", "/drop", {}) == {"tries": 2}


def test_each_loop_has_sessions_of_its_own(shared_server: Watched) -> None:
    """prewarm runs in a loop before the SDK's. An open session would warn, which is an error here."""
    for number in range(2):
        answer = asyncio.run(shared_server.request("POST", "/echo", {"n": number}))
        assert answer["got"] == {"n": number}


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (
            400,
            {"error": {"message": "too long", "type": "BadRequestError", "param": "prompt", "code": 400}},
            {"type": "BadRequestError", "message": "too long", "param": "prompt", "code": 400},
        ),
        (
            404,
            {"error": {"message": "no such model", "type": "NotFoundError", "code": "model_not_found"}},
            {"type": "NotFoundError", "message": "no such model", "param": None, "code": "model_not_found"},
        ),
        (
            422,
            {"error": "inputs tokens + max_new_tokens must be <= 512", "error_type": "validation"},
            {
                "type": "invalid_request_error",
                "message": "inputs tokens + max_new_tokens must be <= 512",
                "param": None,
                "code": "validation",
            },
        ),
        (
            405,
            {"detail": "Method Not Allowed"},
            {"type": "invalid_request_error", "message": "Method Not Allowed", "param": None, "code": 405},
        ),
        (
            500,
            "Internal Server Error",
            {"type": "server_error", "message": "Internal Server Error", "param": None, "code": 500},
        ),
    ],
)
async def test_errors_keep_their_form(
    shared_server: Watched, status: int, body: Any, error: dict[str, Any]
) -> None:
    with pytest.raises(JobError) as caught:
        await shared_server.request("POST", "/refuse", {"status": status, "body": body})
    assert caught.value.body() == error
    with pytest.raises(JobError) as caught:
        await anext(shared_server.stream("/refuse", {"status": status, "body": body}))
    assert caught.value.body() == error


def test_an_error_carries_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert SECRET not in problem(400, {"error": {"message": f"bad {SECRET}"}}).message
    assert SECRET not in problem(400, SECRET).message


async def test_an_answer_that_is_not_json(shared_server: Watched) -> None:
    with pytest.raises(JobError) as caught:
        await shared_server.request("GET", "/metrics")
    assert caught.value.code == "bad_answer"


async def test_nobody_listens_elsewhere() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client = EngineClient(f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(JobError) as caught:
            await client.request("POST", "/echo", {})
    assert caught.value.code == "engine_unreachable"
    assert client.get("/health") == (0, "")


async def test_a_host_that_vanishes_is_noticed(shared_server: Watched) -> None:
    for session in await shared_server._sessions():
        url, body = f"{shared_server.url}/stream", {"count": 10**6, "seconds": 0.01}
        async with session.post(url, json=body) as response:
            assert response.connection is not None
            assert response.connection.transport is not None
            made = response.connection.transport.get_extra_info("socket")
            assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            assert [made.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [30, 10, 3]
    await soon(lambda: shared_server.waiting() == 0)


def test_what_speaks_no_http_is_nobody() -> None:
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


async def test_a_stream_is_whole_events(shared_server: Watched) -> None:
    parts = [part async for part in shared_server.stream("/stream", {"count": 3})]
    events = [f'data: {{"n": {number}, "text": "\U0001f33f"}}\n\n' for number in range(3)]
    assert "".join(parts) == "".join([*events, "data: [DONE]\n\n"])
    assert all(part.startswith("data: ") and part.endswith("\n\n") for part in parts)


async def broken(server: Watched, **body: Any) -> tuple[str, JobError]:
    """What a stream gave before its error, and the error."""
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
async def test_an_error_within_a_stream_is_raised_after_what_came_before(
    shared_server: Watched, event: str
) -> None:
    told = '{"message": "it broke", "type": "InternalServerError", "param": null, "code": 500}'
    before, error = await broken(shared_server, count=2, then=[event % told, "data: [DONE]"])
    assert before.count("data: ") == 2
    assert error.message == "it broke"
    assert error.type == "InternalServerError"


async def test_a_stream_that_is_cut_is_an_error(shared_server: Watched) -> None:
    _, error = await broken(shared_server, count=2, then="cut")
    assert error.type == "server_error"


async def test_a_stream_that_stops_before_its_end_is_a_lost_connection(shared_server: Watched) -> None:
    """HTTP calls it whole: the server closed it in good order, but the engine never said that it was done."""
    said = 'data: {"text": "data: [DONE]\\\\nevent: message_stop"}'
    for last in ([], [said], ['data: {"generated_text":null}']):
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
async def test_what_ends_a_stream(shared_server: Watched, last: str) -> None:
    parts = [part async for part in shared_server.stream("/stream", {"count": 1, "then": [last]})]
    assert "".join(parts).endswith(f"{last}\n\n")


@pytest.mark.parametrize("broken", [None, ConnectionResetError()])
async def test_what_comes_right_after_the_first_part_goes_with_it(broken: Exception | None) -> None:
    """The role of a chat's answer comes by itself, and would cost the first token a post of its own."""

    class Body:
        async def iter_any(self) -> AsyncIterator[bytes]:
            yield b"role "
            yield b"later"

        def exception(self) -> Exception | None:
            return broken

        def read_nowait(self) -> bytes:
            assert broken is None
            return b"token "

    parts = [part async for part in engine_server._reads(Body())]  # type: ignore[arg-type]
    assert parts == [b"role " if broken else b"role token ", b"later"]


async def test_a_closed_stream_frees_the_engine(shared_server: Watched) -> None:
    async with aclosing(shared_server.stream("/stream", {"count": 10**6, "seconds": 0.01})) as events:
        await anext(events)
        await soon(lambda: shared_server.waiting() == 1)
    await soon(lambda: shared_server.waiting() == 0)


async def test_a_cancelled_job_frees_the_engine(shared_server: Watched) -> None:
    async def job(body: dict[str, Any]) -> None:
        async for _ in relay(shared_server.stream("/stream", body)):
            await asyncio.sleep(3600)  # the SDK, posting

    for make in (
        lambda: job({"count": 10**6, "seconds": 0.01}),
        lambda: shared_server.request("POST", "/wait", {"seconds": 600}),
    ):
        task: asyncio.Task[Any] = asyncio.create_task(make())
        await soon(lambda: shared_server.waiting() == 1)
        task.cancel()
        await asyncio.wait([task])
        await soon(lambda: shared_server.waiting() == 0)


# ---- start ---------------------------------------------------------------------------------------------


def test_its_output_is_logged_without_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    server = Watched()
    server.start()
    server.stop()
    assert server.last_lines == ["starting with token ***"]
    out = capsys.readouterr().out
    assert "engine: starting with token ***" in out
    assert SECRET not in out


def test_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "outer-token")
    for env, told in (({"HF_TOKEN": "inner-token"}, "***"), ({"HF_TOKEN": None}, "None")):
        server = Watched(env=env)
        monkeypatch.setenv("OTHER_TOKEN", "inner-token")  # so that it is told to be one
        server.start()
        server.stop()
        assert server.last_lines == [f"starting with token {told}"]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("(EngineCore pid=7) ERROR 11-25 00:10:00 [core.py:1] torch.OutOfMemoryError: CUDA out of memory. "
         "Tried to allocate 2.00 GiB.", "out_of_memory"),
        ("ValueError: Free memory on device cuda:0 (3.1/23.6 GiB) on startup is less than desired GPU memory "
         "utilization (0.92, 21.7 GiB).", "out_of_memory"),
        ("OSError: You are trying to access a gated repo.\nAccess to model m/x is restricted: Cannot access "
         "gated repo", "gated"),
        ("OSError: m/x is not a local folder and is not a valid model identifier listed on 'https://h'",
         "model_not_found"),
        ("pydantic_core.ValidationError: Value error, Model architectures ['X'] are not supported for now.",
         "unsupported_architecture"),
        ("OSError: [Errno 28] No space left on device", "no_space"),
        ("RuntimeError: Insufficient space in /dev/shm: 64.0 MiB free", "no_shared_memory"),
        ("vllm: error: argument --dtype: invalid choice: 'int3'", "bad_setting"),
        ('Error: ArgumentValidation("`max_input_tokens`(9) must be < `max_total_tokens`(9)")', "bad_setting"),
        ("error: unexpected argument '--max-model-len' found", "bad_setting"),
        ("error: the argument '--quantize <QUANTIZE>' cannot be used multiple times", "bad_setting"),
        ("ValueError: Please pass the argument `trust_remote_code=True` to allow custom code to be run.",
         "needs_remote_code"),
        ("vllm: error: unrecognized arguments: --no-such-flag", "bad_setting"),
        ("ValueError: Unknown attention backend: 'XFORMERS'. Valid options are: FLASH_ATTN", "bad_setting"),
        ("KeyError: 'invalid tool call parser: nope (chose from { hermes })'", "bad_setting"),
        ("ValueError: Loading lora a failed: No adapter found for /nowhere", "bad_setting"),
        ("  Value error, Total number of attention heads (4) must be divisible by tensor parallel size (3). "
         "[type=value_error, input_value=ArgsKwargs((), {}), input_type=ArgsKwargs]", "bad_setting"),
    ],
)  # fmt: skip
def test_a_permanent_cause_is_told_in_one_line(line: str, code: str) -> None:
    server = Watched("--says", f"loading\n{line}\nsee the trace above")
    with pytest.raises(StartError) as caught:
        server.start()
    assert caught.value.code == code
    assert "\n" not in caught.value.message
    assert not caught.value.message.startswith("(EngineCore")
    assert "input_value" not in caught.value.message
    assert server.pid is not None
    assert reaper.members(server.pid) == []


@pytest.mark.parametrize("trusted", [True, False])
def test_another_cause_may_go_well_next_time(trusted: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM names its settings at every start, whatever ends it afterwards."""
    settings = f"INFO 11-25 Initializing a V1 LLM engine: trust_remote_code={trusted}, dtype=torch.bfloat16"
    server = Watched("--says", f"{settings}\nSegmentation fault")
    with pytest.raises(EngineFailed, match="status 3") as caught:
        server.start()
    assert classify(caught.value) is None
    assert "engine: Segmentation fault" in capsys.readouterr().out
    assert classify_log(["INFO 11-25 all is well"]) is None


def test_a_command_that_is_not_there() -> None:
    server = EngineServer("engine", lambda _: ["/nowhere/engine"], on_death=lambda: None)
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


def test_a_free_port_that_was_asked_for_is_used() -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:
        port = owner.getsockname()[1]
    server = Watched(port=port)
    server.start()
    server.stop()
    assert server.url == f"http://127.0.0.1:{port}"


def test_a_port_that_is_taken_meanwhile_is_tried_again() -> None:
    """The first child finds its port taken: its command gives it another one than was found free."""
    with socket.create_server(("127.0.0.1", 0)) as owner:
        ports = [owner.getsockname()[1]]
        seen = []

        def late(port: int) -> list[str]:
            seen.append(port)
            return command()(ports.pop() if ports else port)

        server = EngineServer("engine", late, start_timeout=60, on_death=lambda: None)
        server.start()
        server.stop()
    assert len(seen) == 2


# ---- death ---------------------------------------------------------------------------------------------


async def test_jobs_in_flight_are_told_of_a_crash(server: Watched) -> None:
    async def stream() -> None:
        async for _ in server.stream("/stream", {"count": 10**6, "seconds": 0.01}):
            pass

    work = [asyncio.create_task(server.request("POST", "/wait", {"seconds": 600})) for _ in range(3)]
    work += [asyncio.create_task(stream())]
    await soon(lambda: server.waiting() == 4)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    for error in await asyncio.gather(*work, return_exceptions=True):
        assert isinstance(error, JobError)
        assert error.code == jobs.ENGINE_DIED
    await soon(server.dead.is_set)
    await soon(lambda: reaper.members(server.pid or 0) == [])  # its own children too
    with pytest.raises(JobError) as caught:
        await server.request("POST", "/echo", {})
    assert caught.value.code == jobs.ENGINE_DIED


async def test_a_crash_of_the_engine_behind_its_server(server: Watched) -> None:
    """vLLM answers 500 when its core has died, and exits with status 0 a second later."""
    with pytest.raises(JobError) as caught:
        await server.request("POST", "/sick", {})
    assert caught.value.code == jobs.ENGINE_DIED
    await soon(server.dead.is_set)


def test_a_crash_between_jobs(server: Watched) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    until(server.dead.is_set)


async def test_a_hung_engine_is_ended() -> None:
    server = Watched("--deaf", "--child", hang_timeout=2)
    server.start()
    try:
        with pytest.raises(JobError) as caught:
            await server.request("POST", "/hang", {})
        assert caught.value.code == jobs.ENGINE_DIED
        assert "health was silent for 2 s" in caught.value.message
        await soon(server.dead.is_set)
        assert server.pid is not None
        assert reaper.members(server.pid) == []
    finally:
        server.stop()


async def test_the_worker_ends_after_its_jobs_are_answered(server: Watched) -> None:
    class Empty(Request):
        pass

    posted = asyncio.Event()

    @job_handler(Empty)
    async def handler(_: Empty) -> Any:
        return await server.request("POST", "/die", {})

    async def sdk() -> Any:
        answer = await handler({"id": "one", "input": {}})
        assert jobs.serving() == 1
        await posted.wait()
        return answer

    job = asyncio.create_task(sdk())
    await soon(lambda: server._death is not None)
    assert not await asyncio.to_thread(server.dead.wait, 0.5)
    posted.set()
    answer = await job
    assert answer["refresh_worker"] is True
    assert '"code": "engine_died"' in answer["error"]
    await soon(server.dead.is_set)


# ---- end -----------------------------------------------------------------------------------------------


def test_stopping_ends_all_that_it_started_and_is_no_crash(server: Watched) -> None:
    assert server.pid is not None
    until(lambda: len(reaper.members(server.pid or 0)) == 3)  # itself, its child and that one's
    server.stop()
    assert reaper.members(server.pid) == []
    assert not server.dead.is_set()


def test_what_ignores_sigterm_is_killed() -> None:
    server = Watched("--deaf", "--child", grace=0.5)
    server.start()
    assert server.pid is not None
    until(lambda: len(reaper.members(server.pid or 0)) == 3)
    server.stop()
    assert reaper.members(server.pid) == []


WORKER = """
import sys, time
from shared.engine_server import EngineServer

engine = [sys.executable, "-u", sys.argv[1]]
server = EngineServer("engine", lambda port: [*engine, str(port), "--child"], grace=20)
server.start()
print("pid", server.pid, flush=True)
if sys.argv[2] == "exit":
    sys.exit(0)
time.sleep(3600)
"""


@pytest.mark.parametrize("end", ["exit", "SIGKILL", "SIGTERM", "engine"])
def test_no_process_outlives_the_worker(end: str) -> None:
    """However the worker ends: by itself, killed outright, by a signal without a handler, with its engine."""
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
    until(lambda: reaper.members(pid) == [])
