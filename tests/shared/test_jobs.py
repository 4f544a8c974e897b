"""A job through its handler: the complete and the streamed form, errors, and when a worker is replaced."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from shared.errors import ENGINE_DIED, JobError, engine_died
from shared.jobs import Job, JobHandler, Request, job_handler, start_config
from shared.logs import job_id
from shared.openai import ModelsRequest, model_list
from shared.settings import WorkerSettings
from tests.helpers import error, error_of, send, sse_events, stream, until


class Ask(Request):
    text: str = ""
    stream: bool | None = None


class Plain(Request):
    """A model without the field `stream`."""

    number: int


class Settings(WorkerSettings):
    model_name: str = "m"
    streaming: bool = True


def answering(*parts: Any) -> JobHandler:
    """A handler with both forms, which return or yield `parts`; an exception among them is raised."""

    @job_handler(Ask, Plain, routes={"/v1/ask": Ask})
    async def handler(request: Ask | Plain, job: Job) -> Any:
        if isinstance(parts[0], Exception):
            raise parts[0]
        return parts[0]

    @handler.streamed
    async def streamed(request: Ask, job: Job) -> AsyncIterator[Any]:
        for part in parts:
            if isinstance(part, Exception):
                raise part
            yield part

    return handler


@pytest.mark.parametrize("streaming", [False, True])
async def test_one_model_of_those_that_are_listed(streaming: bool) -> None:
    """`client.models.retrieve` asks for /v1/models/{id}; an id may have slashes, which some clients quote."""

    @job_handler(Ask, routes={"/v1/models": ModelsRequest})
    async def handler(request: Ask | ModelsRequest, job: Job) -> Any:
        return model_list("org/base", "adapter")

    async def ask(route: str) -> Any:
        if streaming:
            return (await stream(handler, openai_route=route))[0]
        return await send(handler, openai_route=route)

    for route in ("/v1/models/org/base", "/v1/models/org%2Fbase"):
        assert (await ask(route))["id"] == "org/base"
    assert {model["id"] for model in (await ask("/v1/models"))["data"]} == {"org/base", "adapter"}
    problem = error_of(await ask("/v1/models/other"))
    assert (problem["param"], problem["code"]) == ("model", "model_not_found")
    assert "org/base, adapter" in problem["message"]


async def test_the_work_receives_the_request_and_its_job() -> None:
    @job_handler(Ask)
    async def handler(request: Ask, job: Job) -> Any:
        return [request.text, job.id, job.data["webhook"], job_id.get()]

    assert await handler({"id": "1", "input": {"text": "a"}, "webhook": "w"}) == ["a", "1", "w", "1"]


async def test_jobs_that_run_together_keep_their_ids() -> None:
    both = asyncio.Barrier(2)

    @job_handler(Ask)
    async def handler(request: Ask, job: Job) -> Any:
        await both.wait()
        return job_id.get()

    jobs = [handler({"id": name, "input": {}}) for name in "ab"]
    assert await asyncio.gather(*jobs) == ["a", "b"]


@pytest.mark.parametrize("payload", [None, {"txt": ""}, {"stream": "yes"}])
async def test_a_wrong_request_is_an_error_and_the_next_one_is_answered(payload: Any) -> None:
    handler = answering("a")
    for answers in ([await handler({"id": "1", "input": payload})], await parts_of(handler, payload)):
        assert [list(answer) for answer in answers] == [["error"]]
        assert error_of(answers[0])["type"] == "invalid_request_error"
    assert await send(handler, text="b") == "a"


async def parts_of(handler: JobHandler, payload: Any) -> list[Any]:
    return [part async for part in handler.stream({"id": "1", "input": payload})]


async def test_exceptions(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_ENDPOINT_ID", "e")
    problem = error_of(await answering(ValueError("inner workings"))({"id": "job-1", "input": {}}))
    assert problem["code"] == "internal_error"
    assert "inner workings" not in problem["message"]
    line = json.loads(capsys.readouterr().out.splitlines()[0])
    assert line["requestId"] == "job-1"
    assert "Traceback" in line["message"]
    assert "inner workings" in line["message"]


# ---- the streamed form ---------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [{"text": "a"}, {"stream": False}, {"number": 1}])
async def test_a_request_that_does_not_stream_has_one_part(payload: dict[str, Any]) -> None:
    for answer in ("text", {"a": np.int64(1)}, [1]):
        expected = {"a": 1} if isinstance(answer, dict) else answer
        handler = answering(answer, "more")
        assert await stream(handler, **payload) == [expected]
        assert await send(handler, **payload) == expected


async def test_a_stream_passes_its_parts() -> None:
    assert await stream(answering("a", {"b": np.int64(1)}), stream=True) == ["a", {"b": 1}]


async def test_a_stream_is_refused_by_the_complete_form() -> None:
    problem = await error(answering("a"), stream=True)
    assert (problem["param"], problem["code"]) == ("stream", "unsupported")
    assert "STREAMING=false" in problem["message"]


async def test_a_worker_that_does_not_stream_decides_itself_about_the_field() -> None:
    @job_handler(Ask)
    async def handler(request: Ask, job: Job) -> Any:
        return "complete"

    assert await send(handler, stream=True) == "complete"
    assert await stream(handler, stream=True) == ["complete"]


async def test_a_failing_stream_of_events_ends_with_an_event_and_a_failed_job() -> None:
    parts = await stream(answering('data: {"n": 1}\n\n', JobError("no", param="x", code="c")), stream=True)
    assert [list(event) for event in sse_events(parts[:-1])] == [["n"], ["error"]]
    assert error_of(parts[-1])["param"] == "x"


async def test_a_failing_stream_of_objects_ends_with_an_object_and_a_failed_job() -> None:
    _, event, last = await stream(answering({"token": "a"}, ValueError("inner")), stream=True)
    assert event == {"event": "error", "detail": error_of(last)}
    assert error_of(last)["code"] == "internal_error"


async def test_a_part_that_is_no_json_fails_the_stream() -> None:
    first, _, last = await stream(answering({"n": 1.0}, {"n": float("nan")}, {"n": 2.0}), stream=True)
    assert first == {"n": 1.0}
    assert error_of(last)["code"] == "not_finite"


@pytest.mark.parametrize("ending", ["closed", "cancelled"])
async def test_a_stream_that_nobody_reads_ends_its_work(ending: str) -> None:
    events: list[str] = []

    @job_handler(Ask)
    async def handler(request: Ask, job: Job) -> Any: ...

    @handler.streamed
    async def streamed(request: Ask, job: Job) -> AsyncIterator[str]:
        try:
            yield "a"
            await asyncio.sleep(60)
        finally:
            events.append("freed")

    parts = handler.stream({"id": "1", "input": {"stream": True}})
    assert await anext(parts) == "a"
    if ending == "closed":
        await parts.aclose()
    else:
        task = asyncio.create_task(anext(parts))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert events == ["freed"]


# ---- replaced workers ----------------------------------------------------------------------------------


async def test_the_second_job_in_a_row_that_is_out_of_memory_asks_for_a_new_worker() -> None:
    outcomes: list[Any] = []

    @job_handler(Ask)
    async def handler(request: Ask, job: Job) -> Any:
        if isinstance(outcome := outcomes.pop(0), Exception):
            raise outcome
        return outcome

    ctranslate2 = RuntimeError("CUDA failed with error out of memory")
    wrong = JobError("a wrong request says nothing about memory")
    outcomes += [MemoryError(), {"a": 1}, MemoryError(), wrong, ctranslate2]
    answers = [await send(handler) for _ in range(5)]
    assert answers[1] == {"a": 1}
    assert ["refresh_worker" in answer for answer in answers] == [False, False, False, False, True]
    assert [error_of(answers[n])["code"] for n in (0, 2, 4)] == ["out_of_memory"] * 3


DEAD = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA failed with error an illegal memory access was encountered"),
    engine_died(ValueError()),
]


@pytest.mark.parametrize("cause", DEAD, ids=str)
async def test_a_dead_engine_asks_for_a_new_worker_at_once(cause: Exception) -> None:
    result = await send(answering(cause))
    assert result["refresh_worker"] is True
    assert error_of(result)["code"] == ENGINE_DIED


@pytest.mark.parametrize("payload", [{}, {"stream": True}])
async def test_a_stream_asks_for_a_new_worker_in_the_sdks_configuration(payload: dict[str, Any]) -> None:
    handler = answering(MemoryError())
    config = start_config(handler, Settings())
    await stream(handler, **payload)
    assert "refresh_worker" not in config
    assert [list(part) for part in await stream(handler, **payload)] == [["error"]]
    assert config["refresh_worker"] is True


# ---- the SDK's configuration ---------------------------------------------------------------------------


def test_the_concurrency_is_constant() -> None:
    config = start_config(answering("a"), Settings(max_concurrency=7))
    assert [config["concurrency_modifier"](now) for now in (1, 7, 100)] == [7, 7, 7]
    assert config["return_aggregate_stream"] is True


@pytest.mark.parametrize("settings", [Settings(), Settings(streaming=False), WorkerSettings(model_name="m")])
def test_streaming_chooses_the_form(settings: WorkerSettings) -> None:
    """The SDK looks at the kind of function."""
    streams = getattr(settings, "streaming", False)
    handler = start_config(answering("a"), settings)["handler"]
    assert inspect.isasyncgenfunction(handler) is streams
    assert inspect.iscoroutinefunction(handler) is not streams

    @job_handler(Ask)
    async def complete_only(request: Ask, job: Job) -> Any: ...

    assert inspect.iscoroutinefunction(start_config(complete_only, settings)["handler"])


async def test_a_job_is_in_flight_until_its_task_ends() -> None:
    handler, posted = answering("a"), asyncio.Event()

    async def sdk(form: Any) -> None:
        await form
        await posted.wait()

    tasks = [asyncio.create_task(sdk(send(handler))), asyncio.create_task(sdk(stream(handler)))]
    await until(lambda: handler.in_flight == 2)
    tasks.pop().cancel()
    await until(lambda: handler.in_flight == 1)
    posted.set()
    await asyncio.gather(*tasks)
    await until(lambda: handler.in_flight == 0)
