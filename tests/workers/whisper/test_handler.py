"""The Whisper worker: both engines, long audio and its seams, languages, formats, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import threading
import time
import tracemalloc
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from openai import OpenAI
from openai.types.audio import Transcription, TranscriptionVerbose, Translation, TranslationVerbose

from local import Platform, running
from shared.errors import StartError
from shared.jobs import validate
from shared.volume import ModelPath
from tools.models import local_env, made
from tools.models import tiny_whisper as tiny
from tools.workers import ROOT, load_handler

worker = load_handler("whisper")

RATE = worker.RATE
HELLO, MORNING, CECI, REVOIR = tiny.SAID
engine_test = pytest.mark.engine


def sound(hertz: float, seconds: float = 3.0) -> np.ndarray:
    return tiny.tone(hertz, seconds)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * RATE), np.float32)


def encoded(samples: np.ndarray, format: str = "WAV", rate: int = RATE, subtype: str | None = None) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return base64.b64encode(buffer.getvalue()).decode()


AUDIO = encoded(sound(HELLO.hertz))


async def send(audio: Any = AUDIO, **payload: Any) -> Any:
    """The tones are no speech to silero's model, so `vad` is off unless it is asked for."""
    audio = encoded(audio) if isinstance(audio, np.ndarray) else audio
    return await worker.handler({"id": "job", "input": {"audio": audio, "vad": False, **payload}})


async def error(*audio: Any, **payload: Any) -> dict[str, Any]:
    problem: dict[str, Any] = json.loads((await send(*audio, **payload))["error"])
    return problem


# ---- no model: requests --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "param", "code"),
    [
        ({}, "audio", "missing_field"),
        ({"audio": None}, "audio", "invalid_value"),
        ({"audio": AUDIO, "task": "sing"}, "task", "invalid_value"),
        ({"audio": AUDIO, "timestamps": "char"}, "timestamps", "invalid_value"),
        ({"audio": AUDIO, "language": 5}, "language", "invalid_value"),
        ({"audio": AUDIO, "temperature": 1.1}, "temperature", "invalid_value"),
        ({"audio": AUDIO, "temperature": -0.1}, "temperature", "invalid_value"),
        ({"audio": AUDIO, "beam_size": 0}, "beam_size", "invalid_value"),
        ({"audio": AUDIO, "beam_size": 17}, "beam_size", "invalid_value"),
        ({"audio": AUDIO, "response_format": "diarized_json"}, "response_format", "invalid_value"),
        ({"audio": AUDIO, "prompt": "a" * 4001}, "prompt", "invalid_value"),
        ({"audio": AUDIO, "clip_start": -1}, "clip_start", "invalid_value"),
        ({"audio": AUDIO, "clip_start": 5, "clip_end": 5}, "clip_end", "invalid_value"),
        ({"audio": AUDIO, "clip_end": 0}, "clip_end", "invalid_value"),
        ({"audio": AUDIO, "clip_start": 1e308}, "clip_start", "invalid_value"),
        ({"audio": AUDIO, "clip_end": 1e308}, "clip_end", "invalid_value"),
        ({"audio": AUDIO, "langauge": "fr"}, "langauge", "unknown_field"),
    ],
)
async def test_a_wrong_field_is_named(payload: dict[str, Any], param: str, code: str) -> None:
    problem = json.loads((await worker.handler({"id": "job", "input": payload}))["error"])
    assert (problem["param"].partition(".")[0], problem["code"]) == (param, code)
    assert problem["type"] == "invalid_request_error"
    assert param in problem["message"]


@pytest.mark.parametrize("empty", ["", "auto", None])
def test_no_language_is_to_be_detected(empty: str | None) -> None:
    request = validate(worker.WhisperRequest, {"audio": AUDIO, "language": empty})
    assert request.language is None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("sent", "taken"),
    [(None, ["segment"]), ([], ["segment"]), ("word", ["word"]), (["segment", "word"], ["segment", "word"])],
)
def test_granularities_come_as_clients_write_them(sent: Any, taken: list[str]) -> None:
    payload = {"file": AUDIO, "response_format": "verbose_json", "timestamp_granularities": sent}
    assert worker.TranscriptionRequest.model_validate(payload).timestamp_granularities == taken


def test_no_timestamps_may_be_null() -> None:
    assert worker.WhisperRequest(audio=AUDIO, timestamps=None).timestamps is False


# ---- no model: formats ---------------------------------------------------------------------------------


def segment(start: float, end: float, text: str) -> Any:
    return worker.Segment(
        id=0, seek=0, start=start, end=end, text=text, tokens=[], temperature=0.0,
        avg_logprob=0.0, compression_ratio=1.0, no_speech_prob=0.0,
    )  # fmt: skip


SEGMENTS = [
    segment(0, 1.5, " Hello, world."),
    segment(59.9996, 3723.004, " a --> b"),
    segment(3723.004, 90000, "é"),
]


def test_srt_is_exact() -> None:
    assert worker.srt(SEGMENTS) == (
        "1\n00:00:00,000 --> 00:00:01,500\nHello, world.\n\n"
        "2\n00:01:00,000 --> 01:02:03,004\na -> b\n\n"
        "3\n01:02:03,004 --> 25:00:00,000\né\n\n"
    )
    assert worker.srt([]) == ""


def test_vtt_is_exact() -> None:
    assert worker.vtt(SEGMENTS) == (
        "WEBVTT\n\n"
        "00:00:00.000 --> 00:00:01.500\nHello, world.\n\n"
        "00:01:00.000 --> 01:02:03.004\na -> b\n\n"
        "01:02:03.004 --> 25:00:00.000\né\n\n"
    )
    assert worker.vtt([]) == "WEBVTT\n\n"


# ---- no model: cutting and stitching -------------------------------------------------------------------


def marked(seconds: float, seed: int = 0) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Bursts of noise that swell as syllables do, 0.3 to 9 s long, with pauses of 0.2 to 4 s of faint noise;
    and where they lie."""
    rng = np.random.default_rng(seed)
    samples = rng.normal(0, 0.001, int(seconds * RATE)).astype(np.float32)
    marks, place = [], int(rng.uniform(0, 2) * RATE)
    while True:
        length = int(rng.uniform(0.3, 9) * RATE)
        if place + length > len(samples):
            return samples, marks
        time = np.arange(length) / RATE
        syllables = 0.12 + 0.1 * np.sin(2 * np.pi * 4 * time)
        samples[place : place + length] += (syllables * rng.standard_normal(length)).astype(np.float32)
        marks.append((place, place + length))
        place += length + int(rng.uniform(0.2, 4) * RATE)


def test_hours_are_cut_between_the_words_and_nothing_is_lost_or_doubled() -> None:
    samples, marks = marked(2 * 3600)
    pieces = worker.cut(samples, vad=False, limit_s=30)
    assert len(marks) > 800
    assert pieces[0][0] == 0
    assert pieces[-1][1] == len(samples)
    for (_, end), (start, _) in pairwise(pieces):
        assert end == start, "pieces touch: every sample is in exactly one"
    assert all(0 < end - start <= 30 * RATE for start, end in pieces)
    assert len(pieces) < 2 * 3600 / 19, "pieces are not much shorter than they may be"
    for mark in marks:
        inside = [piece for piece in pieces if piece[0] <= mark[0] and mark[1] <= piece[1]]
        assert len(inside) == 1, f"{mark} is cut"


def test_speech_that_was_found_is_gathered_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """With voice activity detection: what is no speech is left out only between pieces."""
    samples, marks = marked(3600, seed=1)
    pad = RATE // 10
    found = [(start - pad, end + pad) for start, end in marks if start >= pad]
    # One of them is longer than a window: speech without a pause.
    found[5:9] = [(found[5][0], found[8][1] + 40 * RATE)]
    found = found[:6] + [span for span in found[6:] if span[0] >= found[5][1]]
    monkeypatch.setattr(worker, "speech", lambda _: found)
    pieces = worker.cut(samples, vad=True, limit_s=30)
    assert all(0 < end - start <= 30 * RATE for start, end in pieces)
    for (_, end), (start, _) in pairwise(pieces):
        assert end <= start
    for number, (start, end) in enumerate(found):
        holding = [piece for piece in pieces if piece[0] < end and start < piece[1]]
        assert sum(min(end, piece[1]) - max(start, piece[0]) for piece in holding) == end - start
        assert len(holding) == 1 or number == 5
    assert len(pieces) < len(found) / 2


def bursts(*seconds: float) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Swelling noise and, in turn with it, pauses of so many seconds; and where the noise lies."""
    rng, parts, marks, place = np.random.default_rng(0), [], [], 0
    for number, length in enumerate(round(s * RATE) for s in seconds):
        loud = 0.001 if number % 2 else 0.12 + 0.1 * np.sin(2 * np.pi * 4 * np.arange(length) / RATE)
        parts.append((loud * rng.standard_normal(length)).astype(np.float32))
        if not number % 2:
            marks.append((place, place + length))
        place += length
    return np.concatenate(parts), marks


