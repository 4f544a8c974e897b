"""A job's input becomes a typed request, or one error that names the field."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, BeforeValidator, Field

from shared.errors import JobError
from shared.requests import MediaSource, Request, as_list, parse, validate


class Part(Request):
    size: int


class Ask(Request):
    text: str
    count: int = Field(1, ge=1, le=9)
    parts: list[str] = Field(default=[])
    part: Part | None = None


class Listed(Request):
    texts: Annotated[list[str], BeforeValidator(as_list)]


class Routed(BaseModel):
    input: str


def read(payload: Any) -> BaseModel:
    return parse(payload, [Ask, Listed], {"/v1/echo": Routed})


def refused(payload: Any) -> JobError:
    with pytest.raises(JobError) as caught:
        read(payload)
    return caught.value


@pytest.mark.parametrize("route", ["/v1/echo", "/v1/echo/", "/v1/echo?limit=3"])
def test_a_route_chooses_its_own_model(route: str) -> None:
    assert read({"openai_route": route, "openai_input": {"input": "a"}}) == Routed(input="a")


def test_the_model_with_most_of_the_fields_is_chosen() -> None:
    assert read({"text": "a", "count": 2}) == Ask(text="a", count=2)
    assert read({"texts": ["a"]}) == Listed(texts=["a"])


@pytest.mark.parametrize(("value", "texts"), [("a", ["a"]), (["a", "b"], ["a", "b"]), (None, [])])
def test_one_text_is_a_list_of_one(value: Any, texts: list[str]) -> None:
    assert read({"texts": value}) == Listed(texts=texts)


@pytest.mark.parametrize(
    ("payload", "param", "code", "text"),
    [
        (None, "input", "invalid_input", "missing"),
        ([], "input", "invalid_input", "array"),
        ("text", "input", "invalid_input", "string"),
        (3, "input", "invalid_input", "number"),
        (True, "input", "invalid_input", "boolean"),
        ({}, "text", "missing_field", "required"),
        ({"text": None}, "text", "invalid_value", "string, got null"),
        ({"text": 3}, "text", "invalid_value", "string"),
        ({"text": ["a"]}, "text", "invalid_value", "string"),
        ({"text": {"a": 1}}, "text", "invalid_value", "string"),
        ({"text": True}, "text", "invalid_value", "string"),
        ({"text": "a", "count": "2"}, "count", "invalid_value", '"2"'),
        ({"text": "a", "count": True}, "count", "invalid_value", "integer"),
        ({"text": "a", "count": 2.5}, "count", "invalid_value", "integer"),
        ({"text": "a", "count": 10}, "count", "invalid_value", "less than or equal to 9"),
        ({"text": "a", "count": 10**70}, "count", "invalid_value", "less than"),
        ({"text": "a", "parts": ["b", 7]}, "parts.1", "invalid_value", "7"),
        ({"text": "a", "part": "b"}, "part", "invalid_value", 'should be an object, got "b"'),
        ({"text": "a", "part": {"size": "b"}}, "part.size", "invalid_value", "integer"),
        ({"txt": "a"}, "txt", "unknown_field", "Did you mean 'text'?"),
        ({"text": "a", "cuont": 2}, "cuont", "unknown_field", "Did you mean 'count'?"),
        ({"openai_route": "/v1/nothing"}, "openai_route", "unknown_route", "/v1/echo"),
        ({"openai_route": ["/v1/echo"]}, "openai_route", "unknown_route", "/v1/echo"),
        ({"openai_route": 10**70}, "openai_route", "unknown_route", "/v1/echo"),
        ({"openai_input": {"input": "a"}}, "openai_route", "unknown_route", "/v1/echo"),
        ({"openai_route": "/v1/echo", "openai_input": [1]}, "openai_input", "invalid_input", "array"),
        ({"openai_route": "/v1/echo"}, "input", "missing_field", "required"),
    ],
)
def test_an_error_names_the_field(payload: Any, param: str, code: str, text: str) -> None:
    error = refused(payload)
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert text in error.message


def test_a_worker_without_routes_says_so() -> None:
    with pytest.raises(JobError, match="no OpenAI routes"):
        parse({"openai_route": "/v1/echo"}, [Ask], {})


def test_an_error_does_not_carry_a_large_value() -> None:
    assert len(refused({"text": ["x" * 100_000]}).message) < 200
    error = refused({"x" * 9_000_000: 1})
    assert len(error.message) + len(error.param or "") < 5_000
    assert error.message.endswith("Allowed: text, count, parts, part.")


@pytest.mark.parametrize(
    "payload", [{"text": ["a\ud83d"]}, {"openai_route": "\ud83d"}, {"text": {"\ud83d": 1}}]
)
def test_an_error_about_a_lone_surrogate_can_be_sent(payload: Any) -> None:
    assert "\ufffd" in json.loads(refused(payload).json().encode())["message"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    json_values
    | st.dictionaries(st.sampled_from(["text", "texts", "openai_route", "openai_input"]), json_values)
)
def test_any_input_is_a_request_or_a_job_error(payload: Any) -> None:
    try:
        assert isinstance(read(payload), BaseModel)
    except JobError as error:
        json.loads(error.json().encode())


class Upload(Request):
    file: MediaSource
    count: int = 1
    more: list[MediaSource] | MediaSource | None = None


@pytest.mark.parametrize("source", ["aGk=", "https://a.example/b.wav", b"\xff\x00"])
def test_media_is_text_or_the_bytes_of_a_form(source: str | bytes) -> None:
    request: Any = validate(Upload, {"file": source, "more": [source]})
    assert (request.file, request.more) == (source, [source])
    assert validate(Upload, {"file": source, "more": source}) == Upload(file=source, more=source)


@pytest.mark.parametrize("strict", [None, False])
def test_what_is_no_media_is_refused_by_the_name_of_its_field(strict: bool | None) -> None:
    with pytest.raises(JobError) as refused:
        validate(Upload, {"file": 3}, strict=strict)
    assert refused.value.param == "file"
    assert refused.value.message == "file: Input should be a valid string, got 3."


def test_the_values_of_a_form_are_text() -> None:
    assert validate(Upload, {"file": b"1", "count": "2"}, strict=False) == Upload(file=b"1", count=2)
    with pytest.raises(JobError, match=r"count: .*, got a file of 9999 bytes\."):
        validate(Upload, {"file": b"1", "count": b"x" * 9999}, strict=False)
