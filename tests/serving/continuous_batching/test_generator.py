"""Generation across jobs on a tiny random Llama: each answer is what it would be alone."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

from shared.errors import JobError
from shared.generation import (
    Generator,
    TextDelta,
    SamplingParams,
    sample_next_tokens,
    supports_joining_batches,
)

pytestmark = pytest.mark.engine

END = 0


class Letters:
    """A tokenizer as far as the engine needs one: token 65 is the letter A."""

    eos_token_id = END
    pad_token_id = None

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(token) for token in ids)


def tiny_llama(**changes: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3,
        bos_token_id=1, eos_token_id=END, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.update(**changes)
    return model


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are much slower on two threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture
def engine(model: Any) -> Iterator[Generator]:
    engine = Generator(model, Letters())  # type: ignore[arg-type]
    yield engine
    engine.close()


def prompt(*ids: int, **more: Any) -> dict[str, Any]:
    import torch

    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        **more,
    }


async def ask(
    engine: Generator,
    inputs: dict[str, Any],
    sampling: SamplingParams,
    *,
    each: bool = True,
    after: float = 0,
) -> TextDelta:
    """The whole answer as one piece."""
    await asyncio.sleep(after)
    text, piece = "", TextDelta("", 0)
    async with aclosing(engine.stream(inputs, sampling, each=each)) as pieces:
        async for piece in pieces:
            assert piece.text or piece.finish_reason
            text += piece.text
    assert piece.finish_reason
    return TextDelta(text, piece.tokens, piece.finish_reason)


def mixed(number: int) -> list[tuple[dict[str, Any], SamplingParams]]:
    """Prompts and settings of all kinds."""
    draw = random.Random(7)
    asked = []
    for seed in range(number):
        ids = [draw.randrange(2, 128) for _ in range(draw.randrange(1, 60))]
        sampling = SamplingParams(
            max_tokens=draw.randrange(1, 50),
            temperature=draw.choice([0, 0, 0.7, 1.5]),
            top_p=draw.choice([1.0, 0.8]),
            seed=seed,
            stop=draw.choice([(), (), ("A", "bc")]),
        )
        asked.append((prompt(*ids), sampling))
    return asked


def slowed(engine: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers only end at their length, and each token takes 40 ms: 1500 of them a minute."""
    step = engine._step
    monkeypatch.setattr(engine, "_step", lambda batch: (time.sleep(0.04), step(batch)))
    engine._ends = frozenset()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110, the engine has no event for it
            await asyncio.sleep(0.005)


def by_generate(model: Any, inputs: dict[str, Any], max_tokens: int, **settings: Any) -> TextDelta:
    out = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=END, **settings)
    new = out[0, inputs["input_ids"].shape[1] :].tolist()
    text = [token for token in new if token != END]
    return TextDelta("".join(map(chr, text)), len(new), "stop" if END in new else "length")


# ---- the same as alone ---------------------------------------------------------------------------------


async def test_greedy_answers_are_those_of_generate(engine: Generator, model: Any) -> None:
    asked = [(inputs, SamplingParams(40)) for inputs, _ in mixed(16)]
    answers = await asyncio.gather(*(ask(engine, *each) for each in asked))
    assert answers == [by_generate(model, inputs, 40) for inputs, _ in asked]
    assert {"stop", "length"} == {answer.finish_reason for answer in answers}, "both ends are tested"


async def test_a_long_answer_is_that_of_generate(engine: Generator, model: Any) -> None:
    """Longer than the cache grows at a time, alone and with a neighbour that ends before."""
    inputs = prompt(3, 4)
    wanted = by_generate(model, inputs, 200, eos_token_id=None)
    engine._ends = frozenset()
    assert await ask(engine, inputs, SamplingParams(200)) == wanted
    long, _ = await asyncio.gather(
        ask(engine, inputs, SamplingParams(200)), ask(engine, prompt(*range(2, 90)), SamplingParams(70))
    )
    assert long == wanted
    assert wanted.tokens == 200


@pytest.mark.parametrize("kind", ["joining", "together"])
async def test_neighbours_change_nothing(kind: str, model: Any) -> None:
    """Mixed settings, arriving in the middle of each other's answers, streamed and not."""
    engine = Generator(model, Letters(), max_batch_size=8)  # type: ignore[arg-type]
    engine._joins = kind == "joining"
    asked = mixed(24)
    alone = [await ask(engine, *each) for each in asked]
    for each in (True, False):
        starts = [0.0] * 6 + [number * 0.004 for number in range(18)]
        beside = await asyncio.gather(
            *(ask(engine, *one, each=each, after=start) for one, start in zip(asked, starts, strict=True))
        )
        assert beside == alone
    engine.close()


