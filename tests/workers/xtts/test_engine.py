"""The speech engine and its vocoder: segments of text as audio, many at a time.

Failures and closing are the scheduler's: tests/serving/continuous_batching/test_decode_loop.py.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from serving.continuous_batching.sampling import SamplingParams
from shared.errors import JobError
from tests.helpers import until
from tests.workers.xtts.sounds import Samples, alike
from tools.models.tiny_xtts import SPEAKERS
from workers.xtts.engine import SpeechEngine, SpeechSequence

pytestmark = pytest.mark.engine
STREAM_TOKENS = 8  # with the default, 20, a segment of 40 tokens, the most here, has no second part
LONG = 1  # a seed with which "first" has two parts or more; the tests that use it fail with another


class Gate:
    """In place of a function: `calls` counts those that have come, `open` lets all through."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.real, self.calls, self.open = real, 0, threading.Event()

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        assert self.open.wait(120)
        return self.real(*args)


@pytest.fixture
async def new_engine(synthesizer: Any) -> AsyncIterator[Callable[..., SpeechEngine]]:
    """Makes engines for the worker's model, which are closed at the end."""
    engines = []

    def new_engine(**settings: Any) -> SpeechEngine:
        engines.append(SpeechEngine(synthesizer.engine.model, **{"max_batch_size": 8, **settings}))
        return engines[-1]

    yield new_engine
    for engine in engines:
        engine.close()


@pytest.fixture
def begin(synthesizer: Any) -> Callable[..., SpeechSequence]:
    """Begins a segment in an engine."""

    def begin(engine: SpeechEngine, text: str, **options: Any) -> SpeechSequence:
        voice = options.pop("voice", synthesizer.voices.built_in[SPEAKERS[0]])
        params = options.pop("params", engine.default_params)
        text_ids = synthesizer.text_tokenizer.tokenizer.encode(text, lang="en")
        return engine.synthesize(text_ids, voice, params, **{"seed": 1, **options})

    return begin


async def parts_of(sequence: SpeechSequence) -> list[Samples]:
    """The samples as they come, to the end."""
    parts, reason = [], None
    while reason is None:
        samples, reason = await sequence.next_audio()
        parts.append(samples)
    return parts


async def audio_of(sequence: SpeechSequence) -> Samples:
    return np.concatenate(await parts_of(sequence))


@pytest.fixture
def alone(synthesizer: Any, begin: Callable[..., SpeechSequence]) -> Callable[..., Awaitable[Samples]]:
    """The audio of a segment by itself, not streamed."""

    async def alone(text: str, **options: Any) -> Samples:
        return await audio_of(begin(synthesizer.engine, text, **options))

    return alone


def greedy(engine: SpeechEngine, penalty: float = 1.0) -> SamplingParams:
    return replace(engine.default_params, temperature=0.0, repetition_penalty=penalty)


# ---- the same as alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.0, 2.0])
@pytest.mark.parametrize("speed", [1.0, 1.4, 0.8])
async def test_audio_is_the_librarys(synthesizer: Any, alone: Any, speed: float, penalty: float) -> None:
    engine, voice = synthesizer.engine, synthesizer.voices.built_in[SPEAKERS[1]]
    text = "hello world, this is a sentence"

    def library() -> Samples:
        answer: dict[str, Samples] = engine.model.inference(
            text, "en", voice.latents, voice.embedding, do_sample=False, speed=speed,
            repetition_penalty=penalty, top_k=0, top_p=1.0, temperature=1.0,
        )  # fmt: skip
        return answer["wav"]

    theirs = await engine.call(library)
    ours = await alone(text, voice=voice, params=greedy(engine, penalty), speed=speed)
    assert alike(ours, theirs)


async def test_batching_and_streaming_change_no_audio(new_engine: Any, begin: Any) -> None:
    engine = new_engine(stream_tokens=STREAM_TOKENS)
    texts = [f"number {n} " * (1 + n % 4) for n in range(12)]  # more than run at a time
    wanted = []
    for n, text in enumerate(texts):
        sequence = begin(engine, text, seed=n)
        wanted.append((await audio_of(sequence), sequence.token_ids))
    sequences = [begin(engine, text, seed=n, streamed=n % 2 == 0, job=n) for n, text in enumerate(texts)]
    beside = await asyncio.gather(*map(parts_of, sequences))
    assert len({len(token_ids) for _, token_ids in wanted}) > 3, "they end at different times"
    for sequence, parts, (samples, token_ids) in zip(sequences, beside, wanted, strict=True):
        assert sequence.token_ids == token_ids
        assert alike(np.concatenate(parts), samples)
    assert any(len(parts) > 1 for parts in beside), "streamed segments come in parts"


