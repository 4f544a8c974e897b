"""Generated text as responses, without a model."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import Completion

from serving.openai_chat import ResponseHead
from shared.openai import usage
from tests.helpers import sse_events
from tools.workers import load_module

pytestmark = pytest.mark.engine  # TextDelta's module imports torch

responses = load_module("huggingface", "responses")
HEAD = ResponseHead("cmpl-1", 1700000000, "org/model")
TOKENS = {1: "a", 2: "\ufffd", 3: "\u00e9"}


class Tokenizer:
    def decode(self, token_ids: list[int]) -> str:
        return "".join(TOKENS[token_id] for token_id in token_ids)


def delta(text: str, num_tokens: int, finish_reason: Any = None, logprobs: Any = ()) -> Any:
    from serving.continuous_batching.generator import TextDelta

    return TextDelta(text, num_tokens, finish_reason, logprobs)


def test_logprobs_have_the_text_and_bytes_of_their_tokens() -> None:
    from serving.continuous_batching.sampling import Logprob

    entry = Logprob(1, -0.25, ((1, -0.25), (2, float("-inf"))))
    (entry,) = responses.LogprobReader(Tokenizer()).read([entry])
    likely = {"token": "a", "logprob": -0.25, "bytes": [97]}
    unlikely = {"token": "\ufffd", "logprob": -9999.0, "bytes": None}
    assert entry == {**likely, "top_logprobs": [likely, unlikely]}
    assert responses.LogprobReader(Tokenizer()).read([Logprob(3, 0.0)])[0]["bytes"] == [195, 169]


def test_parts_of_several_sequences_have_an_index() -> None:
    writer = responses.NativeWriter("org/model", None, None, 2, None)
    assert writer.parts([(1, delta("x", 1)), (0, delta("a", 1)), (1, delta("y", 2))]) == [
        {"index": 1, "response": "xy"}, {"index": 0, "response": "a"},
    ]  # fmt: skip
    assert writer.parts([(1, delta("", 3, "stop")), (0, delta("", 2, "length"))]) == []
    end = writer.end(usage(4, 5)).model_dump()
    assert [choice["finish_reason"] for choice in end["choices"]] == ["length", "stop"]
    assert (end["response"], end["usage"]["total_tokens"]) == ("", 9)


def test_completions_are_what_the_client_parses() -> None:
    writer = responses.CompletionWriter(HEAD, include_usage=True)
    complete = writer.complete([delta("x", 3, "stop")], usage(1, 3)).model_dump(mode="json")
    Completion.model_validate(complete)
    parts = writer.parts([(0, delta("a", 1)), (1, delta("b", 1)), (0, delta("", 2, "stop"))])
    events = sse_events([*parts, *writer.parts([(1, delta("c", 2, "length"))]), writer.end(usage(1, 4))])
    choices = [choice for event in events for choice in event["choices"]]
    assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in choices] == [
        (0, "a", None), (1, "b", None), (0, "", "stop"), (1, "c", None), (1, "", "length"),
    ]  # fmt: skip
    assert (events[-1]["choices"], events[-1]["usage"]["total_tokens"]) == ([], 5)
    assert all("usage" not in event for event in events[:-1])