async def test_penalties_of_the_checkpoint_hold() -> None:
    """A repetition penalty is the rows' own; what else looks back over the text goes through generate."""
    assert supports_joining_batches(
        tiny_llama(temperature=0.2, top_k=5, do_sample=True, repetition_penalty=1.3)
    )
    assert not supports_joining_batches(tiny_llama(no_repeat_ngram_size=3))
    asked = [inputs for inputs, _ in mixed(6)]
    for changes in ({"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 3, "repetition_penalty": 1.2}):
        model = tiny_llama(**changes)
        engine = Generator(model, Letters())  # type: ignore[arg-type]
        for inputs in asked:  # alone: generate's own penalty takes padding for text
            assert await ask(engine, inputs, SamplingParams(30)) == by_generate(model, inputs, 30)
        wanted = [by_generate(model, inputs, 30) for inputs in asked]
        assert await asyncio.gather(*(ask(engine, inputs, SamplingParams(30)) for inputs in asked)) == wanted
        engine.close()


async def test_each_row_has_its_own_penalty(model: Any, engine: Generator) -> None:
    penalties = [1.0, 1.1, 1.5, 3.0, 0.8]
    asked = [(inputs, penalties[i % 5]) for i, (inputs, _) in enumerate(mixed(10))]
    answers = await asyncio.gather(
        *(ask(engine, inputs, SamplingParams(30, repetition_penalty=penalty)) for inputs, penalty in asked)
    )
    wanted = [by_generate(model, inputs, 30, repetition_penalty=penalty) for inputs, penalty in asked]
    assert answers == wanted
    assert len({answer.text for answer in answers}) == 10


@pytest.mark.parametrize("kind", ["joining", "together"])
async def test_beams_are_those_of_generate(kind: str) -> None:
    """Of several widths, penalties and lengths, alone and together, beside answers that are drawn."""
    ends = [END, 20, 40, 60, 80, 100, 120]
    model = tiny_llama(eos_token_id=ends)
    engine = Generator(model, Letters(), max_batch_size=12)  # type: ignore[arg-type]
    engine._joins = kind == "joining"

    def by_beams(inputs: dict[str, Any], max_tokens: int, **settings: Any) -> TextDelta:
        out = model.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=END, **settings
        )
        new = out[0, inputs["input_ids"].shape[1] :].tolist()
        ended = new[-1] in ends
        return TextDelta("".join(map(chr, new[: len(new) - ended])), len(new), "stop" if ended else "length")

    draw, searched, wanted, greedy = random.Random(3), [], [], []
    for inputs, _ in mixed(18):
        beams, most, penalty = draw.choice([2, 4]), draw.randrange(1, 30), draw.choice([1.0, 1.0, 1.4])
        searched.append((inputs, SamplingParams(most, 0.7, repetition_penalty=penalty, beams=beams)))
        wanted.append(by_beams(inputs, most, num_beams=beams, repetition_penalty=penalty))
        greedy.append(by_beams(inputs, most, repetition_penalty=penalty))
    assert {"stop", "length"} == {answer.finish_reason for answer in wanted}, "both ends are tested"
    assert sum(ours != plain for ours, plain in zip(wanted, greedy, strict=True)) > 5
    assert [await ask(engine, *each) for each in searched] == wanted
    drawn = mixed(18)
    alone = [await ask(engine, *each) for each in drawn]
    answers = await asyncio.gather(*(ask(engine, *each) for each in (*searched, *drawn)))
    assert answers[:18] == wanted
    assert answers[18:] == alone
    engine.close()


@pytest.fixture
async def search(
    engine: Generator, monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[asyncio.Task[TextDelta]]:
    """A search that is under way, has no end token and takes more than a minute."""
    from transformers import StoppingCriteriaList

    whole = StoppingCriteriaList.__call__
    monkeypatch.setattr(
        StoppingCriteriaList, "__call__", lambda *args, **more: (time.sleep(0.04), whole(*args, **more))[1]
    )
    engine._ends = frozenset()
    task = asyncio.create_task(ask(engine, prompt(5, 6), SamplingParams(1900, beams=3)))
    await until(lambda: bool(engine._taken))
    yield task
    task.cancel()


async def test_who_draws_does_not_wait_for_a_search(
    engine: Generator, search: asyncio.Task[TextDelta]
) -> None:
    for _ in range(3):
        await asyncio.wait_for(ask(engine, prompt(8, 9), SamplingParams(5)), 30)
    assert not search.done()


async def test_a_search_that_nobody_waits_for_ends(
    engine: Generator, search: asyncio.Task[TextDelta]
) -> None:
    (row,) = engine._taken
    search.cancel()
    await until(lambda: not engine._taken)
    assert not row.tokens
    assert await ask(engine, prompt(8, 9), SamplingParams(5, beams=2))


@pytest.mark.parametrize("how", ["dies", "closes"])
async def test_an_engine_that_ends_in_a_search_says_so(
    engine: Generator, search: asyncio.Task[TextDelta], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    waiting = asyncio.create_task(ask(engine, prompt(7), SamplingParams(5, beams=3)))
    beside = asyncio.create_task(ask(engine, prompt(9), SamplingParams(1900)))
    await until(lambda: engine._live is not None and len(engine._waiting) == 1)

    def dies(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    if how == "closes":
        engine.close()
    else:
        monkeypatch.setattr(engine, "_step", dies)
    jobs = asyncio.gather(search, waiting, beside, return_exceptions=True)
    for end in await asyncio.wait_for(jobs, 30):
        assert ("closed" if how == "closes" else "being replaced") in str(end)


async def test_chances_are_told_where_asked(model: Any, engine: Generator) -> None:
    import torch

    inputs = prompt(5, 6, 7)
    beside = ask(engine, inputs, SamplingParams(20))
    async with aclosing(engine.stream(inputs, SamplingParams(12, logprobs=3))) as pieces:
        got, _ = await asyncio.gather(_all(pieces), beside)
    chances = [chance for piece in got for chance in piece.chances]
    assert len(chances) == got[-1].tokens == 12
    ids = [5, 6, 7, *(chance.token for chance in chances)]
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0, 2:-1].log_softmax(-1)
    for chance, row in zip(chances, logprobs, strict=True):
        assert chance.logprob == pytest.approx(row[chance.token].item(), abs=1e-4)
        assert [token for token, _ in chance.top] == row.topk(3).indices.tolist()
        assert chance.top[0] == (chance.token, chance.logprob)
    async with aclosing(engine.stream(inputs, SamplingParams(3, logprobs=0), each=False)) as pieces:
        assert [len(chance.top) for piece in await _all(pieces) for chance in piece.chances] == [0, 0, 0]


async def _all(pieces: AsyncGenerator[TextDelta]) -> list[TextDelta]:
    return [piece async for piece in pieces]


@pytest.mark.parametrize("where", ["_admit", "_step", "_prefill"])
async def test_an_engine_that_dies_says_so(model: Any, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """What runs, what waits and what comes later: an error for each, in place of silence."""
    engine = Generator(model, Letters(), max_batch_size=2)  # type: ignore[arg-type]
    slowed(engine, monkeypatch)
    running = [asyncio.create_task(ask(engine, prompt(5, 6), SamplingParams(1500))) for _ in range(4)]
    await until(lambda: engine._live is not None and len(engine._waiting) == 2)

    def dies(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine, where, dies)
    if where == "_prefill":  # that comes when a row has gone
        running.pop(0).cancel()
    ends = await asyncio.wait_for(asyncio.gather(*running, return_exceptions=True), 10)
    assert [getattr(end, "code", end) for end in ends] == ["engine_died"] * len(running)
    with pytest.raises(JobError, match="being replaced"):
        await asyncio.wait_for(ask(engine, prompt(5), SamplingParams(1)), 10)


async def test_sampling_is_seeded(engine: Generator) -> None:
    inputs = prompt(5, 6, 7)

    async def answer(**settings: Any) -> str:
        return (await ask(engine, inputs, SamplingParams(30, **settings))).text

    greedy = await answer()
    assert await answer(temperature=1.0, seed=1) == await answer(temperature=1.0, seed=1) != greedy
    assert await answer(temperature=1.0, seed=1) != await answer(temperature=1.0, seed=2)
    assert await answer(temperature=1.0) != await answer(temperature=1.0), "without a seed each is its own"
    assert await answer(temperature=1.0, top_p=1e-6, seed=1) == greedy
    assert await answer(temperature=1.0, top_k=1, seed=1) == greedy
    assert await answer(temperature=1.0, min_p=1.0, seed=1) == greedy


def test_choices_follow_the_distribution() -> None:
    import torch

    draws = 4000
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).repeat(draws, 1)
    for settings, expected in (
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.7}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 3, "top_p": 0.83}, [0.625, 0.375, 0, 0]),  # of what top_k leaves, 0.84 come first
        ({"min_p": 0.2}, [10 / 19, 6 / 19, 3 / 19, 0]),
    ):
        sampling = SamplingParams(1, 1.0, **settings)  # type: ignore[arg-type]
        row = SimpleNamespace(sampling=sampling, random=random.Random(0), over=False)
        counts = torch.bincount(torch.tensor(sample_next_tokens(logits, [row] * draws)), minlength=4) / draws  # type: ignore[list-item]
        # Four standard deviations of the largest share.
        assert torch.allclose(counts, torch.tensor(expected, dtype=torch.float), atol=0.032), counts


