"""What the tests of several rooms share."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from shared.errors import JobError
from shared.requests import validate
from tools.models import local_env
from tools.workers import ROOT, load_handler

_ids = itertools.count()


async def send(handler: Any, **payload: Any) -> Any:
    """The complete answer of `handler` to a job with this input, as the SDK gets it."""
    return await handler({"id": f"job-{next(_ids)}", "input": payload})


async def stream(handler: Any, **payload: Any) -> list[Any]:
    """Every part that the generator form of `handler` gives the SDK for a job with this input."""
    return [part async for part in handler.stream({"id": f"job-{next(_ids)}", "input": payload})]


async def openai(handler: Any, route: str, **body: Any) -> Any:
    """The complete answer to an OpenAI request."""
    return await send(handler, openai_route=route, openai_input=body)


async def error(handler: Any, **payload: Any) -> dict[str, Any]:
    """The error object of a job that fails: `type`, `message`, `param`, `code`."""
    return error_of(await send(handler, **payload))


def error_of(answer: Any) -> dict[str, Any]:
    """The error object in an answer that is an error."""
    assert "error" in answer, answer
    assert isinstance(answer["error"], str), "the SDK loses an error that is not a string"
    problem: dict[str, Any] = json.loads(answer["error"])
    assert set(problem) == {"type", "message", "param", "code"}
    assert "Traceback" not in problem["message"]
    return problem


def sse_events(chunks: list[str]) -> list[Any]:
    """The events of a stream of server-sent events, which must end in [DONE]."""
    *events, done = "".join(chunks).strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def refused(model: type[BaseModel], payload: dict[str, Any]) -> tuple[str | None, str | int | None]:
    """`param` and `code` of the error for a payload that is no `model`; the message must name the field."""
    with pytest.raises(JobError) as caught:
        validate(model, payload)
    assert str(caught.value.param) in caught.value.message
    return caught.value.param, caught.value.code


def runsync(platform: Any, **payload: Any) -> Any:
    """The local platform's answer to a job with this input, at its end."""
    url, headers = f"{platform.endpoint_url}/runsync?wait=300000", {"Authorization": "Bearer local"}
    return httpx.post(url, json={"input": payload}, headers=headers, timeout=310).json()


@contextmanager
def generating(worker: str, **env: str) -> Iterator[ModuleType]:
    """The handler's module as `prepare()` leaves it, with a Generator, for a while; another engine waits."""
    module = load_handler(worker)
    before = getattr(module, "engine", None)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**local_env(worker), "PREWARM": "false", **env}.items():
            patch.setenv(name, value)
        module.prepare()
    try:
        yield module
    finally:
        module.engine.generator.close()
        module.__dict__["engine"] = before


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Block until `condition` is true; fails after `seconds`, which leave room for a busy machine."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.01)


async def until(condition: Callable[[], Any], seconds: float = 120) -> None:
    """`wait_until` for coroutines: the event loop goes on meanwhile."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (the condition is another thread's)
            await asyncio.sleep(0.002)


def run_examples(worker: str, url: str) -> list[dict[str, Any]]:
    """Run the Python examples of a worker's README against a server in HTTP mode: the variables of each.

    Those of clients that are not installed are left out.
    """
    page = (ROOT / "workers" / worker / "README.md").read_text()
    page = page.replace("https://api.runpod.ai/v2/ENDPOINT_ID/openai", url).replace(
        "http://localhost:8000", url
    )
    ran: list[dict[str, Any]] = []
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        if all(map(find_spec, re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE))):
            ran.append({})
            exec(code, ran[-1])
    return ran


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Tensors of tiny models are much slower on two threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def longest_stall() -> Iterator[list[float]]:
    """Inside a running event loop: `[seconds]`, the longest time that the loop was blocked for.

    Time in which a thread of this process waited for a core does not count: other processes had it.
    """
    stalls, last_delay, last = [0.0], _run_delay(), time.perf_counter()

    def measure() -> None:
        nonlocal last, last_delay
        now, delay = time.perf_counter(), _run_delay()
        stalls[0] = max(stalls[0], now - last - 0.01 - max(0.0, delay - last_delay))
        # Read anew, in the other order: a wait between the two readings must not count as a stall.
        last_delay, last = _run_delay(), time.perf_counter()

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.01)
            measure()

    task = asyncio.ensure_future(tick())
    try:
        yield stalls
    finally:
        measure()
        task.cancel()


async def least_stall(work: Callable[[], Awaitable[Any]], limit: float = 0.1) -> float:
    """The longest stall while `work` runs, in seconds, in the best of three runs, or the first below `limit`.

    A busy machine may stall the loop too, but not each time.
    """
    stalls: list[float] = []
    while len(stalls) < 3 and min(stalls, default=limit) >= limit:
        with longest_stall() as stall:
            await work()
        stalls += stall
    return min(stalls)


def _run_delay() -> float:
    """Seconds that this process' threads have been ready to run without a core; 0 where Linux is not."""
    delay = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # the thread has ended
            delay += int(path.read_text().split()[1])
    return delay / 1e9
