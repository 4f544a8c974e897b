"""From audio to segments: seams, fallback, several jobs, long audio, the event loop."""

import asyncio
import threading
import time
import tracemalloc
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import least_stall, until
from tests.workers.whisper.support import (
    AUDIO,
    HELLO,
    MORNING,
    RecordingEngine,
    encoded,
    engine_test,
    error,
    faded,
    lecture,
    load,
    replace_engine,
    result,
    send,
    silence,
    sound,
    voice,
    written,
)
from tools.models import made
from tools.models import tiny_whisper as tiny
from workers.whisper import handler as worker
from workers.whisper import transcriber as transcriber_module
from workers.whisper.engine import SAMPLE_RATE, DecodeRequest, DecodeResult
from workers.whisper.processor import load_feature_extractor, load_tokenizer
from workers.whisper.tokenizer import WhisperTokenizer
from workers.whisper.transcriber import MAX_WINDOWS, Transcriber

pytestmark = engine_test


def times(segments: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(segment["start"], segment["end"]) for segment in segments]


# ---- windows and their results -------------------------------------------------------------------------


async def test_a_window_that_the_model_takes_for_silence_is_left_out(engine: RecordingEngine) -> None:
    engine.run = lambda requests: [result([72], avg_logprob=-1.5, no_speech_prob=0.9)]
    answer = await send()
    assert (answer["text"], answer["segments"], answer["language"]) == ("", [], None)


