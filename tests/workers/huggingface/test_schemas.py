"""Requests, settings and responses, without a model."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import JobError, StartError
from shared.requests import validate
from shared.settings import read_settings
from tests.helpers import refused
from tests.workers.huggingface.in_process import MESSAGES
from tools.workers import load_module

schemas = load_module("huggingface", "schemas")
adapters = load_module("huggingface", "adapters")
checks = load_module("huggingface", "checks")
responses = load_module("huggingface", "responses")


@pytest.mark.parametrize(
    ("payload", "param", "code"),
    [
        ({}, "prompt", "invalid_value"),
        ({"prompt": "a", "messages": MESSAGES}, "prompt", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": "a", "tools": [{}]}, "tools", "invalid_value"),
        ({"prompt": "a", "chat_template_kwargs": {"b": 1}}, "chat_template_kwargs", "invalid_value"),
        ({"prompt": "a", "max_new_tokens": 5}, "max_new_tokens", "unknown_field"),
        ({"prompt": "a", "num_beams": 2}, "num_beams", "unknown_field"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "cook", "content": "hi"}]}, "messages.0.role", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content", "invalid_value",
        ),
    ],
)  # fmt: skip
def test_invalid_fields_are_refused_by_name(payload: dict[str, Any], param: str, code: str) -> None:
    assert refused(schemas.GenerateRequest, payload) == (param, code)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0), ("temperature", 2.1), ("top_p", 0), ("top_k", -1), ("min_p", 2), ("n", 0),
        ("repetition_penalty", 0), ("repetition_penalty", 1e-45), ("logprobs", 21), ("lora", 1),
        ("stop", list("abcde")),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    assert refused(schemas.GenerateRequest, {"prompt": "a", field: value}) == (field, "invalid_value")


@pytest.mark.parametrize("prompt", [5, [True], ["a", [1]], [None], {}, []])
def test_prompts_of_other_types_are_refused_by_name(prompt: Any) -> None:
    assert refused(schemas.CompletionRequest, {"prompt": prompt}) == ("prompt", "invalid_value")


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_beams", 2), ("logprobs", 0), ("logprobs", 3), ("best_of", 2), ("guided_json", {"type": "object"})],
)
def test_openai_fields_without_a_meaning_here_are_refused_by_name(field: str, value: Any) -> None:
    request: Any = validate(schemas.CompletionRequest, {"prompt": "a", field: value})
    with pytest.raises(JobError) as caught:
        checks.refuse_unsupported(request)
    assert (caught.value.param, caught.value.code) == (field, "unsupported")
    assert field != "logprobs" or "vllm" in caught.value.message


def test_openai_fields_that_change_nothing_are_ignored() -> None:
    body = {"prompt": "a", "num_beams": 1, "logprobs": None, "best_of": 1, "echo": False, "user": "me"}
    checks.refuse_unsupported(validate(schemas.CompletionRequest, body))


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


TOKENS = {1: "a", 2: "\ufffd", 3: "\u00e9"}


class Tokenizer:
    def decode(self, token_ids: list[int]) -> str:
        return "".join(TOKENS[token_id] for token_id in token_ids)


@pytest.mark.engine  # Logprob's module imports torch
def test_logprobs_have_the_text_and_bytes_of_their_tokens() -> None:
    from serving.continuous_batching.sampling import Logprob

    entry = Logprob(1, -0.25, ((1, -0.25), (2, float("-inf"))))
    (entry,) = responses.LogprobReader(Tokenizer()).read([entry])
    likely = {"token": "a", "logprob": -0.25, "bytes": [97]}
    unlikely = {"token": "\ufffd", "logprob": -9999.0, "bytes": None}
    assert entry == {**likely, "top_logprobs": [likely, unlikely]}
    assert responses.LogprobReader(Tokenizer()).read([Logprob(3, 0.0)])[0]["bytes"] == [195, 169]
