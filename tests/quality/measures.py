"""What a transcript differs by from what was said."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tests.quality.speech import Recording, SpokenWord
from tests.quality.transcribers import Recognised, Timed


@dataclass(frozen=True)
class Errors:
    """words: wrong ones, as a part of those that were said. The others: seconds, of words recognised rightly.

    word_start, segment_start: the mean. invented: the length of segments where nobody speaks.
    """

    words: float
    word_start: float
    segment_start: float
    invented: float


@cache
def normalizer(language: str) -> Any:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    return EnglishTextNormalizer({}) if language == "en" else BasicTextNormalizer()


def normalized(words: list[SpokenWord] | list[Timed], language: str) -> list[tuple[str, float | None]]:
    """Each word, as openai/whisper's evaluation writes it, with its start. One may become two: I'm, I am."""
    return [(part, word.start) for word in words for part in normalizer(language)(word.text).split()]


def align(said: list[str], found: list[str]) -> tuple[int, list[tuple[int, int]]]:
    """The edit distance, and which words of `said` are which of `found`."""
    costs = np.zeros((len(said) + 1, len(found) + 1), int)
    costs[:, 0], costs[0] = range(len(said) + 1), range(len(found) + 1)
    for i, word in enumerate(said, 1):
        for j, other in enumerate(found, 1):
            change = costs[i - 1, j - 1] + (word != other)
            costs[i, j] = min(change, costs[i - 1, j] + 1, costs[i, j - 1] + 1)
    pairs, i, j = [], len(said), len(found)
    while i and j:
        if said[i - 1] == found[j - 1] and costs[i, j] == costs[i - 1, j - 1]:
            pairs.append((i - 1, j - 1))
            i, j = i - 1, j - 1
        elif costs[i, j] == costs[i - 1, j - 1] + 1:
            i, j = i - 1, j - 1
        elif costs[i, j] == costs[i - 1, j] + 1:
            i -= 1
        else:
            j -= 1
    return int(costs[-1, -1]), pairs[::-1]


def errors(recording: Recording, recognised: Recognised) -> Errors:
    if not recording.words:
        invented = sum(segment.end - segment.start for segment in recognised.segments)
        return Errors(0.0, 0.0, 0.0, invented)
    language = recording.language
    said, found = normalized(recording.words, language), normalized(recognised.words, language)
    distance, pairs = align([text for text, _ in said], [text for text, _ in found])
    word_starts = [
        abs(found[j][1] - said[i][1])  # type: ignore[operator]
        for i, j in pairs
        if said[i][1] is not None
    ]
    # Of a segment, its first word, where that is recognised and known.
    firsts: list[tuple[str, float | None]] = []
    for segment in recognised.segments:
        parts = normalizer(language)(segment.text).split()
        firsts += [(part, None if i else segment.start) for i, part in enumerate(parts)]
    _, pairs = align([text for text, _ in said], [text for text, _ in firsts])
    segment_starts = [
        abs(firsts[j][1] - said[i][1])  # type: ignore[operator]
        for i, j in pairs
        if said[i][1] is not None and firsts[j][1] is not None
    ]
    return Errors(distance / len(said), mean(word_starts), mean(segment_starts), 0.0)


def mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0