async def test_what_a_result_leaves_out_is_decoded_again(loaded: Any, engine: RecordingEngine) -> None:
    """The result ends after the first of two sounds with a pair of times: the rest is a window of its own."""
    decode, end = engine.run, loaded.transcriber.tokenizer.timestamp_begin + 4 * 50

    def first_only(requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        (decoded,) = decode(requests)
        return [result([*decoded.tokens[:-1], end, end]) if requests[0].seconds > 9 else decoded]

    engine.run = first_only
    answer = await send(np.concatenate([sound(HELLO.hertz), silence(4), sound(MORNING.hertz)]))
    assert [request.seconds for (request,) in engine.batches] == [10.0, 6.0]
    assert times(answer["segments"]) == [(0.0, 4.0), (4.0, 7.0)]
    assert [segment["seek"] for segment in answer["segments"]] == [0, 400]
    assert answer["text"].startswith("hello world ")


@pytest.mark.parametrize(
    ("results", "windows", "segments"),
    [
        # The first segment ends before a second has passed; the window does not hold the next one's end.
        ([[0, "a", 40, 40, "b", "b"], [0, "b", 300]], [10, 9.2], [(0, 0.8), (0.8, 6.8)]),
        # What starts just before the end is not lost.
        ([[0, "a", 480, 480, "b"]], [10], [(0, 9.6), (9.6, 10)]),
        # A result that covers nothing is taken as it is.
        ([[0, "a", 0, 0]], [10], [(0, 0)]),
    ],
)
async def test_seams(
    loaded: Any,
    engine: RecordingEngine,
    results: list[list[int | str]],
    windows: list[float],
    segments: list[tuple[float, float]],
) -> None:
    """Numbers are timestamp tokens, letters text."""
    begin = loaded.transcriber.tokenizer.timestamp_begin
    left = [[72 if isinstance(token, str) else begin + token for token in tokens] for tokens in results]
    engine.run = lambda requests: [result(left.pop(0))]
    answer = await send(sound(HELLO.hertz, 10))
    assert [request.seconds for (request,) in engine.batches] == pytest.approx(windows)
    assert times(answer["segments"]) == segments


async def test_a_chunk_is_decoded_a_bounded_number_of_times(loaded: Any, engine: RecordingEngine) -> None:
    begin = loaded.transcriber.tokenizer.timestamp_begin
    engine.run = lambda requests: [result([begin, 72, begin + 1, begin + 1, 73])]
    answer = await send(sound(HELLO.hertz, 10))
    assert len(engine.batches) == MAX_WINDOWS
    assert answer["segments"][-1]["end"] == 10


async def test_temperature_fallback(engine: RecordingEngine) -> None:
    def improbable(requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        temperature = requests[0].temperature
        return [result([72], avg_logprob=-2.0 if temperature < 0.3 else -0.5, temperature=temperature)]

    engine.run = improbable
    for fields, temperatures, logprob in [
        ({}, [0.0, 0.2, 0.4], -0.5),
        ({"fallback": False}, [0.0], -2.0),
        ({"temperature": 0.1}, [0.1], -2.0),  # a temperature that was asked for is kept
    ]:
        engine.batches.clear()
        (segment,) = (await send(**fields))["segments"]
        assert [request.temperature for (request,) in engine.batches] == temperatures
        assert (segment["temperature"], segment["avg_logprob"]) == (temperatures[-1], logprob)


@pytest.mark.parametrize(
    ("repeats_at", "kept"), [([], 0.4), ([0.4], 0.0), ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], 0.4)]
)
async def test_where_every_temperature_fails_the_likeliest_result_is_kept(
    loaded: Any, engine: RecordingEngine, repeats_at: list[float], kept: float
) -> None:
    """One that repeats itself only where all do."""
    logprobs = {0.0: -1.2, 0.2: -1.5, 0.4: -1.1, 0.6: -2.0, 0.8: -3.0, 1.0: -5.5}
    hello = loaded.transcriber.tokenizer.encode(" hello")

    def failing(requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        temperature = requests[0].temperature
        tokens = hello * (40 if temperature in repeats_at else 1)
        return [result(tokens, avg_logprob=logprobs[temperature], temperature=temperature)]

    engine.run = failing
    (segment,) = (await send())["segments"]
    assert [request.temperature for (request,) in engine.batches] == list(logprobs)
    assert (segment["temperature"], segment["avg_logprob"]) == (kept, logprobs[kept])


@pytest.mark.parametrize(
    ("detected", "language", "requested"),
    [
        # The first speech says it; so many chunks are asked where it does not for sure.
        ([("fr", 0.9)], "fr", [None, "fr", "fr", "fr"]),
        ([("th", 0.1), ("en", 0.7)], "en", [None, None, "en", "en", "en"]),
        ([("th", 0.1), ("en", 0.15), ("fr", 0.18)], "fr", [None, None, None, "fr", "fr", "fr"]),
    ],
)
async def test_the_language_is_that_of_the_first_speech(
    loaded: Any,
    monkeypatch: pytest.MonkeyPatch,
    detected: list[tuple[str, float]],
    language: str,
    requested: list[str | None],
) -> None:
    engine = RecordingEngine(loaded.transcriber.engine)
    replace_engine(monkeypatch, loaded, engine, batch_size=1)
    spans = [(start * SAMPLE_RATE, end * SAMPLE_RATE) for start, end in [(0, 5), (7, 25), (31, 56), (58, 80)]]
    monkeypatch.setattr(transcriber_module, "detect_speech", lambda _: spans)
    left = list(detected)

    def detecting(requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        code, probability = (requests[0].language, None) if requests[0].language else left.pop(0)
        return [result([72], language=code, language_probability=probability)]

    engine.run = detecting
    answer = await send(sound(HELLO.hertz, 80), vad=True)
    assert [request.language for (request,) in engine.batches] == requested
    assert engine.batches[0][0].seconds == 5, "the first speech alone"
    assert (answer["language"], answer["language_probability"]) == (language, max(p for _, p in detected))
    assert len(answer["segments"]) == 4


async def test_words_do_not_cover_pauses(loaded: Any, engine: RecordingEngine) -> None:
    """As the alignment has it, the pause belongs to the full stop and to the word after it."""
    tokenizer = loaded.transcriber.tokenizer
    begin, texts = tokenizer.timestamp_begin, [" hello", " world", ".", " hello", " world"]
    starts = [1.0, 1.3, 1.6, 5.0, 9.0, 9.3]  # seconds, of the texts and of the end
    tokens, path, count = [], [], 0
    for index, text in enumerate(texts):
        ids = tokenizer.encode(text)
        tokens += [*([begin + round(50 * starts[index])] if index in (0, 3) else []), *ids]
        path += [(count + n, round(50 * starts[index])) for n in range(len(ids))]
        count += len(ids)
        tokens += [begin + 250] if index == 2 else []
    path.append((count, round(50 * starts[-1])))
    again = [begin + 470, *tokenizer.encode(" hello"), begin + 470]  # a segment without length
    path += [(count + n + 1, 465) for n in range(len(again) - 2)]
    engine.run = lambda requests: [result([*tokens, begin + 465, *again], alignment_path=path)]
    answer = await send(sound(HELLO.hertz, 10), word_timestamps=True)
    assert [(word["word"], word["start"], word["end"]) for word in answer["words"]] == [
        ("hello", 1.0, 1.3), ("world.", 1.3, 1.6), ("hello", 8.4, 9.0), ("world", 9.0, 9.3),
    ]  # fmt: skip
    assert times(answer["segments"]) == [(1.0, 1.6), (8.4, 9.3)]
    assert times((await send(sound(HELLO.hertz, 10)))["segments"]) == [(1.0, 5.0), (5.0, 9.3)]


async def test_a_repetitive_result_is_decoded_again(loaded: Any, engine: RecordingEngine) -> None:
    hello = loaded.transcriber.tokenizer.encode(" hello")
    engine.run = lambda requests: [result(hello * (1 if requests[0].temperature else 40))]
    assert (await send())["text"] == "hello"
    assert [request.temperature for (request,) in engine.batches] == [0.0, 0.2]


# ---- several jobs --------------------------------------------------------------------------------------


async def test_long_audio_of_several_jobs(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model recognises one thing in each window: chunks are short here, to hold one tone each."""
    engine = RecordingEngine(loaded.transcriber.engine)
    replace_engine(monkeypatch, loaded, engine, chunk_seconds=6.0)

    def first_batch_waits(requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        """Until windows of both files are in the queue."""
        deadline = time.monotonic() + 100
        while len(engine.batches) == 1 and time.monotonic() < deadline:
            if len({request.word_timestamps for request in engine.waiting}) == 2:
                break
            time.sleep(0.01)
        return loaded.transcriber.engine.decode(requests)

    engine.run = first_batch_waits
    files = [lecture(12, seed) for seed in (1, 2)]
    answers = await asyncio.gather(
        send(files[0][0], timestamps=True, language="en"),
        send(files[1][0], timestamps=True, word_timestamps=True, language="en"),
        *(send(sound(said.hertz)) for said in tiny.SAID),
    )
    for (samples, marks), answer in zip(files, answers, strict=False):
        segments = answer["segments"]
        assert answer["duration"] == pytest.approx(len(samples) / SAMPLE_RATE, abs=0.001)
        assert answer["language"] == "en"
        assert [segment["text"].strip() for segment in segments] == [text for _, text in marks]
        assert answer["text"] == " ".join(text for _, text in marks)
        for (start, end), (mark, _) in zip(times(segments), marks, strict=True):
            # With words, segments have their times, which are rough: the model knows tones, not words.
            assert start <= mark + (3 if answer["words"] else 0.05)
            assert mark < end + 0.6
        assert all(end <= start + 1e-6 for (_, end), (start, _) in pairwise(times(segments)))
        assert [segment["id"] for segment in segments] == list(range(len(marks)))
        assert [tuple(chunk["timestamp"]) for chunk in answer["chunks"]] == times(segments)
    assert [answer["text"] for answer in answers[2:]] == [said.text.strip() for said in tiny.SAID]
    assert [len(answer["words"] or []) > 12 for answer in answers[:2]] == [False, True]
    mixed = [batch for batch in engine.batches if len({request.word_timestamps for request in batch}) > 1]
    assert mixed, "chunks of several jobs share batches"
    assert sum(map(len, engine.batches)) == 2 * 12 + 4


async def test_a_cancelled_job_leaves_the_queue_and_its_batch(loaded: Any, engine: RecordingEngine) -> None:
    running, go = threading.Event(), threading.Event()
    decode = engine.run

    def held(requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        running.set()
        assert go.wait(60)
        return decode(requests)

    engine.run = held
    first = asyncio.create_task(send())
    await asyncio.to_thread(running.wait, 60)
    samples, _ = lecture(20, 0)
    others = [asyncio.create_task(send(samples)) for _ in range(2)]
    await until(lambda: engine.waiting)
    for task in (first, *others):
        task.cancel()
    await asyncio.wait([first, *others])
    assert engine.batches[0][0].cancelled, "the engine knows that nobody waits"
    go.set()
    assert (await send())["text"] == "hello world"
    assert len(engine.batches) == 2, "no window of a cancelled job was decoded"


async def test_too_large_audio_is_refused(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for limits, words in (({"max_seconds": 2.0}, "2 seconds"), ({"max_bytes": 50_000}, "50000 bytes")):
        replace_engine(monkeypatch, loaded, loaded.transcriber.engine, **limits)
        problem = await error(AUDIO)
        assert (problem["param"], problem["code"]) == ("audio", "too_large")
        assert words in problem["message"]


# ---- long audio ----------------------------------------------------------------------------------------


class Scripted(RecordingEngine):
    """An engine without a model: a test sets `run`."""

    def __init__(self) -> None:
        self.submitted, self.batches = [], []

    def key(self, request: DecodeRequest) -> Any:
        return None


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """The handler's engine."""
    folder = made("whisper", tiny.make)
    extractor, backend = load_feature_extractor(folder), load_tokenizer(folder, "tiny/whisper")
    tokenizer = WhisperTokenizer(backend, multilingual=True, max_length=448, timestamps=True)
    transcriber = Transcriber(engine := Scripted(), tokenizer, extractor, batch_size=8)
    monkeypatch.setattr(worker, "model", worker.Model(transcriber, "tiny/whisper", None), raising=False)
    return engine


@pytest.mark.parametrize("minutes", [10, pytest.param(60, marks=pytest.mark.soak)])
async def test_long_audio_does_not_stall_the_event_loop(scripted: Scripted, minutes: int) -> None:
    """With everything but the model and the speech detection, which run outside of the interpreter."""
    tokenizer = worker.model.transcriber.tokenizer
    begin, hello = tokenizer.timestamp_begin, tokenizer.encode(" hello world")
    tokens = [token for at in range(0, 1400, 100) for token in (begin + at, *hello, begin + at + 100)]
    path = [(token, 2 * token) for token in range(14 * len(hello) + 1)]
    scripted.run = lambda requests: [result(tokens, alignment_path=path)] * len(requests)
    minute = np.concatenate([0.02 * np.concatenate([voice(5, n), silence(1)]) for n in range(10)])
    audio = written(minute.astype(np.float32), "adts", "aac", SAMPLE_RATE, 24_000, repeat=minutes)
    assert len(audio) < 20e6, "as much as the platform takes"
    await send(AUDIO, word_timestamps=True)

    async def transcribe() -> None:
        answer = await send(audio, word_timestamps=True)
        assert answer["duration"] == pytest.approx(60 * minutes, rel=0.01)
        assert len(answer["words"]) > 50 * minutes

    assert await least_stall(transcribe) < 0.1


# ---- speech detection and long audio -------------------------------------------------------------------


def make_for_voices(folder: Path) -> None:
    tiny.make(folder, sounds=(HELLO, MORNING), voice=lambda pitch, seconds: faded(voice(seconds, int(pitch))))


async def test_voice_activity_detection(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A request that leaves `vad` out, and a model that knows two voices."""
    load("transformers", made("whisper-voices", make_for_voices), monkeypatch, cache, window_seconds=6)
    rng, parts, marks, place = np.random.default_rng(1), [silence(20)], [], 20.0
    for _ in range(12):
        said = (HELLO, MORNING)[int(rng.integers(2))]
        parts += [faded(voice(rng.uniform(2.2, 3.2), int(said.hertz))), silence(rng.uniform(1.5, 4))]
        marks.append((place, said.text))
        place += (len(parts[-2]) + len(parts[-1])) / SAMPLE_RATE
    samples = np.concatenate(parts)
    samples += rng.normal(0, 0.0005, len(samples)).astype(np.float32)
    answer = await send(samples, vad=True, timestamps=True)
    assert [chunk["text"] for chunk in answer["chunks"]] == [text for _, text in marks]
    assert [chunk["timestamp"][0] for chunk in answer["chunks"]] == [
        pytest.approx(mark, abs=0.4) for mark, _ in marks
    ]
    assert answer["language"] == "en"


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_two_hours_in_bounded_memory(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through everything but the model: file, speech detection, chunks, batches. A segment a window."""
    tokenizer = worker.model.transcriber.tokenizer
    begin, hello = tokenizer.timestamp_begin, tokenizer.encode(" hello")
    scripted.run = lambda requests: [
        result([begin, *hello, begin + round(50 * request.seconds)]) for request in requests
    ]
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 0.0005, 2 * 3600 * SAMPLE_RATE).astype(np.float32)
    voices = [faded(voice(rng.uniform(2, 6), seed)) for seed in range(8)]
    middles, place = [], SAMPLE_RATE
    while place < len(samples) - 60 * SAMPLE_RATE:
        spoken = voices[int(rng.integers(8))]
        samples[place : place + len(spoken)] += spoken
        middles.append((place + len(spoken) / 2) / SAMPLE_RATE)
        # Now and then nobody speaks for minutes.
        place += len(spoken) + int((rng.uniform(0.5, 4) if len(middles) % 200 else 150) * SAMPLE_RATE)
    audio, size = encoded(samples, "FLAC"), samples.nbytes
    del samples

    chunk_audio, memory = transcriber_module.chunk_audio, []

    def measured(*args: Any, **options: Any) -> Any:
        """Between loading the audio and transcribing it."""
        memory.extend(tracemalloc.get_traced_memory())
        tracemalloc.reset_peak()
        return chunk_audio(*args, **options)

    monkeypatch.setattr(transcriber_module, "chunk_audio", measured)
    tracemalloc.start()
    try:
        answer = await send(audio, vad=True)
        memory.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    loaded_bytes, loading_peak, transcribing_peak = memory
    assert loading_peak < 3 * size
    assert transcribing_peak - loaded_bytes < 200e6, "features are held for a few windows only, not for hours"
    spans = times(answer["segments"])
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert len(middles) > 900
    assert [sum(start < middle < end for start, end in spans) for middle in middles] == [1] * len(middles)
