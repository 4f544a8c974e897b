"""The scheduler, with a tiny Llama: sequences come and go, fail alone and survive a lack of memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from serving.continuous_batching.generator import Generator
from serving.continuous_batching.sampling import SamplingParams
from shared.errors import JobError
from tests.helpers import longest_stall, one_torch_thread, until
from tests.serving.continuous_batching.tiny import GENERATION, ask, mixed, prompt, running, tiny_llama

pytestmark = pytest.mark.engine
each_kind = pytest.mark.parametrize("kind", GENERATION)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


@pytest.fixture(scope="module")
def endless() -> Any:
    """A model whose answers end at their length only."""
    return tiny_llama(eos_token_id=None)


def slow(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token takes 40 ms: 1500 of them a minute."""
    decode = generator.decode
    monkeypatch.setattr(generator, "decode", lambda batch: (time.sleep(0.04), decode(batch))[1])


def broken(*_: Any) -> Any:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


async def test_a_request_joins_a_running_batch(endless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer takes a minute."""
    with running(endless) as generator:
        slow(generator, monkeypatch)
        first = asyncio.create_task(ask(generator, prompt(3), SamplingParams(1500, 1.0, seed=1)))
        await until(lambda: generator.running)
        await ask(generator, prompt(4, 5), SamplingParams(5))
        assert not first.done()
        first.cancel()


async def test_prefill_and_decode_share_the_time(endless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(endless) as generator:
        prefill, prefills = generator.prefill, []

        def slow_prefill(sequences: list[Any]) -> Any:
            prefills.append((len(sequences), tokens()))
            time.sleep(0.2)
            return prefill(sequences)

        def tokens() -> int:
            return len(generator.running.sequences[0].token_ids) if generator.running else 0

        slow(generator, monkeypatch)
        monkeypatch.setattr(generator, "prefill", slow_prefill)
        first = asyncio.create_task(ask(generator, prompt(3), SamplingParams(1500)))
        await until(lambda: tokens() > 1)
        later = [asyncio.create_task(ask(generator, prompt(4), SamplingParams(3))) for _ in range(3)]
        await asyncio.gather(*later)
        first.cancel()
        assert [size for size, _ in prefills] == [1, 3], "those that waited are prefilled in one group"
        assert 4 <= prefills[1][1] <= 6, "0.2 s of steps of 40 ms"


async def test_leaving_frees_the_place(endless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(endless, max_batch_size=1) as generator:
        slow(generator, monkeypatch)
        tasks = [asyncio.create_task(ask(generator, prompt(3), SamplingParams(1500, 1.0))) for _ in range(2)]
        await until(lambda: generator.running and len(generator.waiting) == 1)
        assert generator.running
        decoded, waiting = generator.running.sequences[0], generator.waiting[0]
        for task in tasks:
            task.cancel()
        await ask(generator, prompt(5), SamplingParams(1))
        assert decoded.finished
        assert waiting.finished
        assert decoded.remaining > 1000, "the rest of a minute's answer"
        assert waiting.remaining == 1500


@each_kind
async def test_every_sequence_gets_its_turn(kind: str) -> None:
    """Far more sequences than places, of several prefill keys, in a cache that is often full."""
    with running(tiny_llama(**GENERATION[kind]), max_batch_size=4, max_cache_tokens=300) as generator:
        requests = mixed(30)
        alone = [await ask(generator, *request) for request in requests]
        for number, (inputs, _) in enumerate(requests):
            if kind == "joining" and number % 3 == 0:
                inputs["ignored"] = [number]  # a prompt with an input that is no tensor is prefilled alone
        assert await asyncio.gather(*(ask(generator, *request) for request in requests)) == alone


async def test_a_prompt_longer_than_the_budget_runs_alone(endless: Any) -> None:
    with running(endless, max_cache_tokens=16) as generator:
        long = prompt(*range(2, 60))
        answers = await asyncio.gather(*(ask(generator, long, SamplingParams(5)) for _ in range(3)))
    assert len(set(answers)) == 1


async def test_the_event_loop_goes_on_beside_long_prompts_and_answers(endless: Any) -> None:
    inputs = prompt(*(2 + number % 120 for number in range(1000)))
    with running(endless) as generator, longest_stall() as stall:
        params = SamplingParams(200, stop=("never",), logprobs=5)
        await asyncio.gather(*(ask(generator, inputs, params, each=False) for _ in range(16)))
    assert stall[0] < 0.1


# ---- failures ------------------------------------------------------------------------------------------


async def test_a_prompt_that_breaks_the_model_fails_alone(endless: Any) -> None:
    with running(endless) as generator:
        requests = [prompt(5 + number, 6) for number in range(8)]
        alone = [await ask(generator, inputs, SamplingParams(9)) for inputs in requests]
        requests[3] = prompt(4000, 6)  # no such token
        answers = await asyncio.gather(
            *(ask(generator, inputs, SamplingParams(9)) for inputs in requests), return_exceptions=True
        )
    assert isinstance(answers[3], IndexError)
    assert answers[:3] + answers[4:] == alone[:3] + alone[4:]


@pytest.mark.parametrize("when", ["prefill", "step"])
@each_kind
async def test_out_of_memory_is_survived(kind: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with memory for three sequences: the others wait, and go on from the tokens that they have."""
    model = tiny_llama(**GENERATION[kind])
    with running(model) as generator:
        requests = [(inputs, SamplingParams(20, 1.0, seed=seed)) for seed, (inputs, _) in enumerate(mixed(8))]
        alone = [await ask(generator, *request) for request in requests]
        real, failures, calls = model.forward, 0, 0

        def forward(input_ids: Any = None, **inputs: Any) -> Any:
            nonlocal failures, calls
            batch, width = input_ids.shape
            calls += 1
            if batch > 3 and (width > 1 if when == "prefill" else calls > 6):
                failures += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(input_ids=input_ids, **inputs)

        monkeypatch.setattr(model, "forward", forward)
        assert await asyncio.gather(*(ask(generator, *request) for request in requests)) == alone
        assert failures


async def test_a_lone_sequence_without_memory_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    with running(model) as generator:
        real = model.forward

        def forward(input_ids: Any = None, **inputs: Any) -> Any:
            if input_ids.shape[1] == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(input_ids=input_ids, **inputs)

        with monkeypatch.context() as patch:
            patch.setattr(model, "forward", forward)
            with pytest.raises(torch.OutOfMemoryError):
                await ask(generator, prompt(5, 6), SamplingParams(5))
        assert await ask(generator, prompt(5, 6), SamplingParams(5)), "the engine goes on"


@pytest.mark.parametrize("method", ["admit", "decode", "prefill"])
async def test_jobs_of_a_dead_engine(endless: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    with running(endless, max_batch_size=2) as generator:
        slow(generator, monkeypatch)
        jobs = [asyncio.create_task(ask(generator, prompt(5, 6), SamplingParams(1500))) for _ in range(4)]
        await until(lambda: generator.running and len(generator.waiting) == 2)
        monkeypatch.setattr(generator, method, broken)
        if method == "prefill":  # the next is when a place is free
            jobs.pop(0).cancel()
        ends = await asyncio.wait_for(asyncio.gather(*jobs, return_exceptions=True), 10)
        assert [getattr(end, "code", end) for end in ends] == ["engine_died"] * len(jobs)
        for later in (ask(generator, prompt(5), SamplingParams(1)), generator.call(lambda: None)):
            with pytest.raises(JobError, match="being replaced"):
                await asyncio.wait_for(later, 10)


async def test_jobs_of_a_closed_engine_fail(endless: Any) -> None:
    with running(endless) as generator:
        job = asyncio.create_task(ask(generator, prompt(5, 6, 7), SamplingParams(1900)))
        await until(lambda: generator.running)
        generator.close()
        for end in (job, ask(generator, prompt(5), SamplingParams(1))):
            with pytest.raises(RuntimeError, match="closed"):
                await asyncio.wait_for(end, 20)


async def test_calls_run_between_steps(endless: Any) -> None:
    with running(endless) as generator:
        job = asyncio.create_task(ask(generator, prompt(5), SamplingParams(50)))
        assert await generator.call(lambda: torch.is_inference_mode_enabled())
        with pytest.raises(ZeroDivisionError):
            await generator.call(lambda: 1 // 0)
        assert (await job).num_tokens == 50
        with pytest.raises(RuntimeError, match="CUDA error"):
            await generator.call(broken)
        with pytest.raises(JobError, match="being replaced"):
            await generator.call(lambda: None)
