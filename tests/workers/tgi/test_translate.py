"""Requests as TGI takes them, and its errors as this worker's; without a server."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from shared.errors import JobError
from shared.requests import validate
from tests.helpers import refused
from tools.stand_ins import tgi as stand_in

answers = importlib.import_module("workers.tgi.answers")
engine = importlib.import_module("workers.tgi.engine")
schemas = importlib.import_module("workers.tgi.schemas")
translate = importlib.import_module("workers.tgi.translate")
TALK: Any = [{"role": "user", "content": "Name three rivers."}]


def parameters(**payload: Any) -> dict[str, Any]:
    """TGI's parameters for a job."""
    request = validate(schemas.GenerateRequest, {"prompt": "a", **payload})
    body: dict[str, Any] = translate.parameters(request, payload.get("max_tokens", answers.DEFAULT_TOKENS))
    return body


def chat_body(adapter: str | None = None, **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = translate.openai_body(
        validate(schemas.ChatRequest, {"messages": TALK, **fields}), adapter
    )
    return body


def test_the_defaults_of_the_reference() -> None:
    assert parameters() == {
        "max_new_tokens": 512, "temperature": 0.7, "top_p": 0.95, "do_sample": True, "details": True,
        "stop": [], "decoder_input_details": False, "watermark": False,
    }  # fmt: skip


@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"temperature": 0}, {"do_sample": False}], ids=str)
def test_greedy_decoding_has_no_sampling_field(fields: dict[str, Any]) -> None:
    """TGI refuses temperature 0, and samples as soon as one of them is given."""
    body = parameters(top_p=0.5, top_k=5, typical_p=0.5, **fields)
    assert body["do_sample"] is False
    assert not set(stand_in.SAMPLING) & body.keys()


def test_every_parameter_of_tgi_can_be_given() -> None:
    given: dict[str, Any] = {
        "temperature": 1.5, "top_p": 0.5, "top_k": 7, "typical_p": 0.6, "repetition_penalty": 1.2,
        "frequency_penalty": 0.3, "seed": 3, "stop": ["x"], "best_of": 2, "truncate": 9, "watermark": True,
        "decoder_input_details": True, "top_n_tokens": 2, "adapter_id": "b",
        "grammar": {"type": "regex", "value": "a+"},
    }  # fmt: skip
    body = parameters(**given)
    assert body | given == body
    # The worker handles return_full_text itself.
    assert body.keys() | {"return_full_text"} == stand_in.PARAMETERS.keys()
    assert not {"top_p", "top_k"} & parameters(top_p=1, top_k=0).keys()


@pytest.mark.parametrize(
    ("payload", "param", "code"),
    [
        ({}, "prompt", "invalid_value"),
        ({"prompt": "a", "messages": TALK}, "prompt", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"prompt": "a", "max_new_tokens": 5}, "max_new_tokens", "unknown_field"),
        ({"prompt": "a", "stop": [""]}, "stop.0", "invalid_value"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of", "invalid_value"),
        (
            {"prompt": "a", "decoder_input_details": True, "stream": True},
            "decoder_input_details", "invalid_value",
        ),
    ],
)  # fmt: skip
def test_an_invalid_field_is_refused_by_name(payload: dict[str, Any], param: str, code: str) -> None:
    assert refused(schemas.GenerateRequest, payload) == (param, code)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("temperature", -1), ("top_p", 0), ("top_k", -1), ("frequency_penalty", 3),
        ("seed", -1),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    assert refused(schemas.GenerateRequest, {"prompt": "a", field: value}) == (field, "invalid_value")