def test_a_temperature_of_almost_nothing_is_none() -> None:
    """Divided by it, the logits are more than float32 holds."""
    import torch

    logits = torch.randn(50, generator=torch.manual_seed(0)).sort().values.repeat(3, 1)
    for temperature in (1e-300, 1e-45, 1e-38, 1e-7, 1e-5):
        sampling = SamplingParams(1, temperature)
        rows = [SimpleNamespace(sampling=sampling, random=random.Random(i), over=False) for i in range(3)]
        assert sample_next_tokens(logits, rows) == [49] * 3, temperature  # type: ignore[arg-type]


def test_a_row_without_finite_logits_has_no_token() -> None:
    """Be the token drawn or the likeliest; its neighbours get theirs."""
    import torch

    logits = torch.tensor([[float("nan")] * 4, [float("-inf")] * 4, [0.0, 9.0, 0.0, 0.0]])
    for temperature in (0.0, 0.8):
        sampling = SamplingParams(1, temperature, top_k=2, top_p=0.9)
        rows = [SimpleNamespace(sampling=sampling, random=random.Random(0), over=False) for _ in range(3)]
        assert sample_next_tokens(logits, rows) == [-1, -1, 1]  # type: ignore[arg-type]


async def test_logits_that_are_no_numbers_fail_their_own_answer(engine: Generator, model: Any) -> None:
    import torch

    poison = torch.nn.Parameter(model.model.embed_tokens.weight.clone(), requires_grad=False)
    poison[99] = float("nan")
    whole, model.model.embed_tokens.weight = model.model.embed_tokens.weight, poison
    try:
        answers = await asyncio.gather(
            *(ask(engine, prompt(*ids), SamplingParams(5, beams=beams))
              for beams in (1, 2) for ids in ((99, 5), (5, 6))),
            return_exceptions=True,
        )  # fmt: skip
    finally:
        model.model.embed_tokens.weight = whole
    assert [getattr(bad, "code", bad) for bad in answers[::2]] == ["not_finite"] * 2
    assert all(isinstance(good, TextDelta) for good in answers[1::2]), answers


