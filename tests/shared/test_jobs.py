"""The boundary: whatever comes in or out, the SDK gets plain JSON or one clear error string."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from shared import jobs
from shared.errors import JobError
from shared.jobs import Request, current_job, job_handler, start_config
from shared.logs import job_id
from shared.settings import WorkerSettings


class Part(Request):
    size: int


class Ask(Request):
    text: str
    count: int = Field(1, ge=1, le=9)
    parts: list[str] = Field(default=[])
    part: Part | None = None


class Routed(BaseModel):
    input: str


class Answer(BaseModel):
    value: Any


@job_handler(Ask, routes={"/v1/echo": Routed})
async def echo(request: Ask | Routed) -> Answer:
    return Answer(value=[type(request).__name__, job_id.get(), current_job.get()["id"]])


def returning(value: Any) -> Any:
    @job_handler(Ask)
    async def handler(request: Ask) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    return handler


@pytest.mark.parametrize("stream", [None, False, True])
def test_a_stream_is_refused_where_the_handler_is_no_generator(stream: bool | None) -> None:
    class Streamed(Request):
        stream: bool | None = None

    jobs.refuse_stream(Ask(text="a"))
    if not stream:
        return jobs.refuse_stream(Streamed(stream=stream))
    with pytest.raises(JobError, match="STREAMING=false") as caught:
        jobs.refuse_stream(Streamed(stream=stream))
    assert (caught.value.param, caught.value.code) == ("stream", "unsupported")


JOB = {"id": "job-1", "input": {"text": "a"}}


async def error_of(handler: Any, job: dict[str, Any] = JOB) -> dict[str, Any]:
    result = await handler(job)
    assert isinstance(result["error"], str), "the SDK loses an error that is not a string"
    error: dict[str, Any] = json.loads(result["error"])
    assert set(error) == {"type", "message", "param", "code"}
    assert "Traceback" not in error["message"]
    return error


@pytest.fixture(autouse=True)
def fresh_memory_watch() -> Iterator[None]:
    yield
    jobs._memory.failures = 0
    start_config(echo, WorkerSettings(model_name="m"))


async def test_a_request_reaches_the_work_typed_and_with_its_job() -> None:
    assert await echo(JOB) == {"value": ["Ask", "job-1", "job-1"]}


async def test_an_openai_route_reaches_its_own_model() -> None:
    for route in ("/v1/echo", "/v1/echo/", "/v1/echo?limit=3"):
        job = {"id": "2", "input": {"openai_route": route, "openai_input": {"input": "a"}}}
        assert (await echo(job))["value"][0] == "Routed"


@pytest.mark.parametrize(
    ("payload", "param", "code", "says"),
    [
        (None, "input", "invalid_input", "missing"),
        ([], "input", "invalid_input", "array"),
        ("text", "input", "invalid_input", "string"),
        (3, "input", "invalid_input", "number"),
        (True, "input", "invalid_input", "boolean"),
        ({}, "text", "missing_field", "required"),
        ({"text": None}, "text", "invalid_value", "string"),
        ({"text": 3}, "text", "invalid_value", "string"),
        ({"text": ["a"]}, "text", "invalid_value", "string"),
        ({"text": {"a": 1}}, "text", "invalid_value", "string"),
        ({"text": True}, "text", "invalid_value", "string"),
        ({"text": "a", "count": "2"}, "count", "invalid_value", '"2"'),
        ({"text": "a", "count": True}, "count", "invalid_value", "integer"),
        ({"text": "a", "count": 2.5}, "count", "invalid_value", "integer"),
        ({"text": "a", "count": 10}, "count", "invalid_value", "less than or equal to 9"),
        ({"text": "a", "count": 10**70}, "count", "invalid_value", "less than"),
        ({"openai_route": 10**70}, "openai_route", "unknown_route", "/v1/echo"),
        ({"text": "a", "parts": ["b", 7]}, "parts.1", "invalid_value", "7"),
        ({"text": "a", "part": "b"}, "part", "invalid_value", 'should be an object, got "b"'),
        ({"text": "a", "part": {"size": "b"}}, "part.size", "invalid_value", "integer"),
        ({"txt": "a"}, "txt", "unknown_field", "Did you mean 'text'?"),
        ({"text": "a", "cuont": 2}, "cuont", "unknown_field", "Did you mean 'count'?"),
        ({"openai_route": "/v1/nothing"}, "openai_route", "unknown_route", "/v1/echo"),
        ({"openai_route": ["/v1/echo"]}, "openai_route", "unknown_route", "/v1/echo"),
        ({"openai_input": {"input": "a"}}, "openai_route", "unknown_route", "/v1/echo"),
        ({"openai_route": "/v1/echo", "openai_input": [1]}, "openai_input", "invalid_input", "array"),
        ({"openai_route": "/v1/echo"}, "input", "missing_field", "required"),
    ],
)
async def test_a_wrong_input_gets_one_error_that_names_the_field(
    payload: Any, param: str, code: str, says: str
) -> None:
    error = await error_of(echo, {"id": "1", "input": payload})
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert says in error["message"]
    assert await echo(JOB), "the worker serves the next job"


async def test_an_error_message_does_not_carry_a_large_value() -> None:
    error = await error_of(echo, {"id": "1", "input": {"text": ["x" * 100_000]}})
    assert len(error["message"]) < 200
    error = await error_of(echo, {"id": "1", "input": {"x" * 9_000_000: 1}})
    assert len(error["message"]) + len(error["param"]) < 5_000
    assert error["message"].endswith("Allowed: text, count, parts, part.")


@pytest.mark.parametrize(
    "payload", [{"text": ["a\ud83d"]}, {"openai_route": "\ud83d"}, {"text": {"\ud83d": 1}}]
)
async def test_half_a_surrogate_pair_does_not_keep_an_error_from_being_sent(payload: Any) -> None:
    result = await echo({"id": "1", "input": payload})
    json.dumps(result, ensure_ascii=False).encode()  # as the SDK does
    assert "\ufffd" in json.loads(result["error"])["message"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(json_values)
async def test_no_input_makes_the_handler_raise(payload: Any) -> None:
    result = await echo({"id": "1", "input": payload})
    assert ("error" in result) != ("value" in result)
    json.dumps(result)


async def test_numpy_becomes_plain_numbers() -> None:
    value = {"a": np.float32(0.5), "b": np.arange(3), "c": [np.int64(7)], "d": np.bool_(True)}
    assert await returning(value)(JOB) == {"a": 0.5, "b": [0, 1, 2], "c": [7], "d": True}


@pytest.mark.parametrize(
    ("value", "code", "where"),
    [
        ({"a": [1.0, float("nan")]}, "not_finite", "output.a.1"),
        ({"a": {"b": float("inf")}}, "not_finite", "output.a.b"),
        ({"a": np.array([1.0, np.nan])}, "not_finite", "output.a"),
        ({"a": b"bytes"}, "not_json", "bytes at output.a"),
        ({"a": [object()]}, "not_json", "object at output.a.0"),
        ({"a": {1, 2}}, "not_json", "set at output.a"),
    ],
)
async def test_what_json_has_no_form_for_is_an_error_with_its_place(
    value: Any, code: str, where: str
) -> None:
    error = await error_of(returning(value))
    assert (error["code"], error["type"]) == (code, "server_error")
    assert where in error["message"]


async def test_half_a_surrogate_pair_does_not_keep_a_result_from_being_sent() -> None:
    result = await returning({"text": "a\ud83d", "more": "😀"})(JOB)
    assert result == {"text": "a\ufffd", "more": "😀"}
    json.dumps(result, ensure_ascii=False).encode()


async def test_an_exception_is_answered_without_its_text_and_logged_with_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNPOD_ENDPOINT_ID", "e")
    error = await error_of(returning(ValueError("inner workings")))
    assert error["code"] == "internal_error"
    assert "inner workings" not in error["message"]
    line = json.loads(capsys.readouterr().out.splitlines()[0])
    assert line["requestId"] == "job-1"
    assert "Traceback" in line["message"]
    assert "inner workings" in line["message"]


async def test_a_result_over_the_limit_is_refused_with_size_limit_and_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    start_config(echo, WorkerSettings(model_name="m", max_result_mb=0.001))
    fits = {"a": "é" * 494}  # 988 bytes, and 9 around them
    assert await returning(fits)(JOB) == fits
    error = await error_of(returning({"a": "é" * 500}))
    assert error["code"] == "result_too_large"
    assert "0.001 MB" in error["message"]
    assert "BUCKET_ENDPOINT_URL" in error["message"]


async def test_the_sdks_debug_log_does_not_format_results() -> None:
    result = await returning({"vectors": [0.5] * 1000})(JOB)
    assert repr(result) == "<result of 5013 bytes>"
    assert json.loads(json.dumps(result)) == {"vectors": [0.5] * 1000}


async def test_two_out_of_memory_errors_in_a_row_ask_for_a_fresh_worker() -> None:
    broken, fine = returning(MemoryError()), returning({"a": 1})
    assert "refresh_worker" not in await broken(JOB)
    assert await fine(JOB) == {"a": 1}
    assert "refresh_worker" not in await broken(JOB), "a job that went well lies between"
    result = await broken(JOB)
    assert result["refresh_worker"] is True
    assert json.loads(result["error"])["code"] == "out_of_memory"


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: device-side assert triggered",
        "CUDA failed with error an illegal memory access was encountered",
    ],
)
async def test_after_an_error_of_cuda_the_worker_asks_to_be_replaced_at_once(text: str) -> None:
    result = await returning(RuntimeError(text))(JOB)
    assert result["refresh_worker"] is True
    assert json.loads(result["error"])["code"] == jobs.ENGINE_DIED


async def test_ctranslate2s_want_of_memory_is_one() -> None:
    broken = returning(RuntimeError("CUDA failed with error out of memory"))
    results = [await broken(JOB) for _ in range(2)]
    assert [result.get("refresh_worker") for result in results] == [None, True]
    assert {json.loads(result["error"])["code"] for result in results} == {"out_of_memory"}


def streaming(*parts: Any) -> Any:
    @job_handler(Ask)
    async def handler(request: Ask) -> AsyncIterator[Any]:
        for part in parts:
            if isinstance(part, Exception):
                raise part
            yield part

    return handler


async def collect(handler: Any, job: dict[str, Any] = JOB) -> list[Any]:
    return [part async for part in handler(job)]


async def test_a_stream_passes_its_parts() -> None:
    assert await collect(streaming("a", {"b": np.int64(1)})) == ["a", {"b": 1}]


async def test_a_failing_stream_of_events_ends_with_an_event_and_a_failed_job() -> None:
    event, last = (await collect(streaming("data: 1\n\n", JobError("no", param="x", code="c"))))[1:]
    assert json.loads(event.splitlines()[0].removeprefix("data: "))["error"]["code"] == "c"
    assert event.endswith("data: [DONE]\n\n")
    assert json.loads(last["error"])["param"] == "x"


async def test_a_failing_stream_of_objects_ends_with_an_object_and_a_failed_job() -> None:
    parts = await collect(streaming({"token": "a"}, ValueError("inner")))
    assert parts[1]["event"] == "error"
    assert parts[1]["detail"]["code"] == "internal_error"
    assert json.loads(parts[2]["error"])["code"] == "internal_error"


async def test_a_stream_that_never_began_only_fails() -> None:
    parts = await collect(streaming("a"), {"id": "1", "input": {}})
    assert [list(part) for part in parts] == [["error"]]


async def test_a_stream_asks_for_a_fresh_worker_through_the_sdks_configuration() -> None:
    broken = streaming(MemoryError())
    config = start_config(broken, WorkerSettings(model_name="m"))
    await collect(broken)
    assert "refresh_worker" not in config
    await collect(broken)
    assert config["refresh_worker"] is True


def test_the_concurrency_is_constant() -> None:
    config = start_config(echo, WorkerSettings(model_name="m", max_concurrency=7))
    assert [config["concurrency_modifier"](now) for now in (1, 7, 100)] == [7, 7, 7]
    assert config["return_aggregate_stream"] is True
