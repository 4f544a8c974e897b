"""OpenAI's chat completions, as the types of its own client and its API reference have them."""

from __future__ import annotations

import json
from typing import Any

from openai.types import chat

from serving.openai_chat import (
    ChatChunks,
    ChatCompletionRequest,
    ResponseHead,
    TokenLogprob,
    chat_choice,
    chat_completion,
)
from shared.openai import usage
from shared.requests import validate
from tests.helpers import sse_events

HEAD = ResponseHead("chatcmpl-1", 1700000000, "org/model")
LOGPROBS: list[TokenLogprob] = [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]
MESSAGES = [{"role": "user", "content": "hi"}]


def nulls(value: Any, path: str = "") -> list[str]:
    """The paths of all nulls in a JSON value."""
    if isinstance(value, dict):
        return [null for name, part in value.items() for null in nulls(part, f"{path}.{name}")]
    if isinstance(value, list):
        return [null for part in value for null in nulls(part, f"{path}[]")]
    return [path] if value is None else []


def test_a_completion_is_what_the_client_parses() -> None:
    choices = [chat_choice(0, "hello", "stop"), chat_choice(1, "", "length", LOGPROBS)]
    response = chat_completion(HEAD, choices, usage(3, 4)).model_dump(mode="json")
    parsed = chat.ChatCompletion.model_validate(response, strict=True)
    assert parsed.model_dump(mode="json", exclude_unset=True) == response
    assert nulls(response) == []
    assert response["choices"][0] == {
        "index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop",
    }  # fmt: skip


def test_chunks_are_what_the_client_parses_without_the_fields_they_lack() -> None:
    chunks = ChatChunks(HEAD)
    text = chunks.delta(0, "") + chunks.delta(1, "x", LOGPROBS) + chunks.delta(0, "y") + chunks.delta(0, "")
    text += chunks.finish(0, "stop") + chunks.finish(1, "length") + chunks.end(usage(3, 4))
    events = sse_events([text])
    for event in events:
        parsed = chat.ChatCompletionChunk.model_validate(event, strict=True)
        assert parsed.model_dump(mode="json", exclude_unset=True) == event
        # The API reference has this one null in every chunk but a choice's last.
        assert set(nulls(event)) <= {".choices[].finish_reason"}
    deltas = [(choice["index"], choice["delta"]) for event in events for choice in event["choices"]]
    assert deltas == [
        (0, {"role": "assistant", "content": ""}),
        (1, {"role": "assistant", "content": "x"}),
        (0, {"content": "y"}),
        (0, {}),
        (1, {}),
    ]
    assert [event["choices"][0].get("finish_reason") for event in events[:-1]] == [None] * 3 + [
        "stop",
        "length",
    ]
    assert [("logprobs" in choice) for event in events for choice in event["choices"]] == [0, 1, 0, 0, 0]
    assert [event.get("usage") for event in events] == [None] * 5 + [usage(3, 4).model_dump()]
    assert events[-1]["choices"] == []
    assert all("usage" not in event for event in events[:-1])


def test_a_stream_without_usage_ends_in_done_alone() -> None:
    assert sse_events([ChatChunks(HEAD).end()]) == []


def test_content_may_be_a_string_or_parts() -> None:
    parts = [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": "https://example.com/a.png"}]
    message = {"role": "user", "content": parts}
    request: Any = validate(ChatCompletionRequest, {"messages": [*MESSAGES, message], "stop": "x"})
    assert [part.text for part in request.messages[0].content] == ["hi"]
    assert request.messages[1].content[1].image_url.url == "https://example.com/a.png"
    assert request.stop == ["x"]
    assert json.loads(request.model_dump_json())["messages"][0]["content"][0]["type"] == "text"
