"""Where long audio is split, and what silero's model takes for speech."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.workers.whisper.support import hum, silence, sound, voice
from workers.whisper import chunking
from workers.whisper.chunking import chunk_audio, detect_speech
from workers.whisper.engine import SAMPLE_RATE

Spans = list[tuple[int, int]]


def check_chunks(chunks: Spans, samples: np.ndarray, marks: Spans = (), max_seconds: float = 30) -> None:  # type: ignore[assignment]
    """They touch each other, hold every sample once, are not too long, and split no mark."""
    assert [chunks[0][0], chunks[-1][1]] == [0, len(samples)]
    assert all(end == start for (_, end), (start, _) in pairwise(chunks))
    assert all(0 < end - start <= max_seconds * SAMPLE_RATE for start, end in chunks)
    starts = np.array([start for start, _ in chunks])
    for start, end in marks:
        holding = chunks[int(np.searchsorted(starts, start, side="right")) - 1]
        assert end <= holding[1], f"{(start, end)} is split"


def swelling_noise(length: int, rng: np.random.Generator) -> np.ndarray:
    loudness = 0.12 + 0.1 * np.sin(2 * np.pi * 4 * np.arange(length) / SAMPLE_RATE)
    return (loudness * rng.standard_normal(length)).astype(np.float32)


def bursts(*seconds: float, seed: int = 0) -> tuple[np.ndarray, Spans]:
    """Noise that swells as syllables do, and pauses, in turn; where the noise is."""
    rng = np.random.default_rng(seed)
    samples = rng.normal(0, 0.001, round(sum(seconds) * SAMPLE_RATE) + len(seconds)).astype(np.float32)
    marks, place = [], 0
    for number, length in enumerate(round(s * SAMPLE_RATE) for s in seconds):
        if not number % 2:
            samples[place : place + length] += swelling_noise(length, rng)
            marks.append((place, place + length))
        place += length
    return samples[:place], marks


def hours_of_bursts(hours: float, seed: int = 0) -> tuple[np.ndarray, Spans]:
    """Of 0.3 to 9 s, with pauses of 0.2 to 4 s."""
    rng = np.random.default_rng(seed)
    seconds = rng.uniform([0.3, 0.2], [9, 4], (int(hours * 530), 2)).flatten()
    return bursts(*seconds.tolist(), seed=seed)


def test_hours_are_split_in_pauses_and_no_sample_is_lost() -> None:
    samples, marks = hours_of_bursts(2)
    chunks = chunk_audio(samples, max_seconds=30)
    assert len(marks) > 800
    check_chunks(chunks, samples, marks)
    assert len(chunks) < len(samples) / SAMPLE_RATE / 19, "chunks are not much shorter than they may be"


def test_detected_speech_is_gathered_into_chunks() -> None:
    """With voice activity detection, what is not speech is left out only between chunks."""
    samples, marks = hours_of_bursts(1, seed=1)
    pad = SAMPLE_RATE // 10
    spans = [(start - pad, end + pad) for start, end in marks if start >= pad]
    # One of them is longer than a window: speech without a pause.
    spans[5:9] = [(spans[5][0], spans[8][1] + 40 * SAMPLE_RATE)]
    spans = spans[:6] + [span for span in spans[6:] if span[0] >= spans[5][1]]
    chunks = chunk_audio(samples, spans, max_seconds=30)
    assert all(0 < end - start <= 30 * SAMPLE_RATE for start, end in chunks)
    assert all(end <= start for (_, end), (start, _) in pairwise(chunks))
    for number, (start, end) in enumerate(spans):
        holding = [chunk for chunk in chunks if chunk[0] < end and start < chunk[1]]
        assert sum(min(end, chunk[1]) - max(start, chunk[0]) for chunk in holding) == end - start
        assert len(holding) == 1 or number == 5
    assert len(chunks) < len(spans) / 2


@pytest.mark.parametrize(
    ("speech", "expected"),
    [
        # A second of silence ends the first speech, once it has three seconds; spans are padded by 0.4 s.
        ([(0, 4), (4.3, 9)], [(0, 4), (4.3, 9)]),
        ([(0, 4), (4.1, 9), (12, 14)], [(0, 9), (12, 14)]),
        ([(0, 2), (5, 7), (9, 12), (14, 15)], [(0, 7), (9, 15)]),
        ([(0, 2), (3, 4)], [(0, 4)]),
        ([], []),
    ],
)
def test_first_speech_alone(speech: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    samples, _ = bursts(15)
    spans = [(round(start * SAMPLE_RATE), round(end * SAMPLE_RATE)) for start, end in speech]
    chunks = chunk_audio(samples, spans, max_seconds=30, first_speech_alone=True)
    assert [(start / SAMPLE_RATE, end / SAMPLE_RATE) for start, end in chunks] == expected
    assert len(chunk_audio(samples, spans, max_seconds=30)) == bool(speech)


def test_speech_after_long_digital_silence_keeps_its_onset() -> None:
    samples = np.concatenate([silence(60), voice(3, 1), silence(2)])
    (start, _), *_ = detect_speech(samples)
    assert 59.5 <= start / SAMPLE_RATE <= 60


@pytest.mark.parametrize(
    ("seconds", "most"),
    [
        ([25, 5] * 60, 66),  # a split that looks at the end of each chunk alone drifts into the noise
        ([5, 0.6, 27, 0.6, 10], 3),  # the pause comes early in the chunk
    ],
)
def test_all_points_are_weighed_together(seconds: list[float], most: int) -> None:
    samples, marks = bursts(*seconds)
    chunks = chunk_audio(samples, max_seconds=30)
    check_chunks(chunks, samples, marks)
    assert len(chunks) <= most


def test_a_quiet_speaker_is_split_in_pauses_too() -> None:
    """Loudness is relative to the audio around it, not to all of it."""
    samples, marks = bursts(*[4, 0.5] * 200)
    samples[len(samples) // 2 :] *= 0.02
    check_chunks(chunk_audio(samples, max_seconds=30), samples, marks)


@pytest.mark.parametrize("seconds", [0.01, 29.99, 30, 30.01, 60, 61.7])
@pytest.mark.parametrize("limit", [1, 30])
def test_any_length_is_split(seconds: float, limit: float) -> None:
    samples = np.full(int(seconds * SAMPLE_RATE), 0.1, np.float32)
    check_chunks(chunk_audio(samples, max_seconds=limit), samples, max_seconds=limit)


def test_inaudible_chunks_are_left_out() -> None:
    assert chunk_audio(silence(100), max_seconds=30) == []
    assert chunk_audio(silence(0), max_seconds=30) == []
    samples = np.concatenate([silence(60), sound(440, 5), silence(60)])
    chunks = chunk_audio(samples, max_seconds=10)
    assert len(chunks) <= 2
    assert chunks[0][0] <= 60 * SAMPLE_RATE
    assert chunks[-1][1] >= 65 * SAMPLE_RATE


def test_speech_is_told_from_silence_and_hum() -> None:
    """silero's own model, on what only sounds like speech."""
    samples = np.concatenate([hum(20), voice(6, 1), hum(20), voice(8, 2), hum(20)])
    spans = [(start / SAMPLE_RATE, end / SAMPLE_RATE) for start, end in detect_speech(samples)]
    for start, end in ((20, 26), (46, 54)):
        covered = sum(max(0, min(b, end) - max(a, start)) for a, b in spans)
        assert covered > 0.6 * (end - start)
    silent = [(0, 19), (27.5, 45), (55.5, 74)]
    assert not [span for span in spans for a, b in silent if span[0] < b and a < span[1]]
    assert detect_speech(silence(30)) == []
    assert detect_speech(silence(0.001)) == []


def test_speech_is_detected_in_blocks_that_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = []

    def all_of_it(samples: np.ndarray, options: Any) -> list[dict[str, int]]:
        blocks.append(len(samples))
        return [{"start": 0, "end": len(samples)}]

    monkeypatch.setattr(chunking, "get_speech_timestamps", all_of_it)
    samples = silence(25 * 60)
    check_chunks(detect_speech(samples), samples, max_seconds=600)
    assert max(blocks) <= 600 * SAMPLE_RATE
    assert sum(blocks) == len(samples)