def test_openai_requests_as_tgi_takes_them() -> None:
    neutral: Any = {"n": 1, "presence_penalty": 0, "logit_bias": {}, "top_p": 1, "tools": []}
    assert chat_body(**neutral, stream_options=None) == {"messages": TALK, "stop": []}
    assert chat_body(stop="x")["stop"] == ["x"]
    assert chat_body(max_completion_tokens=5, max_tokens=9)["max_tokens"] == 5
    assert chat_body(repetition_penalty=1.5)["presence_penalty"] == -0.5
    assert chat_body("adapter", model="ADAPTER")["model"] == "adapter"
    assert "model" not in chat_body(model="x")
    schema = {"properties": {"a": {"type": "string"}}}
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert chat_body(response_format=response_format)["response_format"] == {"type": "json", "value": schema}
    assert "response_format" not in chat_body(response_format={"type": "text"})
    message = {"role": "assistant", "content": None, "name": None, "tool_calls": [{"id": "0"}]}
    assert chat_body(messages=[message])["messages"] == [{"role": "assistant", "tool_calls": [{"id": "0"}]}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2), ("presence_penalty", 0.5), ("logit_bias", {"5": 1}), ("functions", [{}]),
        ("chat_template_kwargs", {"a": 1}), ("response_format", {"type": "json_object"}), ("top_k", 5),
        ("min_p", 0.1), ("typical_p", 0.5),
    ],
)  # fmt: skip
def test_what_tgi_would_ignore_is_refused(field: str, value: Any) -> None:
    with pytest.raises(JobError) as caught:
        chat_body(**{field: value})
    assert (caught.value.param, caught.value.code) == (field, "unsupported")


TOO_LONG = (
    "`inputs` tokens + `max_new_tokens` must be <= 20. Given: {} `inputs` tokens and {} `max_new_tokens`"
)


@pytest.mark.parametrize(
    ("text", "param", "code"),
    [
        ("`max_new_tokens` must be strictly positive", "max_tokens", "invalid_value"),
        ("`inputs` cannot be empty", "prompt", "invalid_value"),
        (TOO_LONG.format(10, 11), "max_tokens", "too_long"),
        (TOO_LONG.format(30, 1), "prompt", "too_long"),
        ("`top_p` must be > 0.0 and < 1.0", "top_p", "invalid_value"),
        ("grammar is not valid: Grammar must have a 'properties' field", "grammar", "invalid_value"),
        ("tokenizer error x", "prompt", "invalid_value"),
    ],
)
def test_validation_errors_name_the_field(text: str, param: str, code: str) -> None:
    request = validate(schemas.GenerateRequest, {"prompt": "a"})
    error = translate.explain(
        JobError(f"Input validation error: {text}", code="validation"), request.tgi_names
    )
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert error.message.startswith(f"{param}: ")
    assert not [name for name in ("`", "inputs", "max_new_tokens") if name in error.message]


@pytest.mark.parametrize(
    ("text", "status", "param", "code"),
    [
        ("Incomplete generation stream", "incomplete_generation_stream", None, "incomplete"),
        ("Template error: syntax error: roles must alternate", 422, "messages", "bad_prompt"),
        ("Tool error: Grammar and tools are mutually exclusive", "tool_error", "tools", "invalid_value"),
        (
            "Failed to deserialize the JSON body into the target type: tools[0].function: missing field "
            "`arguments` at line 1 column 99",
            422, "tools[0].function", "invalid_value",
        ),
        ("Failed to buffer the request body: length limit exceeded", 413, "messages", "too_large"),
        ("something new", "new", None, "new"),
    ],
)  # fmt: skip
def test_other_errors_say_what_to_do(text: str, status: Any, param: str | None, code: str) -> None:
    error = translate.explain(JobError(text, code=status), {"inputs": "messages"})
    assert (error.param, error.code) == (param, code)
    assert error.message.endswith((".", "new"))


async def test_events_are_read_whatever_their_text_contains() -> None:
    """Comments, blanks after `data:` or none, and characters that Python takes for line ends."""

    class Client:
        async def stream(self, path: str, body: Any, *, in_posts: bool) -> AsyncIterator[str]:
            yield ":\n\n"
            yield 'data:{"text": "a\u2028b\x85c"}\n\n'
            yield 'data: {"text": "d"}\n\n:\n\ndata: {"text": "e"}\n\n'
            yield "data: [DONE]\n\n"

    tgi = engine.Engine(Client(), "name", None, {}, 100, None)
    texts = [[event["text"] for event in events] async for events in tgi.events("/", {}, {})]
    assert texts == [["a\u2028b\x85c"], ["d", "e"]]
