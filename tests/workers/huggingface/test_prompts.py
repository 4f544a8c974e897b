"""Requests as token ids and sampling parameters."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shared.errors import JobError
from shared.requests import validate
from tests.helpers import error, longest_stall, openai, send
from tests.workers.huggingface.in_process import MESSAGES, serving
from tools.models import tiny_causal
from tools.workers import load_module

pytestmark = pytest.mark.engine
schemas = load_module("huggingface", "schemas")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def params(kind: type[Any], **payload: Any) -> Any:
    return load_module("huggingface", "prompts").sampling_params(validate(kind, payload))


def test_the_defaults_of_the_reference() -> None:
    native = params(schemas.GenerateRequest, prompt="a")
    assert (native.temperature, native.top_p, native.top_k) == (0.7, 0.95, 50)
    assert schemas.DEFAULT_MAX_TOKENS == 512
    openai_default = params(schemas.ChatRequest, messages=MESSAGES)
    assert (openai_default.temperature, openai_default.top_p, openai_default.top_k) == (1, 1, 0)
    assert openai_default.logprobs is None


def test_all_routes_give_the_same_parameters() -> None:
    fields = {
        "temperature": 0.0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 3,
        "stop": ["a", "b"], "max_tokens": 9,
    }  # fmt: skip
    native = params(schemas.GenerateRequest, messages=MESSAGES, **fields)
    assert params(schemas.CompletionRequest, prompt="a", **fields) == native
    assert params(schemas.ChatRequest, messages=MESSAGES, **fields) == native
    with_logprobs = params(schemas.GenerateRequest, messages=MESSAGES, logprobs=2, **fields)
    chat = params(schemas.ChatRequest, messages=MESSAGES, logprobs=True, top_logprobs=2, **fields)
    assert chat == with_logprobs
    assert (chat.temperature, chat.stop, chat.logprobs, chat.max_tokens) == (0, ("a", "b"), 2, 9)


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
    for route, prompt in (("native", text), ("/v1/completions", token_ids)):
        with longest_stall() as stall:
            if route == "native":
                problem = await error(worker.handler, prompt=prompt)
            else:
                problem = await error(worker.handler, openai_route=route, openai_input={"prompt": prompt})
        assert problem["code"] == "too_long"
        assert stall[0] < 0.1, route


def test_prompts_are_read_without_a_job(worker: ModuleType) -> None:
    """The reader takes a request alone: no job, no settings."""
    import asyncio

    prompts = worker.engine.prompts

    async def read() -> Any:
        return await prompts.read(validate(schemas.GenerateRequest, {"prompt": "a", "n": 2, "seed": 5}))

    result = asyncio.run(read())
    assert [params.seed for _, params in result.sequences] == [5, 6]
    assert result.prompt_tokens == result.sequences[0][0]["input_ids"].shape[1]
    with pytest.raises(JobError):
        asyncio.run(prompts.read(validate(schemas.GenerateRequest, {"prompt": "a " * 9000})))
