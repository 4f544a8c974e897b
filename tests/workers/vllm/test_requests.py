"""The vllm worker's requests as vLLM takes them; without an engine."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from shared.errors import JobError
from shared.requests import parse, validate
from tools.workers import load_handler, load_module

handler = load_handler("vllm")
schemas = load_module("vllm", "schemas")
TALK = [{"role": "user", "content": "Name three rivers."}]


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler, "engine", handler.Engine(None), raising=False)


def asked(**payload: Any) -> Any:
    """Method, path and body of the engine's request."""
    return handler.engine_request(validate(schemas.GenerateRequest, payload))


def test_the_defaults_of_the_reference() -> None:
    assert asked(prompt="a") == (
        "POST",
        "/v1/completions",
        {
            "prompt": "a", "max_tokens": 512, "temperature": 0.7, "top_p": 0.95, "top_k": -1,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "stream": False,
        },
    )  # fmt: skip


def test_a_default_is_no_longer_than_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    models = '{"data":[{"id":"m","max_model_len":%s},{"id":"adapter","max_model_len":null}]}'
    assert [handler.max_default_tokens(text) for text in (models % 128, models % 4096, "")] == [128, 512, 512]
    monkeypatch.setattr(handler, "engine", handler.Engine(None, 128))
    assert asked(prompt="a")[2]["max_tokens"] == 128


def test_vllms_own_fields_pass_untouched() -> None:
    fields = {
        "tools": [{"type": "function"}], "tool_choice": "auto", "response_format": {"type": "json_object"},
        "logprobs": True, "top_logprobs": 2, "n": 2, "seed": 7, "min_p": 0.1, "model": "an-adapter",
        "structured_outputs": {"regex": "a"}, "chat_template_kwargs": {"enable_thinking": False},
        "max_completion_tokens": 9, "stop": ["x"],
    }  # fmt: skip
    method, path, body = asked(messages=TALK, **fields)
    assert (method, path) == ("POST", "/v1/chat/completions")
    assert body["messages"] == TALK
    assert fields.items() <= body.items()
    assert "max_tokens" not in body


@pytest.mark.parametrize("native", [False, True])
def test_null_is_unset_but_for_what_is_the_clients_own_data(native: bool) -> None:
    schema = {"type": "object", "default": None, "enum": [None, {"a": None}]}
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    body = {
        "messages": [*TALK, {"role": "assistant", "tool_calls": [call]}],
        "stream": True, "stream_options": {},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        "chat_template_kwargs": {"a": None},
    }  # fmt: skip
    dumped: Any = copy.deepcopy(body)
    dumped |= {"seed": None, "stream_options": {"include_usage": None}}
    dumped["messages"][1] |= {"content": None, "refusal": None}
    dumped["messages"][1]["tool_calls"][0]["index"] = None
    dumped["tools"][0]["function"]["strict"] = dumped["response_format"]["json_schema"]["strict"] = None
    model = schemas.GenerateRequest if native else schemas.ROUTES["/v1/chat/completions"]
    sent = handler.engine_request(validate(model, dumped))[2]
    if native:
        body["stream_options"] = {"include_usage": True}
        sent = {name: sent[name] for name in body}
    assert sent == body


