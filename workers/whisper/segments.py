"""Reads the result of a window: its segments, and whether to trust it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from .engine import TOKENS_PER_SECOND, DecodeResult

# Thresholds of openai/whisper (transcribe.py).
COMPRESSION_RATIO_THRESHOLD = 2.4
LOGPROB_THRESHOLD = -1.0
NO_SPEECH_THRESHOLD = 0.6

TokenSegment = tuple[float, float, list[int]]  # start and end in seconds of the window, and its tokens


def is_silence(result: DecodeResult) -> bool:
    """Whether nobody speaks in a window, by openai/whisper's measure."""
    return result.no_speech_prob > NO_SPEECH_THRESHOLD and result.avg_logprob < LOGPROB_THRESHOLD


def split_segments(
    tokens: Sequence[int], timestamp_begin: int, seconds: float
) -> tuple[list[TokenSegment], float]:
    """The segments of a window's result, and how many of the window's `seconds` they cover.

    As in openai/whisper: a segment without an end at the end of the result is left out, to be decoded again
    from its start.
    """
    is_time = [token >= timestamp_begin for token in tokens]

    def time_at(index: int) -> float:
        return min(seconds, round((tokens[index] - timestamp_begin) / TOKENS_PER_SECOND, 2))

    # Between two timestamps one segment ends and the next starts.
    ends = [index for index in range(1, len(tokens)) if is_time[index - 1] and is_time[index]]
    is_complete = is_time[-2:] == [False, True]
    if not ends:
        last = next((time_at(index) for index in reversed(range(len(tokens))) if is_time[index]), 0.0)
        first = time_at(0) if tokens and is_time[0] else 0.0
        return [(first, last if last > first else seconds, list(tokens))] if tokens else [], seconds
    if is_complete:
        ends.append(len(tokens))
    segments = [
        (time_at(start), time_at(end - 1), list(tokens[start:end]))
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
    return segments, seconds if is_complete else time_at(ends[-1] - 1)


def needs_fallback(result: DecodeResult, text: str) -> bool:
    """Whether a result is improbable or repetitive: a higher temperature may give a better one."""
    repetitive = compression_ratio(text) > COMPRESSION_RATIO_THRESHOLD
    return not is_silence(result) and (result.avg_logprob < LOGPROB_THRESHOLD or repetitive)


def likeliest(results: Sequence[tuple[DecodeResult, str]]) -> DecodeResult:
    """The result, of those with their texts, that has the highest probability and does not repeat itself."""
    candidates = [
        result for result, text in results if compression_ratio(text) <= COMPRESSION_RATIO_THRESHOLD
    ] or [result for result, _ in results]
    return max(candidates, key=lambda result: result.avg_logprob)


def compression_ratio(text: str) -> float:
    """Length of the text by its length under zlib: text that repeats itself has more than 2.4."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0
