"""The huggingface worker with tiny random models of several families and a tokenizer trained for them."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType
from typing import Any

import pytest

from tests.helpers import longest_stall, openai, send, sse_events, stream, until
from tests.workers.huggingface.in_process import MESSAGES, generated, serving, tokenizer_of
from tools.models import tiny_causal

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=tiny_causal.FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tiny_causal.make(tmp_path_factory.mktemp("model"), request.param)
    with serving(MODEL_NAME=str(folder), PREWARM="true") as module:
        yield module


def mixed(count: int) -> list[dict[str, Any]]:
    """Greedy requests of many lengths."""
    draw = random.Random(5)
    words = tiny_causal.TEXT.split()
    requests = []
    for number in range(count):
        prompt = " ".join(draw.choices(words, k=draw.randint(1, 30)))
        requests.append({"prompt": prompt, "max_tokens": draw.randint(1, 40)})
        if number % 3 == 1:
            requests[-1]["repetition_penalty"] = draw.choice([1.1, 1.5])
    return requests


async def test_greedy_answers_are_those_of_generate(family: ModuleType) -> None:
    """Alone and in a batch with sampled ones, whose answers repeat with their seeds."""
    requests = mixed(16)
    model, tokenizer = family.engine.generator.model, tokenizer_of(family)
    expected = [generated(model, tokenizer, **request) for request in requests]
    sampled = [{"prompt": "The sea", "max_tokens": 25, "temperature": 1.5, "seed": i} for i in range(4)]

    async def answers(*requests: dict[str, Any]) -> list[tuple[str, int, str]]:
        asked = ({"temperature": 0, **request} for request in requests)
        results = await asyncio.gather(*(send(family.handler, **request) for request in asked))
        return [(a["response"], a["usage"]["completion_tokens"], a["finish_reason"]) for a in results]

    together = await answers(*requests, *sampled)
    assert together[:16] == expected
    for request, wanted in list(zip(requests, expected, strict=True))[:4]:
        assert await answers(request) == [wanted]
    assert await answers(*sampled) == together[16:]


async def test_a_stream_is_the_complete_answer_in_parts(family: ModuleType) -> None:
    request = {"messages": MESSAGES, "max_tokens": 40, "temperature": 1.0, "seed": 4}
    complete = await send(family.handler, **request)
    *parts, end = await stream(family.handler, **request, stream=True)
    assert "".join(part["response"] for part in parts) == complete["response"]
    assert end == {**complete, "response": ""}
    assert len(parts) > 1
    assert complete.keys() == {"response", "finish_reason", "usage", "model", "revision"}
    assert complete["usage"] == {"prompt_tokens": 20, "completion_tokens": 40, "total_tokens": 60}


@pytest.mark.parametrize(
    ("token", "fields", "expected"),
    [
        ("<|im_end|>", {}, ("", 1, "stop")),
        ("<|im_end|>", {"ignore_eos": True}, ("", 6, "length")),
        ("<|im_end|>", {"min_tokens": 4}, ("The" * 4, 5, "stop")),
        ("<|im_end|>", {"skip_special_tokens": False, "ignore_eos": True}, ("<|im_end|>" * 6, 6, "length")),
        ("<|im_start|>", {}, ("", 6, "length")),
        ("<|im_start|>", {"stop": "<|im_start|>"}, ("", 1, "stop")),
        ("<|im_start|>", {"stop": ["x", "<|im_start|><|im_start|>"]}, ("", 2, "stop")),
        ("<|im_start|>", {"stop": "<|im_start|>", "min_tokens": 3}, ("", 4, "stop")),
        ("<|im_start|>", {"stop": "<|im_start|>", "skip_special_tokens": False}, ("", 1, "stop")),
        ("The", {"stop": "<|im_start|>"}, ("The" * 6, 6, "length")),
        ("The", {"stop_token_ids": ["The"]}, ("", 1, "stop")),
        ("The", {"stop": "TheT"}, ("", 2, "stop")),
        ("The", {"stop": "heT", "min_tokens": 2}, ("TheTheT", 4, "stop")),
    ],
)
async def test_what_ends_an_answer(
    worker: ModuleType, token: str, fields: dict[str, Any], expected: tuple[str, int, str]
) -> None:
    """Of a model that generates one token again and again, and "The" where that is not allowed."""
    tokenizer = tokenizer_of(worker)
    ids = [tokenizer.convert_tokens_to_ids(each) for each in (token, "The")]
    if "stop_token_ids" in fields:
        fields = {"stop_token_ids": [ids[0]]}
    bias = {str(ids[1]): 50.0, str(ids[0]): 100.0}
    body = {"prompt": "The river", "max_tokens": 6, "temperature": 0, "logit_bias": bias, **fields}
    answer = await send(worker.handler, **body)
    assert (answer["response"], answer["usage"]["completion_tokens"], answer["finish_reason"]) == expected
    *parts, _ = await stream(worker.handler, **body, stream=True)
    assert "".join(part["response"] for part in parts) == expected[0]
    completion = await openai(worker.handler, "/v1/completions", **body)
    assert (completion["choices"][0]["text"], completion["usage"]) == (expected[0], answer["usage"])


async def test_n_answers(worker: ModuleType) -> None:
    request = {"prompt": "The river", "max_tokens": 12, "temperature": 1.0}
    alone = [await send(worker.handler, **request, seed=7 + i) for i in range(3)]
    texts = [answer["response"] for answer in alone]
    answer = await send(worker.handler, **request, seed=7, n=3)
    assert [choice["response"] for choice in answer["choices"]] == texts
    assert answer["response"] == texts[0]
    assert answer["usage"]["completion_tokens"] == sum(a["usage"]["completion_tokens"] for a in alone)
    assert answer["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]
    *parts, end = await stream(worker.handler, **request, seed=7, n=3, stream=True)
    streamed = ["".join(part["response"] for part in parts if part["index"] == i) for i in range(3)]
    assert streamed == texts
    assert (end["usage"], len(end["choices"])) == (answer["usage"], 3)


async def test_logprobs_are_the_same_streamed_and_on_every_route(worker: ModuleType) -> None:
    request = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    native = await send(worker.handler, **request, logprobs=3)
    assert [len(entry["top_logprobs"]) for entry in native["logprobs"]] == [3] * 6
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] for entry in native["logprobs"])
    *_, end = await stream(worker.handler, **request, logprobs=3, stream=True)
    assert end == {**native, "response": ""}
    body = {**request, "logprobs": True, "top_logprobs": 3}
    chat = await openai(worker.handler, "/v1/chat/completions", **body)
    assert chat["choices"][0]["logprobs"]["content"] == native["logprobs"]
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    job = {"openai_route": "/v1/chat/completions", "openai_input": body}
    events = sse_events(await stream(worker.handler, **job))
    assert events[-1]["usage"] == native["usage"]
    choices = [choice for event in events for choice in event["choices"]]
    streamed = [entry for choice in choices for entry in choice.get("logprobs", {}).get("content", [])]
    assert streamed == native["logprobs"]


async def test_a_large_answer_leaves_the_event_loop_free(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2000 tokens, each with 20 of the most likely: 3 MB; the worker's own answer, streamed, and OpenAI's."""
    gc.freeze()  # as a worker does when it is ready
    monkeypatch.setattr(worker.engine.generator, "eos_token_ids", frozenset())
    own = {"prompt": "The river", "max_tokens": 2000, "logprobs": 20}
    chat = {"messages": MESSAGES, "max_tokens": 2000, "logprobs": True, "top_logprobs": 20}
    chat = {"openai_route": "/v1/chat/completions", "openai_input": chat}
    for request in (own, {**own, "stream": True}, chat):
        with longest_stall() as stall:
            *_, answer = await stream(worker.handler, **request)
        assert answer["usage"]["completion_tokens"] == 2000
        assert stall[0] < 0.1


@pytest.mark.parametrize("fields", [{"stream": True}, {}, {"n": 3, "stream": True}, {"n": 3}], ids=str)
async def test_a_cancelled_job_leaves_the_batch(
    worker: ModuleType, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token takes 30 ms, so that the complete answer would take a minute on any machine."""
    generator = worker.engine.generator
    decode = generator.decode
    monkeypatch.setattr(generator, "decode", lambda batch: time.sleep(0.03) or decode(batch))
    monkeypatch.setattr(generator, "eos_token_ids", frozenset())
    payload = {"prompt": "The river", "max_tokens": 2000, "temperature": 0.0, **fields}
    job = asyncio.create_task(stream(worker.handler, **payload))
    await until(lambda: generator.running and len(generator.running.sequences) == fields.get("n", 1))
    sequences = list(generator.running.sequences)
    job.cancel()
    with suppress(asyncio.CancelledError):
        await job
    await until(lambda: generator.running is None, seconds=5)
    assert all(sequence.remaining > 1000 for sequence in sequences)