@pytest.mark.parametrize(
    ("seconds", "most"),
    [
        ([25, 5] * 60, 66),  # whoever only looks at the end of each piece drifts into the noise
        ([5, 0.6, 27, 0.6, 10], 3),  # the pause comes early in the piece
    ],
)
def test_the_cuts_of_the_whole_are_weighed_against_each_other(seconds: list[float], most: int) -> None:
    samples, marks = bursts(*seconds)
    pieces = worker.cut(samples, vad=False, limit_s=30)
    assert sum(end - start for start, end in pieces) == len(samples)
    assert max(end - start for start, end in pieces) <= 30 * RATE
    assert len(pieces) <= most
    for mark in marks:
        assert any(piece[0] <= mark[0] and mark[1] <= piece[1] for piece in pieces), f"{mark} is cut"


def test_a_quiet_speaker_is_cut_in_the_pauses_too() -> None:
    """Loudness is held against the sound around it, not against that of the whole."""
    samples, marks = bursts(*[4, 0.5] * 200)
    half = len(samples) // 2
    samples[half:] *= 0.02
    pieces = worker.cut(samples, vad=False, limit_s=30)
    for mark in marks:
        assert any(piece[0] <= mark[0] and mark[1] <= piece[1] for piece in pieces), f"{mark} is cut"


def test_what_has_no_pause_is_cut_too() -> None:
    for samples in (sound(440, 100), np.random.default_rng(0).normal(0, 0.1, 100 * RATE).astype(np.float32)):
        pieces = worker.cut(samples, vad=False, limit_s=30)
        assert [pieces[0][0], pieces[-1][1]] == [0, len(samples)]
        assert all(0 < end - start <= 30 * RATE for start, end in pieces)
        assert [end for _, end in pieces[:-1]] == [start for start, _ in pieces[1:]]


@pytest.mark.parametrize("seconds", [0, 0.01, 29.99, 30, 30.01, 60, 61.7])
@pytest.mark.parametrize("limit", [1, 30])
def test_any_length_is_cut(seconds: float, limit: float) -> None:
    samples = np.full(int(seconds * RATE), 0.1, np.float32)
    pieces = worker.cut(samples, vad=False, limit_s=limit)
    assert sum(end - start for start, end in pieces) == len(samples)


def test_inaudible_pieces_are_not_heard() -> None:
    assert worker.cut(silence(100), vad=False, limit_s=30) == []
    assert worker.cut(silence(0), vad=False, limit_s=30) == []
    samples = np.concatenate([silence(60), sound(440, 5), silence(60)])
    pieces = worker.cut(samples, vad=False, limit_s=10)
    assert len(pieces) <= 2
    assert pieces[0][0] <= 60 * RATE
    assert pieces[-1][1] >= 65 * RATE


