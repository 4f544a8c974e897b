"""Every field of OpenAI's and vLLM's requests is served, refused by name, or known to change no answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chat

from serving.generation_fields import NO_EFFECT, UNSERVED, refuse_lone_surrogates, refuse_unserved
from serving.openai_chat import ChatCompletionRequest
from shared.errors import JobError
from shared.requests import validate
from tools.workers import ROOT, load_module

VLLM = json.loads((ROOT / "workers/vllm/engine.json").read_text())["fields"]
CHAT = {*VLLM["chat"], *chat.CompletionCreateParamsBase.__annotations__}
COMPLETIONS = {*VLLM["completion"], *completions.CompletionCreateParamsBase.__annotations__}
HUGGINGFACE = load_module("huggingface", "schemas").ROUTES
LLAVA = load_module("llava", "schemas").ROUTES
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("model", "fields", "handled_elsewhere"),
    [
        (HUGGINGFACE["/v1/chat/completions"], CHAT, set()),
        (HUGGINGFACE["/v1/completions"], COMPLETIONS, {"logprobs"}),
        (LLAVA["/v1/chat/completions"], CHAT, set(load_module("llava", "schemas").UNSERVED_HERE)),
    ],
    ids=["huggingface chat", "huggingface completions", "llava chat"],
)
def test_every_known_field_has_a_place(model: Any, fields: set[str], handled_elsewhere: set[str]) -> None:
    assert fields - set(model.model_fields) - set(UNSERVED) - NO_EFFECT - handled_elsewhere == set()
    assert not set(UNSERVED) & NO_EFFECT


@pytest.mark.parametrize("field", UNSERVED)
def test_a_field_that_is_not_served_is_refused_by_name(field: str) -> None:

    def refuse(value: Any) -> None:
        refuse_unserved(validate(ChatCompletionRequest, {"messages": MESSAGES, field: value}), **UNSERVED)

    for value in (UNSERVED[field], None, False):
        refuse(value)
    for value in ({"type": "json_object"}, 7, "x", [5]):
        with pytest.raises(JobError) as caught:
            refuse(value)
        assert (caught.value.param, caught.value.code) == (field, "unsupported")


def test_zero_has_an_effect_where_the_number_of_entries_is_asked_for() -> None:
    request = validate(ChatCompletionRequest, {"messages": MESSAGES, "prompt_logprobs": 0})
    with pytest.raises(JobError) as caught:
        refuse_unserved(request, **UNSERVED)
    assert caught.value.param == "prompt_logprobs"


@pytest.mark.parametrize("bias", [{"a": 1.0}, {"-1": 1.0}, {"5": 101.0}])
def test_a_logit_bias_that_is_none_is_refused(bias: dict[str, float]) -> None:
    with pytest.raises(JobError) as caught:
        validate(ChatCompletionRequest, {"messages": MESSAGES, "logit_bias": bias})
    assert str(caught.value.param).startswith("logit_bias")


def test_a_lone_surrogate_is_refused_by_the_field_that_has_it() -> None:
    refuse_lone_surrogates([{"role": "user", "content": "caf\u00e9 \U0001f33f"}], "messages")
    with pytest.raises(JobError) as caught:
        refuse_lone_surrogates([*MESSAGES, {"role": "user", "content": "ab\ud83d"}], "messages")
    assert (caught.value.param, caught.value.code) == ("messages.1.content", "invalid_unicode")
    assert "character 2 is a lone surrogate" in caught.value.message