async def test_jobs_share_the_places(new_engine: Any, begin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job with more segments than places does not keep a later one waiting."""
    engine, order = new_engine(max_batch_size=4), list[str]()
    admit = engine.admit

    def noted() -> list[SpeechSequence]:
        admitted: list[SpeechSequence] = admit()
        order.extend(str(sequence.job) for sequence in admitted)
        return admitted

    monkeypatch.setattr(engine, "admit", noted)
    monkeypatch.setattr(engine, "decode", gate := Gate(engine.decode))
    long = [begin(engine, "a sentence", seed=n, job="long") for n in range(12)]
    await until(lambda: gate.calls == 1)
    admitted = len(order)
    short = begin(engine, "hello", job="short")
    gate.open.set()
    await asyncio.gather(*map(parts_of, (*long, short)))
    assert order.index("short") == admitted, "it has the first place that is free"
    assert len(order) == 13


# ---- the vocoder ---------------------------------------------------------------------------------------


@pytest.fixture
def gated(new_engine: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SpeechEngine, Gate]]:
    """An engine whose vocoder has one thread, a gate before it and a queue of two."""
    engine = new_engine(vocoder_threads=1, max_pending=2)
    monkeypatch.setattr(engine.vocoder, "decode", gate := Gate(engine.vocoder.decode))
    yield engine, gate
    gate.open.set()


async def test_segments_are_decoded_while_others_become_audio(gated: Any, begin: Any, alone: Any) -> None:
    engine, gate = gated
    first = begin(engine, "hello", seed=1)
    await until(lambda: gate.calls == 1)
    second = begin(engine, "hello", seed=2)
    await until(lambda: second.finished)
    gate.open.set()
    for sequence, seed in ((first, 1), (second, 2)):
        assert alike(await audio_of(sequence), await alone("hello", seed=seed))


async def test_audio_that_is_not_waited_for_is_not_made(gated: Any, begin: Any) -> None:
    engine, gate = gated
    first = begin(engine, "hello", seed=1)
    await until(lambda: gate.calls == 1)
    second = begin(engine, "hello", seed=2)
    await until(lambda: second.finished)
    second.stop()
    assert [samples.cancelled() for samples in second.audio] == [True]
    gate.open.set()
    for sequence in (first, begin(engine, "hello", seed=3)):
        assert (await audio_of(sequence)).size
    assert gate.calls == 2


async def test_backpressure_of_the_vocoder(gated: Any, begin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, gate = gated
    submit, waiting = engine.vocoder.submit, []

    def noted(*args: Any) -> Any:
        waiting.append(args)
        samples = submit(*args)
        waiting.pop()
        return samples

    monkeypatch.setattr(engine.vocoder, "submit", noted)
    sequences = [begin(engine, "hello", seed=seed) for seed in range(8)]
    await until(lambda: sum(one.finished for one in sequences) == 2 and waiting)
    await asyncio.sleep(0.1)
    assert sum(one.finished for one in sequences) == 2
    gate.open.set()
    assert all(samples.size for samples in await asyncio.gather(*map(audio_of, sequences)))


async def test_part_order(new_engine: Any, begin: Any, alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, second_is_ready = new_engine(vocoder_threads=2, stream_tokens=STREAM_TOKENS), threading.Event()
    decode = engine.vocoder.decode

    def slow_at_first(frames: Any, embedding: Any, begin: int, end: int) -> Samples:
        if begin == 0:  # the first part: there is no context before it
            assert second_is_ready.wait(120)
        samples: Samples = decode(frames, embedding, begin, end)
        if begin:
            second_is_ready.set()
        return samples

    monkeypatch.setattr(engine.vocoder, "decode", slow_at_first)
    parts = await parts_of(begin(engine, "first", seed=LONG, streamed=True))
    assert len(parts) > 1
    assert alike(np.concatenate(parts), await alone("first", seed=LONG))


# ---- leaving and failing -------------------------------------------------------------------------------


async def test_cancelling(synthesizer: Any, say: Any, begin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = synthesizer.engine
    with monkeypatch.context() as patch:
        patch.setattr(engine, "decode", gate := Gate(engine.decode))
        task = asyncio.create_task(say("One sentence. " * 40))
        await until(lambda: gate.calls == 1)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()
        gate.open.set()
        await until(lambda: engine.running is None and not engine.waiting)
        assert gate.calls == 1, "no sequence gets another token"
        assert (await audio_of(begin(engine, "next"))).size


async def test_memory(new_engine: Any, begin: Any, alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that have emitted a part when memory runs out begin again, and emit the rest."""
    engine = new_engine(stream_tokens=STREAM_TOKENS)
    decode, emitted = engine.decode, []

    def scarce(batch: Any) -> Any:
        if len(batch.sequences) > 2 and len(batch.sequences[0].token_ids) > 33:
            emitted.append(sum(bool(sequence.audio) for sequence in batch.sequences))
            raise MemoryError
        return decode(batch)

    monkeypatch.setattr(engine, "decode", scarce)
    sequences = [begin(engine, f"number {n}", seed=n, streamed=True) for n in range(7)]
    beside = await asyncio.gather(*map(audio_of, sequences))
    assert emitted == [3]
    assert engine.max_batch_size <= 2
    for n, samples in enumerate(beside):
        assert alike(samples, await alone(f"number {n}", seed=n)), "no audio is emitted twice"


async def test_a_finished_sequence_keeps_no_tensors(synthesizer: Any, begin: Any) -> None:
    sequence = begin(synthesizer.engine, "hello")
    await parts_of(sequence)
    assert len(sequence.token_ids) > 1
    assert await synthesizer.engine.call(lambda: (sequence.hidden_states, sequence.seen_tokens)) == ([], None)


@pytest.mark.parametrize("field", ["latents", "embedding"])
async def test_numbers_that_are_not_finite(synthesizer: Any, alone: Any, field: str) -> None:
    voice = synthesizer.voices.built_in[SPEAKERS[0]]
    with pytest.raises(JobError) as caught:
        await alone("hello", voice=replace(voice, **{field: getattr(voice, field) * float("nan")}))
    assert caught.value.code == "not_finite"
    assert (await alone("hello")).size
