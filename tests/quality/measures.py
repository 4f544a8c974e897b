"""How a transcript differs from its reference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tests.quality.speech import Recording, SpokenWord
from tests.quality.transcribers import Recognised, Timed


@dataclass(frozen=True)
class Errors:
    """words: the word error rate. The others: seconds, of words recognised rightly.

    word_start, segment_start: the mean; not a number where no word is right. hallucinated: the length of
    segments where nobody speaks.
    """

    words: float
    word_start: float
    segment_start: float
    hallucinated: float


@cache
def normalizer(language: str) -> Any:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    return EnglishTextNormalizer({}) if language == "en" else BasicTextNormalizer()


def normalized(words: list[SpokenWord] | list[Timed], language: str) -> list[tuple[str, float | None]]:
    """Each word, as openai/whisper's evaluation writes it, with its start. One may become two: I'm, I am."""
    return [(part, word.start) for word in words for part in normalizer(language)(word.text).split()]


def align(reference: list[str], hypothesis: list[str]) -> tuple[int, list[tuple[int, int]]]:
    """The edit distance, and which words of `reference` are which of `hypothesis`."""
    costs = np.zeros((len(reference) + 1, len(hypothesis) + 1), int)
    costs[:, 0], costs[0] = range(len(reference) + 1), range(len(hypothesis) + 1)
    for i, word in enumerate(reference, 1):
        for j, other in enumerate(hypothesis, 1):
            change = costs[i - 1, j - 1] + (word != other)
            costs[i, j] = min(change, costs[i - 1, j] + 1, costs[i, j - 1] + 1)
    pairs, i, j = [], len(reference), len(hypothesis)
    while i and j:
        if reference[i - 1] == hypothesis[j - 1] and costs[i, j] == costs[i - 1, j - 1]:
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
        hallucinated = sum(segment.end - segment.start for segment in recognised.segments)
        return Errors(0.0, 0.0, 0.0, hallucinated)
    language = recording.language
    reference, hypothesis = normalized(recording.words, language), normalized(recognised.words, language)
    distance, pairs = align([text for text, _ in reference], [text for text, _ in hypothesis])
    word_starts = [
        abs(hypothesis[j][1] - reference[i][1])  # type: ignore[operator]
        for i, j in pairs
        if reference[i][1] is not None
    ]
    # Of a segment, its first word, where that is recognised and known.
    firsts: list[tuple[str, float | None]] = []
    for segment in recognised.segments:
        parts = normalizer(language)(segment.text).split()
        firsts += [(part, None if i else segment.start) for i, part in enumerate(parts)]
    _, pairs = align([text for text, _ in reference], [text for text, _ in firsts])
    segment_starts = [
        abs(firsts[j][1] - reference[i][1])  # type: ignore[operator]
        for i, j in pairs
        if reference[i][1] is not None and firsts[j][1] is not None
    ]
    return Errors(distance / len(reference), mean(word_starts), mean(segment_starts), 0.0)


def mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
