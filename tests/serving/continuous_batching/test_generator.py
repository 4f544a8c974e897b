"""Text generation on a tiny random Llama: each answer is what it would be alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest
import torch

from serving.continuous_batching.generator import Generator, TextDelta
from serving.continuous_batching.sampling import SamplingParams
from shared.errors import JobError
from tests.helpers import one_torch_thread
from tests.serving.continuous_batching.tiny import (
    GENERATION,
    ask,
    by_generate,
    mixed,
    prompt,
    running,
    tiny_llama,
)

pytestmark = pytest.mark.engine
INPUTS = [inputs for inputs, _ in mixed(16)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def generator(model: Any) -> Iterator[Generator]:
    with running(model) as generator:
        yield generator


async def test_greedy_answers_are_those_of_generate(generator: Generator, model: Any) -> None:
    answers = await asyncio.gather(*(ask(generator, inputs, SamplingParams(40)) for inputs in INPUTS))
    assert answers == [by_generate(model, inputs, 40) for inputs in INPUTS]
    assert {"stop", "length"} == {answer.finish_reason for answer in answers}, "both ends are tested"


async def test_a_long_answer_is_that_of_generate() -> None:
    """Longer than the cache grows at a time, alone and with a neighbour that ends before."""
    model, inputs = tiny_llama(eos_token_id=None), prompt(3, 4)
    wanted = by_generate(model, inputs, 200)
    with running(model) as generator:
        assert await ask(generator, inputs, SamplingParams(200)) == wanted
        neighbour = ask(generator, prompt(*range(2, 90)), SamplingParams(70))
        long, _ = await asyncio.gather(ask(generator, inputs, SamplingParams(200)), neighbour)
    assert long == wanted
    assert wanted.num_tokens == 200


@pytest.mark.parametrize("kind", GENERATION)
async def test_neighbours_change_nothing(kind: str) -> None:
    with running(tiny_llama(**GENERATION[kind]), max_batch_size=8) as generator:
        requests = mixed(24)
        alone = [await ask(generator, *request) for request in requests]
        starts = [0.0] * 6 + [number * 0.004 for number in range(18)]
        for each in (True, False):
            beside = await asyncio.gather(
                *(
                    ask(generator, *request, each=each, after=start)
                    for request, start in zip(requests, starts, strict=True)
                )
            )
            assert beside == alone


@pytest.mark.parametrize("config", [{}, {"no_repeat_ngram_size": 3}], ids=["joining", "through generate"])
async def test_the_checkpoints_own_penalty_is_the_default(config: dict[str, Any]) -> None:
    model = tiny_llama(repetition_penalty=1.3, **config)
    wanted = [by_generate(model, inputs, 30) for inputs in INPUTS[:6]]
    with running(model) as generator:
        # Alone as well: generate's own penalty would count padding as text.
        assert [await ask(generator, inputs, SamplingParams(30)) for inputs in INPUTS[:6]] == wanted
        beside = await asyncio.gather(*(ask(generator, inputs, SamplingParams(30)) for inputs in INPUTS[:6]))
        assert beside == wanted


async def test_each_sequence_has_its_own_penalty(model: Any, generator: Generator) -> None:
    requests = list(zip(INPUTS, [1.0, 1.1, 1.5, 3.0, 0.8] * 2, strict=False))
    answers = await asyncio.gather(
        *(
            ask(generator, inputs, SamplingParams(30, repetition_penalty=penalty))
            for inputs, penalty in requests
        )
    )
    wanted = [by_generate(model, inputs, 30, repetition_penalty=penalty) for inputs, penalty in requests]
    assert answers == wanted
    assert len({answer.text for answer in answers}) == 10


async def test_logprobs_come_with_their_tokens(model: Any, generator: Generator) -> None:
    async def deltas(params: SamplingParams, *, each: bool = True) -> list[TextDelta]:
        async with aclosing(generator.stream(prompt(5, 6, 7), params, each=each)) as parts:
            return [delta async for delta in parts]

    beside = ask(generator, prompt(5, 6, 7), SamplingParams(20))
    found, _ = await asyncio.gather(deltas(SamplingParams(12, logprobs=3)), beside)
    logprobs = [logprob for delta in found for logprob in delta.logprobs]
    assert len(logprobs) == found[-1].num_tokens == 12
    ids = [5, 6, 7, *(logprob.token_id for logprob in logprobs)]
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0, 2:-1].log_softmax(-1)
    for logprob, row in zip(logprobs, wanted, strict=True):
        assert logprob.logprob == pytest.approx(row[logprob.token_id].item(), abs=1e-4)
        assert [token_id for token_id, _ in logprob.top] == row.topk(3).indices.tolist()
        assert logprob.top[0] == (logprob.token_id, logprob.logprob)
    (once,) = await deltas(SamplingParams(3, logprobs=0), each=False)
    assert [len(logprob.top) for logprob in once.logprobs] == [0, 0, 0]


async def test_sampling_is_seeded(generator: Generator) -> None:
    async def answer(**params: Any) -> str:
        return (await ask(generator, prompt(5, 6, 7), SamplingParams(30, **params))).text

    greedy = await answer()
    assert await answer(temperature=1.0, seed=1) == await answer(temperature=1.0, seed=1) != greedy
    assert await answer(temperature=1.0, seed=1) != await answer(temperature=1.0, seed=2)
    assert await answer(temperature=1.0) != await answer(temperature=1.0), "without a seed each is its own"
    for cut in ({"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}):
        assert await answer(temperature=1.0, seed=1, **cut) == greedy


@pytest.mark.parametrize("kind", GENERATION)
async def test_logits_that_are_not_finite_fail_their_own_answer(kind: str) -> None:
    model = tiny_llama(**GENERATION[kind])
    with torch.no_grad():
        model.model.embed_tokens.weight[99] = float("nan")
    with running(model) as generator:
        bad, good = await asyncio.gather(
            *(ask(generator, prompt(*ids), SamplingParams(5)) for ids in ((99, 5), (5, 6))),
            return_exceptions=True,
        )
    assert getattr(bad, "code", bad) == "not_finite"
    assert isinstance(good, TextDelta)


@pytest.mark.parametrize("kind", GENERATION)
async def test_adapters_are_those_of_the_batch(kind: str) -> None:
    """Set before the model runs, one for each sequence, in the batch's order."""
    selected: list[list[str | None]] = []
    model = tiny_llama(eos_token_id=None, **GENERATION[kind])
    sizes, real = [], model.forward

    def forward(input_ids: Any = None, **inputs: Any) -> Any:
        sizes.append((len(input_ids), len(selected[-1])))
        return real(input_ids=input_ids, **inputs)

    model.forward = forward
    with running(model, set_adapters=selected.append) as generator:

        async def use(adapter: str | None) -> None:
            async with aclosing(generator.stream(prompt(5), SamplingParams(5), adapter=adapter)) as deltas:
                assert [delta async for delta in deltas]

        await asyncio.gather(use("a"), use(None), use("b"))
    assert all(batch == adapters for batch, adapters in sizes)
    assert {adapter for adapters in selected for adapter in adapters} == {"a", None, "b"}


def test_the_room_for_an_answer(generator: Generator) -> None:
    assert generator.max_model_len == 2048

    def fit(prompt_tokens: int, max_tokens: int | None) -> int:
        return generator.fit_max_tokens(
            prompt_tokens, max_tokens, default=512, param="messages", max_tokens_param="max_completion_tokens"
        )

    assert fit(48, None) == 512
    assert fit(2000, None) == 48
    assert fit(48, 2000) == 2000
    for sizes, param, numbers in (
        ((2048, None), "messages", ("2048",)),
        ((2000, 49), "max_completion_tokens", ("2000", "2049", "2048", "48")),
    ):
        with pytest.raises(JobError) as caught:
            fit(*sizes)
        assert (caught.value.code, caught.value.param) == ("too_long", param)
        assert caught.value.message.startswith(f"{param}: ")
        assert all(number in caught.value.message for number in numbers)
