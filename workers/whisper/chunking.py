"""Long audio in chunks that the model takes at once, split where nobody speaks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from faster_whisper.vad import VadOptions, get_speech_timestamps

from .engine import SAMPLE_RATE, Samples

INAUDIBLE = 1e-4  # of full scale: less than the last bit of 16
# After a minute of digital silence the model detects speech up to 1.8 s late, with this noise after 0.1 s.
DITHER = 1e-4  # standard deviation, of full scale
# The padding is faster-whisper's.
VAD_OPTIONS = VadOptions(min_silence_duration_ms=400, speech_pad_ms=400)
VAD_BLOCK = 600 * SAMPLE_RATE  # samples; the detection takes several times their memory
# The first speech, from which the language is detected: so much speech at least, up to a pause of so long.
FIRST_SPEECH = 3 * SAMPLE_RATE
FIRST_PAUSE = 1 * SAMPLE_RATE - 2 * int(0.4 * SAMPLE_RATE)  # between spans, which are padded

Span = tuple[int, int]  # start and end, in samples


def detect_speech(samples: Samples) -> list[Span]:
    """Where silero's model detects speech, with 0.4 s around it."""
    spans = []
    for start, end in split_at_quiet_points(samples, 0, len(samples), VAD_BLOCK):
        dithered = np.random.default_rng(0).standard_normal(end - start, np.float32)
        dithered *= DITHER
        dithered += samples[start:end]
        for span in get_speech_timestamps(dithered, VAD_OPTIONS):
            spans.append((start + span["start"], start + span["end"]))
    return spans


def split_at_quiet_points(samples: Samples, start: int, end: int, max_length: int) -> list[Span]:
    """`start` to `end` in spans of at most `max_length` samples, which touch each other.

    Of all ways to split, the one whose points are quietest, each relative to the loudness around it, and few:
    one more span costs as much as a point at a tenth of that loudness.
    """
    if end - start <= max_length:
        return [(start, end)]
    frame = SAMPLE_RATE // 50
    count = (end - start) // frame
    block = samples[start : start + count * frame].reshape(count, frame)
    loudness = np.sqrt(np.einsum("ij,ij->i", block, block) / frame)  # (frames,)
    # A pause is longer than the gap in a consonant: the mean over 0.3 s.
    smooth = np.convolve(np.pad(loudness, 7, mode="edge"), np.ones(15, np.float32) / 15, mode="valid")
    sums, frames = np.pad(loudness.cumsum(dtype=float), (1, 0)), np.arange(count)
    reach = max_length // frame
    low, high = np.maximum(frames - reach, 0), np.minimum(frames + reach, count)
    around = (sums[high] - sums[low]) / (high - low)
    cost = smooth / np.maximum(around, 1e-9) + 0.1
    # One candidate in each quarter of a second; for shorter spans, in each 120th of them.
    every = max(1, max_length // (120 * frame))
    groups = np.pad(cost, (0, -count % every), constant_values=np.inf).reshape(-1, every)
    candidates = np.arange(len(groups)) * every + groups.argmin(1)
    points = np.concatenate([[start], start + candidates * frame + frame // 2, [end]])
    costs = [0.0, *cost[candidates].tolist(), 0.0]
    # Dynamic programming: the cheapest way to each point, from a point at most `max_length` before it.
    earliest = np.searchsorted(points, points - max_length).tolist()
    best, previous = np.zeros(len(points)), [0] * len(points)
    for point in range(1, len(points)):
        previous[point] = earliest[point] + int(best[earliest[point] : point].argmin())
        best[point] = best[previous[point]] + costs[point]
    spans, point = [], len(points) - 1
    while point:
        spans.append((int(points[previous[point]]), int(points[point])))
        point = previous[point]
    return spans[::-1]


def first_speech_end(speech: Sequence[Span]) -> int:
    """The end of the first speech, in samples: the first pause of a second after three seconds of speech."""
    length = 0
    for (start, end), (following, _) in pairwise(speech):
        length += end - start
        if length >= FIRST_SPEECH and following - end >= FIRST_PAUSE:
            return end
    return speech[-1][1] if speech else 0


def chunk_audio(
    samples: Samples,
    speech: Sequence[Span] | None = None,
    *,
    max_seconds: float,
    first_speech_alone: bool = False,
) -> list[Span]:
    """Chunks of at most `max_seconds` to decode, in order, none overlapping the next.

    speech: as detected; neighbours come together while they fit. None: all of the audio is split.
    first_speech_alone: the first speech, from which the language is detected, has chunks of its own.
    Chunks without an audible sample are left out.
    """
    max_length = int(max_seconds * SAMPLE_RATE)
    first_end = first_speech_end(speech) if speech and first_speech_alone else 0
    chunks: list[Span] = []
    for span in [(0, len(samples))] if speech is None else speech:
        for start, end in split_at_quiet_points(samples, *span, max_length):
            fits = bool(chunks) and speech is not None and end - chunks[-1][0] <= max_length
            if fits and not chunks[-1][0] < first_end <= start:
                chunks[-1] = (chunks[-1][0], end)
            else:
                chunks.append((start, end))
    return [
        (start, end) for start, end in chunks if end > start and np.abs(samples[start:end]).max() > INAUDIBLE
    ]