def test_a_tools_arguments_keep_their_nulls() -> None:
    content = [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": None}, "cache_control": None}]
    asked = validate(
        schemas.ROUTES["/v1/messages"], {"messages": [{"role": "assistant", "content": content}]}
    )
    (message,) = handler.engine_request(asked)[2]["messages"]
    assert message["content"] == [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": None}}]


def test_a_stream_includes_its_usage() -> None:
    body = asked(prompt="a", stream=True, stream_options={"continuous_usage_stats": True})[2]
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_the_official_workers_form() -> None:
    body = asked(prompt="a", sampling_params={"max_tokens": 5, "temperature": 0.0})[2]
    assert (body["max_tokens"], body["temperature"]) == (5, 0.0)
    assert "sampling_params" not in body
    with pytest.raises(JobError, match="temperature"):
        asked(prompt="a", sampling_params={"temperature": 9.0})


@pytest.mark.parametrize(
    ("payload", "param", "text"),
    [
        ({}, "prompt", "neither"),
        ({"prompt": "a", "messages": TALK}, "prompt", "both"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"messages": []}, "messages", "at least 1"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"prompt": "a", "temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"prompt": "a", "temperature": "1"}, "temperature", "number"),
        ({"prompt": "a", "top_p": 0}, "top_p", "greater than 0"),
        ({"prompt": "a", "top_k": -2}, "top_k", "-1"),
        ({"prompt": "a", "presence_penalty": 3}, "presence_penalty", "2"),
        ({"prompt": "a", "max_new_tokens": 5}, "max_new_tokens", "Did you mean 'max_tokens'?"),
        ({"messages": TALK, "tool": []}, "tool", "Did you mean 'tools'?"),
        ({"prompt": "a", "tools": []}, "tools", "goes with messages only"),
        ({"messages": TALK, "suffix": "a"}, "suffix", "goes with prompt only"),
        ({"prompt": "a", "guided_json": {}}, "guided_json", '"structured_outputs": {"json": ...}'),
        ({"prompt": "a", "apply_chat_template": True}, "apply_chat_template", "send the text as messages"),
        ({"prompt": "a", "max_batch_size": 5}, "max_batch_size", "leave it out"),
    ],
)  # fmt: skip
def test_an_invalid_field_is_refused_by_name(payload: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(JobError) as caught:
        asked(**payload)
    assert str(caught.value.param).split(".")[0] == param
    assert text in caught.value.message


def test_a_job_reaches_listed_routes_by_their_method_only() -> None:
    def parsed(route: Any, body: Any = None) -> Any:
        payload = {"openai_route": route, "openai_input": body}
        return handler.engine_request(parse(payload, [schemas.GenerateRequest], schemas.ROUTES))

    assert parsed("/v1/models") == ("GET", "/v1/models", None)
    assert parsed("/v1/models/", {"a": 1}) == ("GET", "/v1/models", None)
    body = {"messages": TALK, "anything": [1], "stream": False}
    assert parsed("/v1/chat/completions", body) == ("POST", "/v1/chat/completions", body)
    assert parsed("/v1/tokenize?x=1", {"prompt": "a"}) == ("POST", "/tokenize", {"prompt": "a"})
    for route in (
        "@evil.example/x", "/v1/load_lora_adapter", "/v1/chat/completions/../../metrics", "/metrics",
        "/sleep", "//evil.example/v1/models", "/v1/responses/resp_1", "/v1/MODELS", "", None, 3, ["/v1"],
    ):  # fmt: skip
        with pytest.raises(JobError) as caught:
            parsed(route)
        assert caught.value.code == "unknown_route"
    assert {getattr(request, "path", "/v1/models") for request in schemas.ROUTES.values()} == {
        "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/v1/responses",
        "/v1/messages", "/v1/messages/count_tokens", "/v1/rerank", "/v1/score", "/tokenize", "/detokenize",
        "/rerank", "/score",
    }  # fmt: skip


def test_the_official_workers_routes() -> None:
    def parsed(**given: Any) -> Any:
        request: Any = parse(given, [schemas.GenerateRequest, schemas.RouteRequest], schemas.ROUTES)
        assert request.stream == bool((given.get("body") or {}).get("stream"))
        return handler.engine_request(request)

    body = {"prompt": "a", "stream": True, "anything": [1]}
    assert parsed(route="/v1/completions", body=body) == ("POST", "/v1/completions", body)
    assert parsed(route="/v1/completions/", body=body, method="post")[0] == "POST"
    assert parsed(route="/v1/models") == ("GET", "/v1/models", None)
    assert parsed(route="/v1/models", method="GET", body={}) == ("GET", "/v1/models", None)
    for wrong, param in (
        ({"route": "/metrics"}, "route"),
        ({"route": "@evil.example/v1/models"}, "route"),
        ({"route": "/v1/models", "method": "DELETE"}, "method"),
        ({"route": "/v1/completions", "body": "a"}, "body"),
        ({"route": "/v1/completions", "body": {"stream": 1}}, "stream"),
        ({"route": "/v1/completions", "bdy": {}}, "bdy"),
    ):
        with pytest.raises(JobError) as caught:
            parsed(**wrong)
        assert caught.value.param == param


def test_prewarm_uses_a_route_of_the_model() -> None:
    paths = ("/v1/completions", "/v1/embeddings", "/score")
    asked = [handler.prewarm_inputs(f'{{"paths": {{"{path}": {{}}}}}}')[0] for path in paths]
    assert [request.get("openai_route") for request in asked] == [None, "/v1/embeddings", "/score"]
    assert handler.prewarm_inputs("") == []


def test_the_concurrency_follows_the_kv_cache() -> None:
    def metrics(*full_length: float) -> str:
        return "".join(
            f'vllm:cache_config_info{{a="b",kv_cache_max_concurrency="{h}"}} 1.0\n' for h in full_length
        )

    assert handler.concurrency(metrics(3.5), 256) == 14
    assert handler.concurrency(metrics(0.9), 256) == 8
    assert handler.concurrency(metrics(500), 256) == 256
    assert handler.concurrency(metrics(500), 4) == 4
    assert handler.concurrency(metrics(10, 10), 256) == 80
    assert handler.concurrency("", 256) == 64
