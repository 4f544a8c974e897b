"""Requests as token ids and sampling parameters."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from serving.continuous_batching.sampling import SamplingParams
from shared.requests import validate
from tests.helpers import error, least_stall, openai, send
from tests.workers.huggingface.in_process import MESSAGES, serving, tokenizer_of
from tools.models import tiny_causal
from tools.workers import load_module

pytestmark = pytest.mark.engine
schemas = load_module("huggingface", "schemas")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


async def params(worker: ModuleType, kind: type[Any], **payload: Any) -> Any:
    prompts = await worker.engine.prompts.read(validate(kind, payload))
    return prompts.sequences[0][1]


async def test_the_defaults_of_the_reference(worker: ModuleType) -> None:
    native = await params(worker, schemas.GenerateRequest, prompt="a")
    assert (native.temperature, native.top_p, native.top_k, native.max_tokens) == (0.7, 0.95, 50, 512)
    openai_default = await params(worker, schemas.ChatRequest, messages=MESSAGES)
    assert openai_default == SamplingParams(512, temperature=1.0)


async def test_all_routes_give_the_same_parameters(worker: ModuleType) -> None:
    fields = {
        "temperature": 0.0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 3,
        "stop": ["a", "b"], "max_tokens": 9, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "logit_bias": {"5": 1.5}, "stop_token_ids": [7], "ignore_eos": True, "min_tokens": 2,
        "skip_special_tokens": False,
    }  # fmt: skip
    native = await params(worker, schemas.GenerateRequest, messages=MESSAGES, **fields)
    assert native == SamplingParams(
        **{**fields, "stop": ("a", "b"), "stop_token_ids": (7,), "logit_bias": ((5, 1.5),)}  # type: ignore[arg-type]
    )
    assert await params(worker, schemas.CompletionRequest, prompt="a", **fields) == native
    assert await params(worker, schemas.ChatRequest, messages=MESSAGES, **fields) == native
    with_logprobs = await params(worker, schemas.GenerateRequest, messages=MESSAGES, logprobs=2, **fields)
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **fields}
    assert await params(worker, schemas.ChatRequest, **body) == with_logprobs
    assert with_logprobs.logprobs == 2


async def test_templates_get_tools_and_variables(worker: ModuleType) -> None:
    async def prompt_tokens(**fields: Any) -> int:
        answer = await send(worker.handler, messages=MESSAGES, max_tokens=1, **fields)
        return int(answer["usage"]["prompt_tokens"])

    plain = await prompt_tokens()
    assert await prompt_tokens(chat_template_kwargs={"shout": True}) > plain
    assert await prompt_tokens(tools=[TOOL]) > plain + 10
    for name in ("tokenize", "messages"):
        problem = await error(worker.handler, messages=MESSAGES, chat_template_kwargs={name: []})
        assert (problem["param"], problem["code"]) == ("chat_template_kwargs", "invalid_value")

    async def chat(**fields: Any) -> Any:
        body = {"messages": MESSAGES, "max_tokens": 1, "tools": [TOOL], **fields}
        return await openai(worker.handler, "/v1/chat/completions", **body)

    assert (await chat(tool_choice="auto"))["usage"]["prompt_tokens"] > plain + 10
    assert (await chat(tool_choice="none"))["usage"]["prompt_tokens"] == plain
    for forced in ("required", {"type": "function", "function": {"name": "add"}}):
        assert '"tool_choice"' in (await chat(tool_choice=forced))["error"]


async def prompt_of(worker: ModuleType, **payload: Any) -> str:
    """The text of the prompt that a conversation becomes."""
    prompts = await worker.engine.prompts.read(validate(schemas.GenerateRequest, payload))
    return str(tokenizer_of(worker).decode(prompts.sequences[0][0]["input_ids"][0]))


async def test_how_the_prompt_ends(worker: ModuleType) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "The sea and"}]
    user = "<|im_start|>user\nName three rivers.<|im_end|>\n"
    assert await prompt_of(worker, messages=MESSAGES) == f"{user}<|im_start|>assistant\n"
    parts = [{"type": "text", "text": text} for text in ("Name three ", "rivers.")]
    talk = [{"role": "user", "content": parts}]
    assert await prompt_of(worker, messages=talk, add_generation_prompt=False) == user
    assert await prompt_of(worker, messages=MESSAGES, add_generation_prompt=False) == user
    continued = await prompt_of(worker, messages=messages, continue_final_message=True)
    assert continued == f"{user}<|im_start|>assistant\nThe sea and"
    body = {"messages": messages, "continue_final_message": True, "temperature": 0, "max_tokens": 8}
    native = await send(worker.handler, prompt=continued, max_tokens=8, temperature=0)
    chat = await openai(worker.handler, "/v1/chat/completions", **body)
    assert chat["choices"][0]["message"]["content"] == native["response"]
    problem = await error(
        worker.handler, messages=messages, continue_final_message=True, add_generation_prompt=True
    )
    assert problem["param"] == "continue_final_message"


async def test_arguments_of_tool_calls_are_what_the_template_takes(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects, and JSON for a template that joins them with other text, as DeepSeek's does."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": "caf\u00e9"}'}}
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert 'add{"a": "caf\u00e9"}' in await prompt_of(worker, messages=messages)
    joining = tiny_causal.CHAT_TEMPLATE.replace(
        "call['function']['name'] }}{{ call['function']['arguments'] | tojson",
        "call['function']['name'] + ' ' + call['function']['arguments']",
    )
    monkeypatch.setattr(tokenizer_of(worker), "chat_template", joining)
    assert 'add {"a": "caf\u00e9"}' in await prompt_of(worker, messages=messages)
    call["function"] = {"name": "add", "arguments": {"a": 1}}
    assert 'add {"a": 1}' in await prompt_of(worker, messages=messages)


async def test_a_tokenizer_without_a_template(tmp_path: Path) -> None:
    with serving(MODEL_NAME=str(tiny_causal.make(tmp_path, chat=False))) as bare:
        problem = await error(bare.handler, messages=MESSAGES)
        assert (problem["param"], problem["code"]) == ("messages", "no_chat_template")
        assert "prompt" in problem["message"]
        assert (await send(bare.handler, prompt="The river", max_tokens=3))["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("payload", "param", "code", "numbers"),
    [
        ({"prompt": "a b " * 3000}, "prompt", "too_long", ["2048"]),
        ({"prompt": "a", "max_tokens": 2048}, "max_tokens", "too_long", ["2049", "2048", "2047"]),
        (
            {"openai_route": "/v1/chat/completions",
             "openai_input": {"messages": MESSAGES, "max_completion_tokens": 2048}},
            "max_completion_tokens", "too_long", ["2048"],
        ),
        (
            {"openai_route": "/v1/completions", "openai_input": {"prompt": [5, 600], "max_tokens": 3}},
            "prompt", "invalid_value", ["599"],
        ),
        (
            {"openai_route": "/v1/completions", "openai_input": {"prompt": ["a", ""]}}, "prompt", "empty", [],
        ),
        ({"prompt": "a", "min_tokens": 9, "max_tokens": 8}, "min_tokens", "invalid_value", ["8"]),
        ({"prompt": "a", "stop_token_ids": [600]}, "stop_token_ids", "invalid_value", ["599"]),
        ({"prompt": "a", "logit_bias": {"600": 1}}, "logit_bias", "invalid_value", ["599"]),
        ({"prompt": "a \ud83d"}, "prompt", "invalid_value", ["unicode"]),
        (
            {"messages": [*MESSAGES, {"role": "user", "content": "\ud83d"}]},
            "messages.1.content", "invalid_unicode", ["0"],
        ),
        (
            {"openai_route": "/v1/completions", "openai_input": {"prompt": ["a"] * 65, "n": 2}},
            "n", "invalid_value", ["65", "128"],
        ),
    ],
)  # fmt: skip
async def test_prompts_that_the_model_cannot_take(
    worker: ModuleType, payload: dict[str, Any], param: str, code: str, numbers: list[str]
) -> None:
    problem = await error(worker.handler, **payload)
    assert (problem["param"], problem["code"]) == (param, code)
    assert all(number in problem["message"] for number in numbers)


async def test_a_large_prompt_leaves_the_event_loop_free(worker: ModuleType) -> None:
    text = "The river runs past the old stone house. " * 50_000
    token_ids = worker.engine.generator.tokenizer("a river ")["input_ids"] * 200_000
    completion = {"openai_route": "/v1/completions", "openai_input": {"prompt": token_ids}}
    for payload in ({"prompt": text}, completion):

        async def ask(payload: Any = payload) -> None:
            assert (await error(worker.handler, **payload))["code"] == "too_long"

        assert await least_stall(ask) < 0.1
