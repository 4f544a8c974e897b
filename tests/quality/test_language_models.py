"""SmolLM2-135M-Instruct in the huggingface worker and in vLLM: token for token what `generate` makes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest

from local import Rules, running
from tests.helpers import openai as openai_job
from tests.helpers import send
from tests.quality import page
from tests.quality.prompts import PROMPTS, chat
from tests.quality.reference import TIE, Generated, Transformers
from tests.workers.huggingface.in_process import serving
from tools.models import real_env, vllm_cpu

Fetch = Callable[[str], Path]
QUICK = PROMPTS[::5]  # of each kind of question, of each topic
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "add_city", "parameters": SCHEMA}}
CITY = "Paris has 2100000 people."


@pytest.fixture(scope="module")
def transformers(fetched: Fetch) -> Transformers:
    fetched("smollm2")
    return Transformers()


@pytest.fixture(scope="module")
def worker(fetched: Fetch) -> Iterator[ModuleType]:
    fetched("smollm2")
    with serving(**real_env("huggingface")) as module:
        yield module


def without_end(tokens: list[str]) -> list[str]:
    """The tokens of an answer without the one that ends it."""
    return tokens[:-1] if tokens[-1] == "<|im_end|>" else tokens


async def greedy(worker: ModuleType, prompts: Sequence[str], max_tokens: int) -> list[list[str]]:
    """The tokens of all answers, made together."""

    async def ask(prompt: str) -> list[str]:
        job = {"messages": chat(prompt), "max_tokens": max_tokens, "temperature": 0, "logprobs": 0}
        answer = await send(worker.handler, **job)
        assert "error" not in answer, answer
        return without_end([entry["token"] for entry in answer["logprobs"]])

    return await asyncio.gather(*map(ask, prompts))


def differences(answers: Sequence[Sequence[str]], wanted: Sequence[Generated]) -> list[str]:
    different = []
    for prompt, tokens, generated in zip(PROMPTS, answers, wanted, strict=False):
        assert len(generated.tokens) > 4, prompt
        different += [f"{prompt} {text}"] if (text := generated.difference(tokens)) else []
    return different


@pytest.mark.engine
async def test_twenty_answers_are_those_of_generate(worker: ModuleType, transformers: Transformers) -> None:
    answers = await greedy(worker, QUICK, 32)
    assert differences(answers, list(transformers.generate(QUICK, 32, batch=20))) == []


@pytest.mark.engine
async def test_the_first_tokens_logits_are_those_of_transformers(
    worker: ModuleType, transformers: Transformers
) -> None:
    prompts = QUICK[:8]
    jobs = [
        send(worker.handler, messages=chat(prompt), max_tokens=1, temperature=0, logprobs=20)
        for prompt in prompts
    ]
    for answer, logprobs in zip(
        await asyncio.gather(*jobs), transformers.first_logprobs(prompts), strict=True
    ):
        (entry,) = answer["logprobs"]
        wanted = logprobs.topk(20).values.tolist()
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.engine
async def test_a_schema_is_refused_by_name(worker: ModuleType) -> None:
    answer = await openai_job(
        worker.handler, "/v1/chat/completions", messages=chat(CITY), response_format=JSON_SCHEMA
    )
    assert json.loads(answer["error"])["param"] == "response_format"


@pytest.mark.quality
@pytest.mark.timeout(3600)
async def test_a_hundred_answers_in_batches(worker: ModuleType, transformers: Transformers) -> None:
    """Each is compared with generate's answer to its prompt alone."""
    wanted = list(transformers.generate(PROMPTS, 64, batch=1))
    answers = await greedy(worker, PROMPTS, 64)
    assert report("huggingface", answers, wanted) == []


@pytest.mark.quality
@pytest.mark.timeout(3600)
def test_vllm(transformers: Transformers) -> None:
    if reason := vllm_cpu.missing():
        pytest.skip(reason)
    wanted = list(transformers.generate(PROMPTS, 64, batch=20))
    env = {**real_env("vllm"), "MAX_MODEL_LEN": "1024", "TOOL_CALL_PARSER": "hermes"}
    rules = Rules(ping_interval=1, missed_pings=600, restarts=0, grace=30)
    with running("vllm", env=env, rules=rules, ready_timeout=900) as platform:
        client = openai.AsyncOpenAI(base_url=platform.openai_url, api_key="any", timeout=900)

        async def ask(prompt: str, max_tokens: int = 64, **settings: Any) -> Any:
            answer = await client.chat.completions.create(
                model=env["SERVED_MODEL_NAME"], messages=chat(prompt), max_tokens=max_tokens, temperature=0,
                **settings,
            )  # type: ignore[call-overload]  # fmt: skip
            return answer.choices[0]

        async def everything() -> tuple[list[list[str]], Any, Any]:
            choices = await asyncio.gather(*(ask(prompt, logprobs=True) for prompt in PROMPTS))
            answers = [[entry.token for entry in choice.logprobs.content] for choice in choices]
            schema = await ask(CITY, 100, response_format=JSON_SCHEMA)
            forced = {"type": "function", "function": {"name": "add_city"}}
            return answers, schema, await ask(CITY, 100, tools=[TOOL], tool_choice=forced)

        answers, schema, call = asyncio.run(everything())
    assert json.loads(schema.message.content).keys() == {"city", "people"}
    (function,) = (tool_call.function for tool_call in call.message.tool_calls)
    assert function.name == "add_city"
    assert json.loads(function.arguments).keys() == {"city", "people"}
    assert report("vllm", [without_end(tokens) for tokens in answers], wanted) == []


LINES: dict[str, list[str | float]] = {}


def report(name: str, answers: Sequence[Sequence[str]], wanted: Sequence[Generated]) -> list[str]:
    """The differences, which go into the page."""
    different = differences(answers, wanted)
    pairs = list(zip(answers, wanted, strict=True))
    same = sum(list(ours) == generated.tokens for ours, generated in pairs)
    tokens = sum(len(generated.tokens) for generated in wanted)
    LINES[name] = [name, str(len(pairs)), str(tokens), str(same), str(len(pairs) - same), str(len(different))]
    text = (
        "SmolLM2-135M-Instruct, greedy, all prompts sent at once, beside transformers' `generate` of each. "
        f"A tie: the two likeliest logits of `generate` differ by less than {TIE:g}."
    )
    head = ["worker", "prompts", "tokens", "the same", "another token", "of them not at a tie"]
    page.write("Language models", text, page.table(head, list(LINES.values())))
    return different