# ---- rows come and go ----------------------------------------------------------------------------------


async def test_a_newcomer_does_not_wait_for_the_others_ends(
    engine: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer has no end token, and takes a minute."""
    slowed(engine, monkeypatch)
    first = asyncio.create_task(ask(engine, prompt(3), SamplingParams(1500, 1.0, seed=1)))
    await until(lambda: engine._live is not None)
    await ask(engine, prompt(4, 5), SamplingParams(5))
    assert not first.done()
    first.cancel()


async def test_leaving_frees_the_place(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an answer, and while waiting for one: with the token that is being made."""
    engine = Generator(model, Letters(), max_batch_size=1)  # type: ignore[arg-type]
    slowed(engine, monkeypatch)
    running = asyncio.create_task(ask(engine, prompt(3), SamplingParams(1500, 1.0)))
    waiting = asyncio.create_task(ask(engine, prompt(4), SamplingParams(1500, 1.0)))
    await until(lambda: engine._live is not None and len(engine._waiting) == 1)
    assert engine._live is not None
    rows = [*engine._live.rows, *engine._waiting]
    waiting.cancel()
    running.cancel()
    await ask(engine, prompt(5), SamplingParams(1))
    assert [row.over for row in rows] == [True, True]
    assert rows[0].left > 1000, "a minute's answer was left in less than 20 s"
    assert rows[1].left == 1500
    engine.close()


@pytest.mark.parametrize("kind", ["joining", "together"])
async def test_whoever_waits_is_served(kind: str, model: Any) -> None:
    """Far more answers than places, prompts of other kinds among them, in a cache that is often full."""
    engine = Generator(model, Letters(), max_batch_size=4, max_cache_tokens=300)  # type: ignore[arg-type]
    engine._joins = kind == "joining"
    asked = mixed(30)
    alone = [await ask(engine, *each) for each in asked]
    for number, (inputs, _) in enumerate(asked):
        if kind == "joining" and number % 3 == 0:
            inputs["ignored"] = [number]  # what is no tensor keeps its prompt alone
    assert await asyncio.gather(*(ask(engine, *each) for each in asked)) == alone
    engine.close()


async def test_a_prompt_longer_than_the_budget_runs_alone(model: Any) -> None:
    engine = Generator(model, Letters(), max_cache_tokens=16)  # type: ignore[arg-type]
    answers = await asyncio.gather(*(ask(engine, prompt(*range(2, 60)), SamplingParams(5)) for _ in range(3)))
    assert len(set(answers)) == 1
    engine.close()


# ---- failures ------------------------------------------------------------------------------------------


async def test_a_prompt_that_breaks_the_model_fails_alone(engine: Generator) -> None:
    asked = [prompt(5 + number, 6) for number in range(8)]
    alone = [await ask(engine, inputs, SamplingParams(9)) for inputs in asked]
    asked[3] = prompt(4000, 6)  # no such token
    answers = await asyncio.gather(
        *(ask(engine, inputs, SamplingParams(9)) for inputs in asked), return_exceptions=True
    )
    assert isinstance(answers[3], IndexError)
    assert answers[:3] + answers[4:] == alone[:3] + alone[4:]


@pytest.mark.parametrize("when", ["prompt", "step"])
@pytest.mark.parametrize("kind", ["joining", "together"])
async def test_answers_survive_that_memory_runs_out(
    kind: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that has memory for three rows: the others wait, and go on from what they have."""
    import torch

    model = tiny_llama()
    engine = Generator(model, Letters())  # type: ignore[arg-type]
    engine._joins = kind == "joining"
    asked = [(inputs, SamplingParams(20, 1.0, seed=seed)) for seed, (inputs, _) in enumerate(mixed(8))]
    alone = [await ask(engine, *each) for each in asked]
    whole, failures, calls = model.forward, 0, 0

    def forward(input_ids: Any = None, **inputs: Any) -> Any:
        nonlocal failures, calls
        rows, width = input_ids.shape
        calls += 1
        if rows > 3 and (width > 1 if when == "prompt" else calls > 6):
            failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(input_ids=input_ids, **inputs)

    monkeypatch.setattr(model, "forward", forward)
    assert await asyncio.gather(*(ask(engine, *each) for each in asked)) == alone
    assert failures
    engine.close()


async def test_a_lone_answer_without_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model = tiny_llama()
    engine = Generator(model, Letters())  # type: ignore[arg-type]
    whole = model.forward

    def forward(input_ids: Any = None, **inputs: Any) -> Any:
        if input_ids.shape[1] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(input_ids=input_ids, **inputs)

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        await ask(engine, prompt(5, 6), SamplingParams(5))
    monkeypatch.undo()
    assert await ask(engine, prompt(5, 6), SamplingParams(5)), "the engine goes on"
    engine.close()


# ---- limits --------------------------------------------------------------------------------------------


def test_the_room_for_an_answer(engine: Generator) -> None:
    assert engine.max_length == 2048
    assert engine.fit(48, None, default=512, param="prompt") == 512
    assert engine.fit(2000, None, default=512, param="prompt") == 48
    assert engine.fit(48, 2000, default=512, param="prompt") == 2000
    for sizes, numbers in (((2048, None), ("2048",)), ((2000, 49), ("2000", "2049", "2048", "48"))):
        with pytest.raises(JobError) as caught:
            engine.fit(*sizes, default=512, param="prompt")
        assert caught.value.code == "too_long"
        assert all(number in caught.value.message for number in numbers)


async def test_a_closed_engine_answers_nobody_and_keeps_nobody_waiting(model: Any) -> None:
    engine = Generator(model, Letters())  # type: ignore[arg-type]

    async def read() -> None:
        async for _ in engine.stream(prompt(5, 6, 7), SamplingParams(max_tokens=1500)):
            started.set()

    started = asyncio.Event()
    running = asyncio.create_task(read())
    await asyncio.wait_for(started.wait(), 20)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        await asyncio.wait_for(running, 20)
    with pytest.raises(RuntimeError, match="closed"):
        await asyncio.wait_for(read(), 20)
