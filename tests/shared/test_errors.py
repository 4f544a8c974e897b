"""Errors as a client receives them."""

from __future__ import annotations

import json

import pytest

from shared.errors import ENGINE_DIED, JobError, engine_died, invalid, not_finite


def test_the_error_object_has_openais_shape() -> None:
    error = invalid("n", "too many.")
    expected = {
        "type": "invalid_request_error",
        "message": "n: too many.",
        "param": "n",
        "code": "invalid_value",
    }
    assert json.loads(error.json()) == error.body() == expected


def test_an_event_ends_a_stream() -> None:
    event, done = JobError("no", code=3).event().strip().split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == 3
    assert done == "data: [DONE]"


def test_a_long_text_loses_its_middle_and_lone_surrogates_are_replaced() -> None:
    error = JobError("a" * 5000 + "b\ud83d", param="\ud83d😀")
    assert len(error.message) < 2100
    assert error.message.startswith("aaa")
    assert error.message.endswith("b\ufffd")
    assert error.param == "\ufffd😀"


def test_errors_of_the_worker_are_server_errors() -> None:
    died, nan = engine_died(RuntimeError("inner workings")), not_finite("Try another DTYPE.")
    assert (died.type, died.code) == ("server_error", ENGINE_DIED)
    assert "inner workings" not in died.message
    assert (nan.type, nan.code) == ("server_error", "not_finite")
    assert nan.message.endswith("Try another DTYPE.")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (invalid("n", "too many."), 400),
        (JobError("x", code="model_not_found"), 404),
        (JobError("x", code="too_large"), 413),
        (JobError("x", code="overloaded", type="server_error"), 429),
        (JobError("x", code=422), 422),  # an inference server's own
        (JobError("x", code=7), 400),
        (JobError("x", code="anything", type="server_error"), 500),
        (JobError("x", code="gated", type="unavailable"), 503),
        (engine_died(RuntimeError()), 503),
    ],
)
def test_the_status_follows_the_code_and_the_type(error: JobError, status: int) -> None:
    assert error.status == status
