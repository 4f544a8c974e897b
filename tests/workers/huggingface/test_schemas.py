"""Requests and settings, without a model."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import JobError, StartError
from shared.requests import validate
from shared.settings import read_settings
from tests.workers.huggingface.in_process import MESSAGES
from tools.workers import load_module

schemas = load_module("huggingface", "schemas")
adapters = load_module("huggingface", "adapters")
checks = load_module("huggingface", "checks")


@pytest.mark.parametrize(
    ("payload", "param", "code"),
    [
        ({}, "prompt", "invalid_value"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": "a", "tools": [{}]}, "tools", "invalid_value"),
        ({"prompt": "a", "chat_template_kwargs": {"b": 1}}, "chat_template_kwargs", "invalid_value"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"prompt": "a", "temperature": 2.1}, "temperature", "invalid_value"),
        ({"prompt": "a", "top_p": 0}, "top_p", "invalid_value"),
        ({"prompt": "a", "top_k": -1}, "top_k", "invalid_value"),
        ({"prompt": "a", "min_p": 2}, "min_p", "invalid_value"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"prompt": "a", "repetition_penalty": 1e-45}, "repetition_penalty", "invalid_value"),
        ({"prompt": "a", "n": 0}, "n", "invalid_value"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "invalid_value"),
        ({"prompt": "a", "lora": 1}, "lora", "invalid_value"),
        ({"prompt": "a", "stop": list("abcde")}, "stop", "invalid_value"),
        ({"prompt": "a", "max_new_tokens": 5}, "max_new_tokens", "unknown_field"),
        ({"prompt": "a", "num_beams": 2}, "num_beams", "unknown_field"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "cook", "content": "hi"}]}, "messages.0.role", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
            "invalid_value",
        ),
    ],
)
def test_invalid_fields_are_refused_by_name(payload: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(JobError) as caught:
        validate(schemas.GenerateRequest, payload)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert param in caught.value.message


@pytest.mark.parametrize("prompt", [5, [True], ["a", [1]], [None], {}, []])
def test_prompts_of_other_types_are_refused_by_name(prompt: Any) -> None:
    with pytest.raises(JobError) as caught:
        validate(schemas.CompletionRequest, {"prompt": prompt})
    assert (caught.value.param, caught.value.code) == ("prompt", "invalid_value")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_beams", 2),
        ("logprobs", 0),
        ("logprobs", 3),
        ("best_of", 2),
        ("echo", True),
        ("guided_json", {"type": "object"}),
    ],
)
def test_openai_fields_without_a_meaning_here_are_refused_by_name(field: str, value: Any) -> None:
    request: Any = validate(schemas.CompletionRequest, {"prompt": "a", field: value})
    with pytest.raises(JobError) as caught:
        checks.refuse_unsupported(request)
    assert (caught.value.param, caught.value.code) == (field, "unsupported")
    assert field != "logprobs" or "vllm" in caught.value.message


def test_openai_fields_that_change_nothing_are_ignored() -> None:
    body = {"prompt": "a", "num_beams": 1, "logprobs": None, "best_of": 1, "echo": False, "user": "me"}
    request: Any = validate(schemas.CompletionRequest, body)
    checks.refuse_unsupported(request)
    request = validate(schemas.ChatRequest, {"messages": MESSAGES, "logprobs": True, "num_beams": 1})
    checks.refuse_unsupported(request)


def test_chat_templates_get_strings_and_parsed_arguments() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    request: Any = validate(schemas.ChatRequest, {"messages": messages})
    assert [message.for_template() for message in request.messages] == [
        {"role": "user", "content": "one two"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**call, "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]


def test_sources_of_adapters() -> None:
    assert adapters.adapter_sources(None) == {}
    sources = adapters.adapter_sources("a=org/one, b.c = org/two@v1 ,d=/models/x@y,")
    assert sources == {"a": ("org/one", None), "b.c": ("org/two", "v1"), "d": ("/models/x@y", None)}


@pytest.mark.parametrize(
    ("lora", "cause"),
    [("org/one", "name=repository"), ("=org/one", "name=repository"), ("a=", "name=repository"),
     ("a=org/one,A=org/two", "same name"), ("a=x,b", "name=repository")],
)  # fmt: skip
def test_an_invalid_lora_stops_the_start(lora: str, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA", lora)
    with pytest.raises(StartError) as caught:
        read_settings(schemas.Settings)
    assert caught.value.code == "bad_setting"
    assert caught.value.message.startswith(f"LORA={lora!r}")
    assert cause in caught.value.message


def pick(**payload: Any) -> Any:
    kind = schemas.CompletionRequest if "model" in payload else schemas.GenerateRequest
    request = validate(kind, {"prompt": "a", **payload})
    return checks.pick_adapter(request, ("org/base",), ("rivers", "seas"))


def test_requests_name_the_model_or_an_adapter() -> None:
    assert [pick(), pick(lora="Rivers")] == [None, "rivers"]
    assert [pick(model=None), pick(model="org/base"), pick(model="SEAS")] == [None, None, "seas"]


@pytest.mark.parametrize(("field", "code"), [("lora", "lora_not_found"), ("model", "model_not_found")])
def test_unknown_adapters_are_refused(field: str, code: str) -> None:
    with pytest.raises(JobError) as caught:
        pick(**{field: "lakes"})
    assert (caught.value.param, caught.value.code) == (field, code)
    assert "'lakes'" in caught.value.message