def talk(seconds: float, seed: int) -> np.ndarray:
    """Something like a voice: a falling hum of 90 to 190 Hz with formants that change four times a second."""
    rng = np.random.default_rng(seed)
    count = int(seconds * RATE)
    time = np.arange(count) / RATE
    pitch = 130 + 40 * np.sin(2 * np.pi * 0.7 * time) - 8 * time
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    vowels = [(730, 1090, 2440), (270, 2290, 3010), (530, 1840, 2480), (570, 840, 2410), (300, 870, 2240)]
    wave = np.zeros(count)
    formants = np.repeat(rng.integers(0, 5, int(seconds * 4) + 1), RATE // 4)[:count]
    table = np.array(vowels)[formants]
    for harmonic in range(1, 30):
        frequency = harmonic * pitch
        gain = sum(1 / (1 + ((frequency - table[:, n]) / 90) ** 2) / (n + 1) for n in range(3))
        wave += gain * np.sin(harmonic * phase)
    syllables = np.clip(np.sin(2 * np.pi * 4 * time), 0, 1) ** 0.5
    wave = wave * syllables + rng.normal(0, 0.002, count)
    return (0.3 * wave / np.abs(wave).max()).astype(np.float32)


def test_speech_is_told_from_silence_and_hum() -> None:
    """silero's own model, on what only sounds like speech."""
    hum = 0.01 * np.sin(2 * np.pi * 50 * np.arange(20 * RATE) / RATE).astype(np.float32)
    samples = np.concatenate([hum, talk(6, 1), hum, talk(8, 2), hum])
    found = worker.speech(samples)
    for start, end in ((20, 26), (46, 54)):
        heard = [span for span in found if span[0] < end * RATE and start * RATE < span[1]]
        covered = sum(min(e, end * RATE) - max(s, start * RATE) for s, e in heard)
        assert covered > 0.6 * (end - start) * RATE
    silent = [(0, 19), (27.5, 45), (55.5, 74)]
    assert not [s for s in found for a, b in silent if s[0] < b * RATE and a * RATE < s[1]]
    assert worker.speech(silence(30)) == []
    assert worker.speech(silence(0.001)) == []


class Marks:
    """Voices, each with a faint whistle of one of eight pitches: what tells which one was heard, and when.

    As an engine it hears whistles in the log-mel features and answers with their numbers, each between its
    times, at most three in an answer: the rest of the window is to be heard again.
    """

    words = (" one", " two", " three", " four", " five", " six", " seven", " eight")
    bins = tuple(range(63, 79, 2))  # above the voice

    def __init__(self, vocabulary: Any, extractor: Any) -> None:
        self.vocabulary, self.batches, self.again = vocabulary, [], 0
        self.waiting: Callable[[], Any] = list
        self.hertz = [float(extractor.mel_filters[:, mel].argmax()) * RATE / 400 for mel in self.bins]

    def voice(self, number: int, seconds: float) -> np.ndarray:
        parts = [talk(min(6, seconds - start), number) for start in range(0, math.ceil(seconds), 6)]
        samples = np.concatenate(parts)
        time = np.arange(len(samples)) / RATE
        edge = np.clip(np.minimum(time, len(samples) / RATE - time) / 0.02, 0, 1)
        whistle = 0.02 * np.sin(2 * np.pi * self.hertz[number] * time)
        return ((samples + whistle) * edge).astype(np.float32)

    def key(self, window: Any) -> Any:
        return window.beam_size

    def decode(self, windows: Any) -> list[Any]:
        self.batches.append(len(windows))
        deadline = time.monotonic() + 60
        # Hold the second batch (the first found the language) until the next one has what it may.
        while len(self.batches) == 2 and len(self.waiting()) < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        return [self._hear(window) for window in windows]

    def _hear(self, window: Any) -> Any:
        words, first = self.vocabulary, self.vocabulary.first_time
        bands = window.features[list(self.bins)]
        whistles = bands > np.median(bands, axis=0) + 0.3
        heard = []
        for number, band in enumerate(whistles):
            edges = np.flatnonzero(np.diff(band, prepend=False, append=False)).reshape(-1, 2)
            heard += [(start, end, number) for start, end in edges.tolist() if end - start > 20]
        heard.sort()
        tokens, begins, end = [], [], 0
        for start, end, number in heard[:3]:
            text = words.tokenizer(self.words[number], add_special_tokens=False)["input_ids"]
            tokens += [first + start // 2, *text, first + end // 2]
            begins += [start / 100 + (end - start) / 100 * place / len(text) for place in range(len(text))]
        if heard[3:]:
            tokens += tokens[-1:]
            self.again += 1
        return worker.Heard(tokens, "en", 0.9, -0.1, 0.0, lambda: [*begins, end / 100])


def spoken(pitch: float, seconds: float) -> np.ndarray:
    samples = talk(seconds, int(pitch))
    time = np.arange(len(samples)) / RATE
    edge = np.clip(np.minimum(time, len(samples) / RATE - time) / 0.02, 0, 1)
    return (samples * edge).astype(np.float32)


def make_for_voices(folder: Path) -> None:
    tiny.make(folder, sounds=(HELLO, MORNING), voice=spoken)


@engine_test
@pytest.mark.parametrize("engine", ["transformers", "faster-whisper"])
async def test_voices_are_found_and_heard(engine: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """As a request comes that says nothing of `vad`, by a model that knows two voices."""
    model = made("whisper-voices", make_for_voices)
    listener = load(engine, model, monkeypatch, cache, window_seconds=6)
    monkeypatch.setattr(worker, "listener", listener, raising=False)
    rng, parts, marks, place = np.random.default_rng(1), [silence(20)], [], 20.0
    for _ in range(12):
        said = (HELLO, MORNING)[int(rng.integers(2))]
        voice = spoken(said.hertz, rng.uniform(2.2, 3.2))
        parts += [voice, silence(rng.uniform(1.5, 4))]
        marks.append((place, said.text))
        place += len(voice) / RATE + len(parts[-1]) / RATE
    samples = np.concatenate(parts)
    samples += rng.normal(0, 0.0005, len(samples)).astype(np.float32)
    answer = await worker.handler({"id": "job", "input": {"audio": encoded(samples), "timestamps": True}})
    assert [chunk["text"] for chunk in answer["chunks"]] == [text for _, text in marks]
    assert [chunk["timestamp"][0] for chunk in answer["chunks"]] == [
        pytest.approx(mark, abs=0.4) for mark, _ in marks
    ]
    assert answer["language"] == "en"


@engine_test
@pytest.mark.timeout(900)
async def test_hours_of_voices_come_back_once_in_order_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hours through everything but the model: the file, silero's model, cuts, batches, seams."""
    settings = worker.Settings(model_name=str(made("whisper", tiny.make)), max_batch_windows=8)
    found = ModelPath(Path(settings.model_name), "tiny/whisper", None, "local", 0)
    tokenizer, extractor = worker.load_processor(settings, found)
    vocabulary = worker.Vocabulary(tokenizer, multilingual=True, positions=448, timestamps=True)
    marks = Marks(vocabulary, extractor)
    listener = worker.Listener(marks, vocabulary, extractor, settings, found, 8)
    marks.waiting = lambda: list(listener._batcher._waiting)
    monkeypatch.setattr(worker, "listener", listener, raising=False)

    rng = np.random.default_rng(0)
    samples = rng.normal(0, 0.0005, 2 * 3600 * RATE).astype(np.float32)
    voices = [[marks.voice(number, rng.uniform(1, 6)) for _ in range(2)] for number in range(8)]
    long = marks.voice(0, 48.0)  # longer than any window
    expected, place = [], RATE
    while place < len(samples) - 60 * RATE:
        number = int(rng.integers(8))
        voice = voices[number][int(rng.integers(2))] if len(expected) % 300 != 150 else long
        samples[place : place + len(voice)] += voice
        expected.append((place / RATE, (place + len(voice)) / RATE, 0 if voice is long else number))
        # Now and then nobody speaks for minutes.
        place += len(voice) + int((rng.uniform(0.5, 4) if len(expected) % 200 else 150) * RATE)
    audio = encoded(samples, "FLAC")
    seconds, size = len(samples) / RATE, samples.nbytes
    del samples

    listen, before = listener.listen, 0

    async def measured(*args: Any, **options: Any) -> Any:
        nonlocal before
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        return await listen(*args, **options)

    peaks: list[int] = []
    monkeypatch.setattr(listener, "listen", measured)
    tracemalloc.start()
    try:
        answer = await send(audio, vad=True, word_timestamps=True)
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    decoding, hearing = peaks
    assert decoding < 3 * size
    assert hearing < 200e6, "what is heard is held for a few windows only, not for the hours"

    assert answer["duration"] == pytest.approx(seconds, abs=0.001)
    heard = [(part["start"], part["end"], part["text"]) for part in answer["segments"]]
    whole: list[tuple[float, float, str]] = []
    for start, end, text in heard:  # what is longer than a window comes in parts that touch
        if whole and whole[-1][2] == text and start - whole[-1][1] < 0.15:
            start = whole.pop()[0]
        whole.append((start, end, text))
    assert len(expected) > 1000
    assert [text for _, _, text in whole] == [marks.words[number] for *_, number in expected]
    for (start, end, _), (begin, finish, _) in zip(whole, expected, strict=True):
        assert (start, end) == pytest.approx((begin, finish), abs=0.1)
    assert answer["text"] == "".join(text for *_, text in heard).strip()
    assert [(word["start"], word["word"]) for word in answer["words"]] == [
        (pytest.approx(start, abs=0.02), text.strip()) for start, _, text in heard
    ]
    assert marks.again > 100, "answers that left out their end were heard again"
    assert max(marks.batches) == 8


def test_minutes_of_speech_are_found_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """silero's model hears ten minutes at a time: at the seams nothing is doubled, times go on."""
    import faster_whisper.vad

    blocks = []

    def found(samples: np.ndarray, options: Any) -> list[dict[str, int]]:
        blocks.append(len(samples))
        return [{"start": 0, "end": len(samples)}]

    monkeypatch.setattr(faster_whisper.vad, "get_speech_timestamps", found)
    samples = silence(25 * 60)
    spans = worker.speech(samples)
    assert max(blocks) <= 600 * RATE
    assert sum(blocks) == len(samples)
    assert [spans[0][0], spans[-1][1]] == [0, len(samples)]
    assert [end for _, end in spans[:-1]] == [start for start, _ in spans[1:]]


T = 1000  # the first time token; below it is text


def at(seconds: float) -> int:
    return T + round(seconds * 50)


@pytest.mark.parametrize(
    ("tokens", "expected", "covered"),
    [
        ([], [], 20.0),
        ([at(0), 1, 2, at(3)], [(0, 3, 2)], 20.0),
        ([at(0), 1, 2], [(0, 20, 2)], 20.0),
        ([at(1), 1, 2], [(1, 20, 2)], 20.0),
        ([1, 2], [(0, 20, 2)], 20.0),
        ([at(0.5), 1, at(2), at(2.5), 2, at(4)], [(0.5, 2, 1), (2.5, 4, 1)], 20.0),
        # A pair at the end: the rest of the window holds something that has no text yet.
        ([at(0), 1, at(2), at(2)], [(0, 2, 1)], 2.0),
        ([at(0), 1, at(2), at(3), 2, at(5), at(5)], [(0, 2, 1), (3, 5, 1)], 5.0),
        # A part without an end: heard again from where it begins.
        ([at(0), 1, at(2), at(3), 2, 2], [(0, 2, 1)], 2.0),
        # Times beyond the sound are its end.
        ([at(0), 1, at(29)], [(0, 20, 1)], 20.0),
    ],
)
def test_an_answer_is_read_as_openai_reads_it(
    tokens: list[int], expected: list[tuple[float, float, int]], covered: float
) -> None:
    parts, end = worker.spans(tokens, T, 20.0)
    shown = [(part.start, part.end, sum(token < T for token in part.tokens)) for part in parts]
    assert (shown, end) == (expected, covered)


def test_time_warping_finds_the_cheapest_path() -> None:
    """Against every path, on small matrices."""

    def cheapest(cost: np.ndarray, i: int, j: int) -> float:
        if i < 0 or j < 0:
            return math.inf
        if i == j == 0:
            return float(cost[0, 0])
        return float(cost[i, j]) + min(
            cheapest(cost, a, b) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1))
        )

    rng = np.random.default_rng(0)
    for _ in range(30):
        rows, columns = rng.integers(1, 6, 2)
        cost = rng.normal(size=(rows, columns)).astype(np.float32)
        tokens, frames = worker.time_warp(cost)
        steps = list(zip(tokens, frames, strict=True))
        assert steps[0] == (0, 0)
        assert steps[-1] == (rows - 1, columns - 1)
        assert all((c - a, d - b) in {(0, 1), (1, 0), (1, 1)} for (a, b), (c, d) in pairwise(steps))
        assert sum(float(cost[step]) for step in steps) == pytest.approx(
            cheapest(cost, rows - 1, columns - 1), abs=1e-4
        )
        assert len(worker.begin_of_tokens(tokens, frames)) == rows


# ---- no model: progress --------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


async def test_progress_is_throttled_and_ends_before_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, sent, slept = Clock(), [], []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(worker, "time", clock)
    monkeypatch.setattr(worker, "report", sent.append)
    monkeypatch.setattr(worker.asyncio, "sleep", sleep)
    pieces = [(number * RATE, (number + 1) * RATE) for number in range(100)]
    progress = worker.Progress(pieces, at_least=16)
    for piece in pieces:
        clock.now += 1
        progress.heard(piece)
    shown = [update["progress"]["seconds"] for update in sent]
    assert shown == [float(n) for n in range(5, 85, 5)]
    assert sent[0] == {"progress": {"percent": 5.0, "seconds": 5.0, "of": 100.0}}
    await progress.settled()
    assert slept == [0.0], "the last update has long arrived"
    progress = worker.Progress(pieces, at_least=16)
    clock.now += 6
    progress.heard(pieces[0])
    clock.now += 0.5
    await progress.settled()
    assert slept[1:] == [worker.PROGRESS_GRACE_S - 0.5]
    short = worker.Progress(pieces[:15], at_least=16)
    for piece in pieces[:15]:
        clock.now += 10
        short.heard(piece)
    await short.settled()
    assert len(sent) == 17, "a short job has no updates"
    assert len(slept) == 2, "and waits for none"


def test_progress_goes_nowhere_without_a_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNPOD_WEBHOOK_POST_OUTPUT", raising=False)
    worker.report({"progress": {}})


# ---- the models ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models are converted to."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=["transformers", "faster-whisper"])
def loaded(request: pytest.FixtureRequest, cache: Path) -> Iterator[Any]:
    """The handler's module with the tiny model on one of the engines, as `prepare()` leaves it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**local_env("whisper"), "ENGINE": request.param}.items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setenv("RUNPOD_VOLUME_PATH", str(cache / "none"))
        worker.prepare()
        yield worker.listener
        del worker.listener


@pytest.fixture
def batches(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The batches that the engine runs from now on."""
    seen: list[list[Any]] = []
    run = loaded._batcher._run
    monkeypatch.setattr(loaded._batcher, "_run", lambda windows: seen.append(list(windows)) or run(windows))
    return seen


@engine_test
async def test_the_reference_request(loaded: Any) -> None:
    answer = await worker.handler({"id": "job", "input": {"audio": AUDIO, "vad": False}})
    assert set(answer) == {
        "text", "chunks", "language", "language_probability", "task", "duration", "segments", "words",
        "model", "revision",
    }  # fmt: skip
    assert (answer["text"], answer["chunks"], answer["words"]) == ("hello world", [], None)
    assert (answer["language"], answer["task"], answer["duration"]) == ("en", "transcribe", 3.0)
    assert answer["language_probability"] > 0.9
    assert (answer["model"], answer["revision"]) == ("tiny/whisper", None)
    (part,) = answer["segments"]
    assert (part["id"], part["seek"], part["start"], part["end"]) == (0, 0, 0.0, 3.0)
    assert part["text"] == " hello world"
    assert part["temperature"] == 0.0
    assert -0.2 < part["avg_logprob"] <= 0
    assert 0 <= part["no_speech_prob"] < 0.1
    assert part["compression_ratio"] < 1


@engine_test
async def test_languages_and_tasks_are_mixed_in_one_batch(loaded: Any, batches: list[list[Any]]) -> None:
    wanted = [(said, task) for said in tiny.SAID for task in ("transcribe", "translate")]
    answers = await asyncio.gather(*(send(sound(said.hertz), task=task) for said, task in wanted))
    for (said, task), answer in zip(wanted, answers, strict=True):
        assert answer["text"] == (said.text if task == "transcribe" else said.english).strip()
        assert (answer["language"], answer["task"]) == (said.language, task)
    assert max(map(len, batches)) > 4
    together = max(batches, key=len)
    assert {window.task for window in together} == {"transcribe", "translate"}
    assert sum(map(len, batches)) == len(wanted), "no window was heard twice"


@engine_test
@pytest.mark.parametrize("name", ["fr", "French", " french ", "<|fr|>"])
async def test_a_given_language_is_taken(loaded: Any, name: str) -> None:
    answer = await send(sound(CECI.hertz), language=name)
    assert answer["text"] == CECI.text.strip()
    assert (answer["language"], answer["language_probability"]) == ("fr", None)


@engine_test
async def test_an_unknown_language_is_answered_with_those_there_are(loaded: Any) -> None:
    problem = await error(language="klingon")
    assert (problem["param"], problem["code"]) == ("language", "invalid_value")
    assert "'klingon'" in problem["message"]
    assert " de, " in problem["message"]


@engine_test
async def test_an_answer_does_not_depend_on_its_neighbours(loaded: Any) -> None:
    """Sounds that the model does not know, so that answers differ in length; prompts of several lengths."""
    rng = np.random.default_rng(3)
    jobs = []
    for number in range(8):
        samples = sound(150 + 190 * number, 1 + number / 2) + rng.normal(
            0, 0.02, int((1 + number / 2) * RATE)
        )
        prompt = [None, "abc", "well, hello", "hello"][number % 4]
        fields = {"prompt": prompt, "task": ["transcribe", "translate"][number % 2], "fallback": False}
        jobs.append((samples.astype(np.float32), fields | {"word_timestamps": number % 3 == 0}))
    alone = [await send(samples, **fields) for samples, fields in jobs]
    together = await asyncio.gather(*(send(samples, **fields) for samples, fields in jobs))

    def shown(answer: Any) -> Any:
        return answer["text"], [part["tokens"] for part in answer["segments"]], answer["words"]

    assert [shown(answer) for answer in together] == [shown(answer) for answer in alone]
    assert len({answer["text"] for answer in alone}) >= 3


@engine_test
async def test_silence_and_empty_audio_are_no_invention(loaded: Any, batches: list[list[Any]]) -> None:
    hum = 0.01 * np.sin(2 * np.pi * 50 * np.arange(20 * RATE) / RATE).astype(np.float32)
    cases = [(silence(5), False), (silence(0), False), (silence(0), True), (silence(70), True), (hum, True)]
    for samples, vad in cases:
        for fields in ({}, {"language": "fr"}, {"timestamps": "word"}):
            answer = await send(samples, vad=vad, **fields)
            assert (answer["text"], answer["chunks"], answer["segments"]) == ("", [], [])
            assert answer["language"] == fields.get("language")
        assert await send(samples, vad=vad, response_format="srt") == ""
        assert await send(samples, vad=vad, response_format="vtt") == "WEBVTT\n\n"
        assert (await send(samples, vad=vad, response_format="verbose_json"))["text"] == ""
    assert batches == [], "the model was not even asked"


@engine_test
async def test_a_window_that_the_model_takes_for_silence_is_left_out(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = loaded._batcher._run

    def quiet(windows: list[Any]) -> list[Any]:
        return [worker.Heard(h.tokens, h.language, h.language_probability, -1.5, 0.9) for h in run(windows)]

    monkeypatch.setattr(loaded._batcher, "_run", quiet)
    answer = await send()
    assert (answer["text"], answer["segments"], answer["language"]) == ("", [], None)


def lecture(pieces: int, seed: int) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """English tones in a row, 2.5 to 3.5 s each, with pauses of about 2 s; when each begins, and its text.

    Of six seconds the last third then has a pause, and room for no further tone.
    """
    rng = np.random.default_rng(seed)
    samples, marks = silence(0.15), []
    for _ in range(pieces):
        said = (HELLO, MORNING)[int(rng.integers(2))]
        marks.append((len(samples) / RATE, said.text.strip()))
        gap, length = rng.uniform(1.9, 2.3), rng.uniform(2.5, 3.5)
        samples = np.concatenate([samples, sound(said.hertz, length), silence(gap)])
    return samples, marks


@engine_test
async def test_minutes_come_back_in_order_and_in_the_originals_time(
    loaded: Any, batches: list[list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model says one thing about each window: they are cut small here, to hold one tone each."""
    monkeypatch.setattr(loaded, "settings", loaded.settings.model_copy(update={"window_seconds": 6.0}))
    files = [lecture(24, seed) for seed in (1, 2)]
    short = [send(sound(said.hertz)) for said in tiny.SAID]
    run = loaded._batcher._run

    def patient(windows: list[Any]) -> list[Any]:
        """The first batch runs until windows of both files wait."""
        deadline = time.monotonic() + 100
        while not batches and time.monotonic() < deadline:
            if len({entry.item.align for entry in list(loaded._batcher._waiting)}) == 2:
                break
            time.sleep(0.01)
        return run(windows)

    monkeypatch.setattr(loaded._batcher, "_run", patient)
    long = [
        send(files[n][0], timestamps=True, word_timestamps=n == 1, language=["en", None][n]) for n in (0, 1)
    ]
    answers = await asyncio.gather(*long, *short)
    for (samples, marks), answer in zip(files, answers, strict=False):
        assert answer["duration"] == pytest.approx(len(samples) / RATE, abs=0.001)
        assert answer["language"] == "en"
        found = [(part["start"], part["end"], part["text"].strip()) for part in answer["segments"]]
        assert [text for _, _, text in found] == [text for _, text in marks]
        assert answer["text"] == " ".join(text for _, text in marks)
        for (start, end, _), (mark, _) in zip(found, marks, strict=True):
            assert start <= mark + 0.05
            assert mark < end + 0.6
        for (_, end, _), (start, _, _) in pairwise(found):
            assert end <= start + 1e-6
        assert [part["id"] for part in answer["segments"]] == list(range(len(marks)))
        assert [chunk["timestamp"][0] for chunk in answer["chunks"]] == [start for start, _, _ in found]
    assert [answer["text"] for answer in answers[2:]] == [said.text.strip() for said in tiny.SAID]
    assert [len(answer["words"] or []) > 24 for answer in answers[:2]] == [False, True]
    mixed = [batch for batch in batches if len({window.align for window in batch}) > 1]
    assert mixed, "pieces of several jobs share batches"
    assert sum(map(len, batches)) == 2 * 24 + 4


@engine_test
async def test_what_an_answer_leaves_out_is_heard_again(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model ends after the first of two sounds with a pair of times: the rest is a window of its own."""
    seen: list[float] = []
    run = loaded._batcher._run

    def first_only(windows: list[Any]) -> list[Any]:
        seen.extend(round(window.seconds, 2) for window in windows)
        heard = run(windows)
        if windows[0].seconds > 9:
            end = loaded.words.first_time + 4 * 50
            tokens = [*heard[0].tokens[:-1], end, end]
            return [worker.Heard(tokens, "en", 0.9, heard[0].avg_logprob, 0.0)]
        return heard

    monkeypatch.setattr(loaded._batcher, "_run", first_only)
    answer = await send(np.concatenate([sound(HELLO.hertz), silence(4), sound(MORNING.hertz)]))
    assert seen == [10.0, 6.0]
    assert [(p["start"], p["end"], p["seek"]) for p in answer["segments"]] == [(0.0, 4.0, 0), (4.0, 7.0, 400)]
    assert answer["text"].startswith("hello world ")
    assert len(answer["segments"]) == 2


@engine_test
async def test_a_model_that_never_gets_on_does_not_hold_the_job(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = loaded.words.first_time
    heard = worker.Heard([times, 72, times, times], "en", 0.9, 0.0, 0.0)
    monkeypatch.setattr(loaded._batcher, "_run", lambda windows: [heard] * len(windows))
    answer = await send(sound(HELLO.hertz, 20))
    assert len(answer["segments"]) == 1


@engine_test
async def test_a_short_first_part_does_not_end_the_window(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first part ends before a second has passed; of the next the window does not hold the end."""
    times, (yes, more) = loaded.words.first_time, (72, 73)
    answers = [[times, yes, times + 40, times + 40, more, more], [times, more, times + 300]]
    seen: list[float] = []

    def run(windows: list[Any]) -> list[Any]:
        seen.append(windows[0].seconds)
        return [worker.Heard(answers[len(seen) - 1], "en", 0.9, 0.0, 0.0)]

    monkeypatch.setattr(loaded._batcher, "_run", run)
    answer = await send(sound(HELLO.hertz, 10))
    assert seen == pytest.approx([10, 9.2])
    assert [(part["start"], part["end"]) for part in answer["segments"]] == [(0, 0.8), (0.8, 6.8)]


@engine_test
async def test_what_begins_just_before_the_end_is_not_lost(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = loaded.words.first_time
    heard = worker.Heard([times, 72, times + 480, times + 480, 73], "en", 0.9, 0.0, 0.0)
    monkeypatch.setattr(loaded._batcher, "_run", lambda windows: [heard])
    answer = await send(sound(HELLO.hertz, 10))
    assert [(part["start"], part["end"]) for part in answer["segments"]] == [(0, 9.6), (9.6, 10)]


@engine_test
async def test_a_model_that_hardly_gets_on_is_heard_a_bounded_number_of_times(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    times, seen = loaded.words.first_time, []
    heard = worker.Heard([times, 72, times + 1, times + 1, 73], "en", 0.9, 0.0, 0.0)
    monkeypatch.setattr(loaded._batcher, "_run", lambda windows: seen.append(1) or [heard])
    answer = await send(sound(HELLO.hertz, 10))
    assert len(seen) == worker.MAX_TRIES
    assert answer["segments"][-1]["end"] == 10


@engine_test
async def test_clips(loaded: Any) -> None:
    samples = np.concatenate(
        [sound(HELLO.hertz), silence(2), sound(CECI.hertz), silence(2), sound(REVOIR.hertz)]
    )
    answer = await send(samples, clip_start=5.0, clip_end=8.5, timestamps=True)
    assert answer["text"] == CECI.text.strip()
    assert answer["chunks"][0]["timestamp"] == (5.0, 8.0)
    assert answer["segments"][0]["seek"] == 500
    assert answer["duration"] == pytest.approx(13.0)
    assert (await send(samples, clip_start=10.0))["text"] == REVOIR.text.strip()
    assert (await send(samples, clip_end=3.0))["text"] == HELLO.text.strip()
    assert (await send(samples, clip_end=9999))["duration"] == pytest.approx(13.0)
    problem = await error(samples, clip_start=13.0)
    assert (problem["param"], problem["code"]) == ("clip_start", "invalid_value")
    assert "13 seconds" in problem["message"]


@engine_test
async def test_words(loaded: Any) -> None:
    samples = np.concatenate([silence(1), sound(CECI.hertz)])
    answer = await send(samples, word_timestamps=True, clip_start=1.0)
    assert [word["word"] for word in answer["words"]] == ["ceci", "est", "un", "test,", "déjà"]
    starts = [word["start"] for word in answer["words"]]
    assert starts == sorted(starts)
    assert all(1.0 <= word["start"] <= word["end"] <= 4.0 for word in answer["words"])
    assert answer["chunks"] == []
    chunks = (await send(samples, timestamps="word", clip_start=1.0))["chunks"]
    assert [(chunk["text"], *chunk["timestamp"]) for chunk in chunks] == [
        (word["word"], word["start"], word["end"]) for word in answer["words"]
    ]


@engine_test
async def test_every_response_format(loaded: Any) -> None:
    samples = np.concatenate([silence(1), sound(CECI.hertz)])
    formats = ("text", "srt", "vtt", "verbose_json")
    text, srt, vtt, verbose = [
        await send(samples, response_format=name, clip_start=1.0, word_timestamps=True) for name in formats
    ]
    assert text == "ceci est un test, déjà\n"
    assert srt == "1\n00:00:01,000 --> 00:00:04,000\nceci est un test, déjà\n\n"
    assert vtt == "WEBVTT\n\n00:00:01.000 --> 00:00:04.000\nceci est un test, déjà\n\n"
    read = TranscriptionVerbose.model_validate(verbose, strict=True)
    assert (read.language, read.duration, read.text) == ("french", 4.0, "ceci est un test, déjà")
    assert set(verbose) == {"task", "language", "duration", "text", "segments", "words", "usage"}
    assert read.segments is not None
    assert read.segments[0].model_dump() == verbose["segments"][0]
    translated = await send(samples, response_format="verbose_json", task="translate")
    assert (translated["language"], translated["text"]) == ("english", CECI.english.strip())


@engine_test
async def test_an_unlikely_answer_is_heard_again_hotter(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    temperatures = []
    run = loaded._batcher._run

    def unlikely(windows: list[Any]) -> list[Any]:
        heard = run(windows)
        temperatures.append(windows[0].temperature)
        low = -2.0 if windows[0].temperature < 0.3 else -0.5
        return [worker.Heard(h.tokens, h.language, h.language_probability, low, 0.0) for h in heard]

    monkeypatch.setattr(loaded._batcher, "_run", unlikely)
    answer = await send()
    assert temperatures == [0.0, 0.2, 0.4]
    assert answer["segments"][0]["temperature"] == 0.4
    temperatures.clear()
    answer = await send(fallback=False)
    assert (temperatures, answer["segments"][0]["avg_logprob"]) == ([0.0], -2.0)
    temperatures.clear()
    await send(temperature=0.1)
    assert temperatures == [0.1], "a temperature that was asked for is kept"


@engine_test
async def test_an_answer_that_repeats_itself_is_heard_again(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hello = loaded.words.tokenizer(" hello", add_special_tokens=False)["input_ids"]
    heard = [worker.Heard(hello * 40, "en", 0.9, -0.1, 0.0), worker.Heard(hello, "en", 0.9, -0.1, 0.0)]
    monkeypatch.setattr(loaded._batcher, "_run", lambda windows: [heard.pop(0)])
    answer = await send()
    assert answer["text"] == "hello"
    assert answer["segments"][0]["temperature"] == 0.2
    assert heard == []


@engine_test
async def test_sampling_and_beams(loaded: Any) -> None:
    warm = await asyncio.gather(*(send(sound(said.hertz), temperature=0.1) for said in tiny.SAID))
    assert [answer["text"] for answer in warm] == [said.text.strip() for said in tiny.SAID]
    assert warm[0]["segments"][0]["temperature"] == 0.1
    wide = await asyncio.gather(*(send(beam_size=3, word_timestamps=True) for _ in range(3)))
    assert [answer["text"] for answer in wide] == ["hello world"] * 3
    assert all(len(answer["words"]) == 2 for answer in wide)


def written(container: str, codec: str, rate: int) -> str:
    """The tone in French as PyAV writes it, in base64."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate)
        layout = stream.codec_context
        layout.layout = "stereo"
        samples = (np.stack([tiny.tone(CECI.hertz, 3.0, rate)] * 2)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    return base64.b64encode(buffer.getvalue()).decode()


def formats() -> dict[str, str]:
    stereo = np.stack([tiny.tone(CECI.hertz, 3.0, 44_100)] * 2, axis=1)
    return {
        "wav 8 bit": encoded(sound(CECI.hertz), "WAV", RATE, "PCM_U8"),
        "wav 24 bit stereo": encoded(stereo, "WAV", 44_100, "PCM_24"),
        "wav 32 bit": encoded(sound(CECI.hertz), "WAV", RATE, "PCM_32"),
        "wav float": encoded(stereo, "WAV", 44_100, "FLOAT"),
        "flac": encoded(stereo, "FLAC", 44_100),
        "mp3": encoded(stereo, "MP3", 44_100),
        "ogg": encoded(stereo, "OGG", 44_100),
        "opus": encoded(tiny.tone(CECI.hertz, 3.0, 48_000), "OGG", 48_000, "OPUS"),
        "m4a": written("ipod", "aac", 44_100),
        "mp4": written("mp4", "aac", 48_000),
        "webm": written("webm", "libopus", 48_000),
    }


@engine_test
async def test_every_format_is_heard(loaded: Any) -> None:
    sounds = formats()
    sounds["data: URI"] = f"data:audio/mpeg;base64,{sounds['mp3']}"
    answers = await asyncio.gather(*(send(audio) for audio in sounds.values()))
    assert {name: answer.get("text") for name, answer in zip(sounds, answers, strict=True)} == dict.fromkeys(
        sounds, CECI.text.strip()
    )


@engine_test
@pytest.mark.parametrize(
    ("audio", "code"),
    [
        ("", "empty"),
        (base64.b64encode(b"ID3 this is a text, renamed to .mp3 " * 50).decode(), "bad_audio"),
        ("not base64!", "bad_base64"),
        (base64.b64encode(bytes(2000)).decode(), "bad_audio"),
        ("ftp://example.com/a.mp3", "bad_url"),
        ("http://127.0.0.1:9/a.mp3", "download_failed"),
    ],
)
async def test_what_is_no_audio_is_refused(loaded: Any, audio: str, code: str) -> None:
    problem = await error(audio)
    assert (problem["param"], problem["code"]) == ("audio", code)
    assert "hello" in (await send())["text"], "the worker goes on"


@engine_test
async def test_an_mp4_cut_in_the_middle_is_refused_and_a_wav_is_heard_as_far_as_it_goes(loaded: Any) -> None:
    data = base64.b64decode(formats()["m4a"])
    problem = await error(base64.b64encode(data[: len(data) // 2]).decode())
    assert (problem["param"], problem["code"]) == ("audio", "bad_audio")
    data = base64.b64decode(encoded(sound(CECI.hertz, 6)))
    answer = await send(base64.b64encode(data[: len(data) // 2]).decode())
    assert answer["text"] == CECI.text.strip()
    assert answer["duration"] == pytest.approx(3, abs=0.1)


@engine_test
async def test_too_much_is_refused(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = {"max_audio_seconds": 2.0}
    monkeypatch.setattr(loaded, "settings", loaded.settings.model_copy(update=bounds))
    problem = await error()
    assert (problem["param"], problem["code"]) == ("audio", "too_large")
    assert "2 seconds" in problem["message"]
    monkeypatch.setattr(loaded, "settings", loaded.settings.model_copy(update={"max_audio_mb": 0.05}))
    problem = await error()
    assert (problem["code"], "50000 bytes" in problem["message"]) == ("too_large", True)


@engine_test
async def test_a_cancelled_job_leaves_the_queue_and_its_batch(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running_now, go = threading.Event(), threading.Event()
    run, seen = loaded._batcher._run, []

    def held(windows: list[Any]) -> list[Any]:
        seen.append(windows)
        running_now.set()
        assert go.wait(60)
        return run(windows)

    monkeypatch.setattr(loaded._batcher, "_run", held)
    first = asyncio.create_task(send())
    await asyncio.to_thread(running_now.wait, 60)
    samples, _ = lecture(20, 0)
    others = [asyncio.create_task(send(samples)) for _ in range(2)]
    while not loaded._batcher._waiting:  # noqa: ASYNC110, the engine has no event for it
        await asyncio.sleep(0.01)
    for task in (first, *others):
        task.cancel()
    await asyncio.wait([first, *others])
    assert seen[0][0].over, "the engine knows that nobody waits"
    go.set()
    assert (await send())["text"] == "hello world"
    assert len(seen) == 2, "nothing of the cancelled jobs was heard"


@engine_test
async def test_decoding_does_not_stop_the_loop(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, str] = {}
    for name in ("load_audio", "cut"):
        real = getattr(worker, name)

        def noted(*args: Any, real: Callable[..., Any] = real, name: str = name, **options: Any) -> Any:
            names[name] = threading.current_thread().name
            return real(*args, **options)

        monkeypatch.setattr(worker, name, noted)
    features, run = loaded.features, loaded._batcher._run
    monkeypatch.setattr(
        loaded, "features", lambda s: names.update(features=threading.current_thread().name) or features(s)
    )
    monkeypatch.setattr(
        loaded._batcher, "_run", lambda w: names.update(engine=threading.current_thread().name) or run(w)
    )
    await send()
    assert names["engine"].startswith("engine")
    assert threading.current_thread().name not in names.values()
    assert len(names) == 4
    assert not names["features"].startswith("engine"), "it is done beside the model"


# ---- both engines beside each other, and beside the library --------------------------------------------


def load(engine: str, model: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, **options: Any) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("RUNPOD_VOLUME_PATH", str(cache / "none"))
    return worker.load(worker.Settings(model_name=str(model), engine=engine, **options))


def window(listener: Any, samples: np.ndarray, **fields: Any) -> Any:
    values = {"language": "en", "task": "transcribe", "prompt": [], "temperature": 0.0, "beam_size": 1}
    values |= {"align": True, **fields}
    return worker.Window(listener.features(samples), len(samples) / RATE, **values)


@engine_test
def test_both_engines_say_the_same(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Tokens, probabilities and the times of words, of two independent implementations."""
    model = made("whisper", tiny.make)
    ours = load("transformers", model, monkeypatch, cache)
    other = load("faster-whisper", model, monkeypatch, cache)
    compared = 0
    for hertz, language, task, prompt in [
        (HELLO.hertz, "en", "transcribe", None), (MORNING.hertz, "en", "translate", None),
        (CECI.hertz, "fr", "transcribe", None), (CECI.hertz, "en", "transcribe", "hello, you"),
        (REVOIR.hertz, "fr", "translate", "ceci est un test"), (650.0, "fr", "transcribe", None),
    ]:  # fmt: skip
        fields = {"language": language, "task": task, "prompt": ours.words.prompt(prompt)}
        samples = sound(hertz, 4)
        (a,) = ours.engine.decode([window(ours, samples, **fields)])
        (b,) = other.engine.decode([window(other, samples, **fields)])
        assert a.tokens == b.tokens
        assert a.avg_logprob == pytest.approx(b.avg_logprob, abs=0.01)
        assert a.no_speech_prob == pytest.approx(b.no_speech_prob, abs=0.01)
        if a.begins and b.begins:
            compared += 1
            assert a.begins() == pytest.approx(b.begins(), abs=0.05)
    assert compared >= 4


@engine_test
@pytest.mark.parametrize(("prompt", "most"), [(None, 224), ("hello, you " * 90, 221)])
def test_both_engines_say_as_much_as_the_model_has_room_for(
    monkeypatch: pytest.MonkeyPatch, cache: Path, prompt: str | None, most: int
) -> None:
    """Of a model that may not end: half of its 448 places, or what a long prompt leaves."""
    model = made("whisper", tiny.make)
    ours = load("transformers", model, monkeypatch, cache)
    other = load("faster-whisper", model, monkeypatch, cache)
    ours.engine.model.generation_config.suppress_tokens += [ours.words.end]
    other.engine.suppress += [other.words.end]
    fields = {"prompt": ours.words.prompt(prompt), "align": False}
    (a,) = ours.engine.decode([window(ours, sound(HELLO.hertz), **fields)])
    (b,) = other.engine.decode([window(other, sound(HELLO.hertz), **fields)])
    assert len(a.tokens) == most
    assert len(b.tokens) in (most, most + 1), "CTranslate2 makes one token more after a long prompt"


@engine_test
def test_heads_are_aligned_one_by_one(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Where nobody has said which follow the sound, a large model has 320."""
    ours = load("transformers", made("whisper", tiny.make), monkeypatch, cache)
    shapes, real = [], worker.median
    monkeypatch.setattr(worker, "median", lambda values: shapes.append(values.shape) or real(values))
    (heard,) = ours.engine.decode([window(ours, sound(HELLO.hertz))])
    text = [token for token in heard.tokens if token < ours.words.end]
    assert len(ours.engine.heads) == 4
    # A token each for the start, the language, the task, no times, and the end.
    assert shapes == [(len(text) + 5, 150)] * 4


@engine_test
@pytest.mark.parametrize("beams", [1, 3])
def test_alone_is_what_the_library_says(monkeypatch: pytest.MonkeyPatch, cache: Path, beams: int) -> None:
    """transformers' generate() as its documentation uses it."""
    import torch

    ours = load("transformers", made("whisper", tiny.make), monkeypatch, cache)
    ids = ours.words.tokenizer.get_prompt_ids("hello", return_tensors="pt")
    assert ours.words.prompt(" hello") == ids.tolist()
    for said in tiny.SAID:
        samples = sound(said.hertz, 2.5)
        row = ours.engine.model.generate(
            torch.from_numpy(ours.features(samples))[None],
            language=said.language,
            task="translate",
            num_beams=beams,
            return_timestamps=True,
        )[0].tolist()
        row = row[: row.index(ours.words.end)] if ours.words.end in row else row
        options = {"language": said.language, "task": "translate", "beam_size": beams}
        (heard,) = ours.engine.decode([window(ours, samples, **options)])
        assert heard.tokens == row


@engine_test
@pytest.mark.parametrize("engine", ["transformers", "faster-whisper"])
async def test_english_only_models(engine: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    model = made("whisper-en", tiny.make_english)
    monkeypatch.setattr(worker, "listener", load(engine, model, monkeypatch, cache), raising=False)
    for fields in ({}, {"language": "en"}, {"language": "English"}):
        answer = await send(sound(MORNING.hertz), **fields)
        assert (answer["text"], answer["language"]) == (MORNING.text.strip(), "en")
        assert answer["language_probability"] is None
    assert (await error(task="translate"))["param"] == "task"
    problem = await error(language="fr")
    assert (problem["param"], problem["code"]) == ("language", "invalid_value")
    assert "English" in problem["message"]
    verbose = await send(response_format="verbose_json", word_timestamps=True)
    assert verbose["language"] == "english"
    assert len(verbose["words"]) == 2


@engine_test
@pytest.mark.parametrize("engine", ["transformers", "faster-whisper"])
async def test_models_without_timestamps(engine: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    listener = load(engine, made("whisper", tiny.make), monkeypatch, cache, model_timestamps=False)
    monkeypatch.setattr(worker, "listener", listener, raising=False)
    answer = await send(sound(CECI.hertz, 4), timestamps=True, word_timestamps=True)
    assert answer["text"] == CECI.text.strip()
    assert [chunk["timestamp"] for chunk in answer["chunks"]] == [(0.0, 4.0)]
    assert len(answer["words"]) == 5


@engine_test
@pytest.mark.parametrize("engine", ["transformers", "faster-whisper"])
async def test_128_mel_bins_and_a_shallower_decoder(
    engine: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """As large-v3 and the distilled models have them."""
    listener = load(engine, made("whisper-distilled", tiny.make_distilled), monkeypatch, cache)
    monkeypatch.setattr(worker, "listener", listener, raising=False)
    assert listener.features(sound(440)).shape == (128, 3000)
    for said in tiny.SAID:
        answer = await send(sound(said.hertz), word_timestamps=True)
        assert (answer["text"], answer["language"]) == (said.text.strip(), said.language)
        assert [word["word"] for word in answer["words"]] == said.text.split()


@engine_test
@pytest.mark.parametrize("multilingual", [True, False])
def test_a_fine_tune_that_does_not_say_whether_it_is_multilingual(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path, multilingual: bool
) -> None:
    """The size of the vocabulary tells."""
    size = 51_865 if multilingual else 0
    tiny.make(tmp_path, width=16, heads=2, vocabulary=size, taught=False, multilingual=multilingual)
    (tmp_path / "generation_config.json").unlink()
    listener = load("transformers", tmp_path, monkeypatch, cache)
    assert bool(listener.words.languages) == multilingual


@engine_test
def test_a_model_is_converted_once_and_its_result_is_loaded_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import ctranslate2

    model = made("whisper", tiny.make)
    runs = []
    real = ctranslate2.converters.TransformersConverter.convert
    monkeypatch.setattr(
        ctranslate2.converters.TransformersConverter,
        "convert",
        lambda self, *args, **options: runs.append(args) or real(self, *args, **options),
    )
    load("faster-whisper", model, monkeypatch, tmp_path)
    load("faster-whisper", model, monkeypatch, tmp_path)
    load("faster-whisper", model, monkeypatch, tmp_path, compute_type="int8")
    assert len(runs) == 2, "once for float32, once for the quantised one"
    folder = next((tmp_path / "ctranslate2").glob("*/*-float32-*/model.bin")).parent
    assert not list((tmp_path / "ctranslate2").glob("*/tmp*")), "nothing is left behind"
    listener = load("faster-whisper", folder, monkeypatch, tmp_path)
    assert len(runs) == 2
    # Beside a whole model the converted one needs no tokenizer, and none is fetched.
    monkeypatch.setattr("faster_whisper.WhisperModel", None)
    (folder / "tokenizer.json").rename(folder / "other.json")
    load("faster-whisper", model, monkeypatch, tmp_path)
    (folder / "other.json").rename(folder / "tokenizer.json")
    (heard,) = listener.engine.decode([window(listener, sound(CECI.hertz), language=None)])
    assert (heard.language, listener.words.decode(heard.tokens)) == ("fr", CECI.text)
    with pytest.raises(StartError, match="ENGINE=faster-whisper") as caught:
        load("transformers", folder, monkeypatch, tmp_path)
    assert caught.value.code == "unsupported_architecture"


def test_other_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    found = ModelPath(tmp_path, "some/model", None, "local", 0)
    with pytest.raises(StartError, match="type llava") as caught:
        worker.load_transformers(worker.Settings(model_name="some/model"), found)
    assert caught.value.code == "unsupported_architecture"


# ---- under the local platform, with the unmodified SDK and clients -------------------------------------


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    env = {**local_env("whisper"), "WINDOW_SECONDS": "6", "MAX_BATCH_WINDOWS": "2"}
    with running("whisper", env=env) as where:
        yield where


@pytest.fixture(scope="module")
def client(platform: Platform) -> OpenAI:
    return OpenAI(base_url=platform.openai_url, api_key="any", max_retries=0, timeout=120)


def post(platform: Platform, path: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{platform.endpoint_url}/{path}",
        method="POST" if payload else "GET",
        data=json.dumps({"input": payload}).encode() if payload else None,
        headers={"Authorization": "Bearer any", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=150) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def runsync(platform: Platform, **payload: Any) -> dict[str, Any]:
    return post(platform, "runsync?wait=120000", payload)


@engine_test
def test_the_example_runs_on_the_platform(platform: Platform) -> None:
    example = json.loads((ROOT / "workers/whisper/test_input.json").read_text())
    output = runsync(platform, **example["input"])["output"]
    assert output["text"] == "hello world"
    assert output["chunks"][0]["text"] == " hello world"


@engine_test
def test_jobs_at_once_get_their_own_answers(platform: Platform) -> None:
    wanted = [tiny.SAID[number % 4] for number in range(12)]

    def ask(said: tiny.Said) -> Any:
        return runsync(platform, audio=encoded(sound(said.hertz)), vad=False)["output"]

    with ThreadPoolExecutor(12) as pool:
        outputs = list(pool.map(ask, wanted))
    assert [output["text"] for output in outputs] == [said.text.strip() for said in wanted]
    assert [output["language"] for output in outputs] == [said.language for said in wanted]


@engine_test
def test_texts_and_errors_come_through(platform: Platform) -> None:
    answer = runsync(platform, audio=AUDIO, vad=False, response_format="vtt")
    assert answer["output"] == "WEBVTT\n\n00:00:00.000 --> 00:00:03.000\nhello world\n\n"
    answer = runsync(platform, audio=AUDIO, language="klingon")
    assert answer["status"] == "FAILED"
    assert json.loads(answer["error"])["param"] == "language"


@engine_test
@pytest.mark.timeout(900)
def test_a_long_job_tells_how_far_it_is(tmp_path: Path) -> None:
    """Through the SDK and the platform, batch by batch, on a clock that the test moves."""
    gate = {"clock": 0, "batches": 0}  # the clock first: what a batch brings is told by it

    def move(**places: int) -> None:
        gate.update(places)
        for name, place in gate.items():
            (tmp_path / "new").write_text(str(place))
            (tmp_path / "new").rename(tmp_path / name)

    def begun() -> int:
        return int((tmp_path / "begun").read_text()) if (tmp_path / "begun").exists() else 0

    def until(condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 150
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    move()
    env = {**local_env("whisper"), "ENGINE": "faster-whisper", "XDG_CACHE_HOME": str(tmp_path),
           "RUNPOD_VOLUME_PATH": str(tmp_path / "none"), "WINDOW_SECONDS": "6", "MAX_BATCH_WINDOWS": "2",
           "PREWARM": "false", "GATE": str(tmp_path)}  # fmt: skip
    samples, marks = lecture(24, 3)
    with running(Path(__file__).parent / "gated.py", env=env) as platform:
        job = post(platform, "run", {"audio": encoded(samples, "FLAC"), "vad": False})["id"]

        def status() -> dict[str, Any]:
            return post(platform, f"status/{job}")

        def told() -> Any:
            return status().get("output", {}).get("progress")

        try:
            # A batch holds one or two of the 24 pieces.
            move(batches=4)
            until(lambda: begun() == 5)
            assert told() is None, "it is too early"
            move(batches=5, clock=6)
            until(told)
            first = told()
            assert status()["status"] == "IN_PROGRESS"
            move(batches=7)
            until(lambda: begun() == 8)
            assert told() == first, "not so soon after the last"
            move(batches=8, clock=12)
            until(lambda: told() != first)
            second = told()
        finally:
            move(batches=1000)
        until(lambda: status()["status"] != "IN_PROGRESS")
        last = status()
        assert (last["status"], last["output"]["text"]) == ("COMPLETED", " ".join(text for _, text in marks))
    assert (
        0 < first["seconds"] < second["seconds"] < second["of"] == pytest.approx(len(samples) / RATE, abs=0.1)
    )
    assert first["percent"] == pytest.approx(100 * first["seconds"] / first["of"], abs=0.1)


@engine_test
def test_the_official_client_reads_the_answers(client: OpenAI) -> None:
    def ask(route: str, kind: Any, **fields: Any) -> Any:
        body = {"model": "tiny/whisper", "file": encoded(sound(CECI.hertz)), "vad": False, **fields}
        return client.post(f"/audio/{route}", body=body, cast_to=kind)

    said = CECI.text.strip()
    plain = ask("transcriptions", Transcription)
    assert plain.text == said
    assert plain.usage.type == "duration"
    assert plain.usage.seconds == 3.0
    assert ask("translations", Translation).text == CECI.english.strip()
    both = {"response_format": "verbose_json", "timestamp_granularities": ["word", "segment"]}
    verbose = ask("transcriptions", TranscriptionVerbose, **both, language="fr", temperature=0.0, prompt="")
    assert (verbose.text, verbose.language, float(verbose.duration)) == (said, "french", 3.0)
    assert [word.word for word in verbose.words] == ["ceci", "est", "un", "test,", "déjà"]
    (part,) = verbose.segments
    assert (part.id, part.start, part.end, part.text) == (0, 0.0, 3.0, CECI.text)
    TranscriptionVerbose.model_validate(verbose.model_dump(), strict=True)
    only = ask("transcriptions", TranscriptionVerbose, response_format="verbose_json")
    assert only.words is None
    assert len(only.segments) == 1
    words = {"response_format": "verbose_json", "timestamp_granularities[]": ["word"]}
    only = ask("transcriptions", TranscriptionVerbose, **words)
    assert only.segments is None
    assert len(only.words) == 5
    english = ask("translations", TranslationVerbose, response_format="verbose_json")
    assert (english.text, english.segments[0].text) == (CECI.english.strip(), CECI.english)
    assert english.language == "english"
    assert client.models.list().data[0].id == "tiny/whisper"


@engine_test
@pytest.mark.parametrize(
    ("format", "expected"),
    [
        ("text", "au revoir\n"),
        ("srt", "1\n00:00:00,000 --> 00:00:03,000\nau revoir\n\n"),
        ("vtt", "WEBVTT\n\n00:00:00.000 --> 00:00:03.000\nau revoir\n\n"),
    ],
)
def test_openais_texts(platform: Platform, format: str, expected: str) -> None:
    body = {"file": encoded(sound(REVOIR.hertz)), "vad": False, "response_format": format}
    job = {"openai_route": "/v1/audio/transcriptions", "openai_input": body}
    assert runsync(platform, **job)["output"] == expected


@engine_test
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "file"),
        ({"file": AUDIO, "model": "whisper-1"}, "model"),
        ({"file": AUDIO, "stream": True}, "stream"),
        ({"file": AUDIO, "timestamp_granularities": ["word"]}, "timestamp_granularities"),
        ({"file": AUDIO, "temperature": 2}, "temperature"),
        ({"file": AUDIO, "language": "klingon"}, "language"),
        ({"file": "!"}, "file"),
    ],
)
def test_openais_errors_name_the_field(platform: Platform, fields: dict[str, Any], param: str) -> None:
    job = {"openai_route": "/v1/audio/transcriptions", "openai_input": fields}
    answer = runsync(platform, **job)
    assert answer["status"] == "FAILED"
    assert json.loads(answer["error"])["param"].partition(".")[0] == param
