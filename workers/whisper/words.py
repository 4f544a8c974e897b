"""Words and when they are spoken, by the rules of openai/whisper (timing.py) and faster-whisper.

Attention has nothing to follow in a pause, and so the alignment counts a pause as part of the word or the
punctuation beside it. Words beside the end of a sentence, or beside a pause of voice activity detection,
are cut to lengths that words have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from faster_whisper.transcribe import merge_punctuations

Seconds = tuple[float, float]  # start and end

SENTENCE_ENDS = ".。!！?？"
MAX_MEDIAN_S = 0.7
MIN_WORD_S = 0.05  # nobody speaks twenty words a second
SEGMENT_SLACK_S = 0.5  # a word that is so far outside of its segment is aligned badly

# Punctuation that belongs to the word after it, or before it. transformers' lists.
PREPENDED = "\"'“¡¿([{-"
APPENDED = "\"'.。,，!！?？:：”)]}、"


@dataclass
class TimedWord:
    """start, end: seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Lengths:
    """The median length of a window's words, and the longest that is credible beside a pause; seconds."""

    median: float

    @property
    def longest(self) -> float:
        return 2 * self.median


def typical_lengths(words: Sequence[TimedWord]) -> Lengths:
    lengths = sorted(word.end - word.start for word in words if word.end > word.start)
    middle = len(lengths) // 2
    if not lengths:
        return Lengths(0.0)
    median = lengths[middle] if len(lengths) % 2 else (lengths[middle - 1] + lengths[middle]) / 2
    return Lengths(min(MAX_MEDIAN_S, median))


def cut_at_sentence_ends(words: Sequence[TimedWord], lengths: Lengths) -> None:
    """Cut the punctuation that ends a sentence, and the word after it, where they are too long.

    words: of a window, punctuation not merged.
    """
    for previous, word in pairwise(words):
        if word.end - word.start > lengths.longest:
            if word.text in SENTENCE_ENDS:
                word.end = word.start + lengths.longest
            elif previous.text in SENTENCE_ENDS:
                word.start = word.end - lengths.longest


def join_punctuation(words: Sequence[TimedWord]) -> list[TimedWord]:
    """The words with the punctuation that belongs to them, whose time is not added to theirs."""
    alignment: list[dict[str, Any]] = [{"word": word.text, "tokens": [], "times": word} for word in words]
    merge_punctuations(alignment, PREPENDED, APPENDED)
    return [
        TimedWord(entry["word"].strip(), entry["times"].start, entry["times"].end)
        for entry in alignment
        if entry["word"].strip()
    ]


def fit_in_segment(
    words: Sequence[TimedWord], start: float, end: float, *, after: float, lengths: Lengths
) -> Seconds:
    """Fit the words of a segment to its times and return the times that it then has.

    The first words after a pause are cut. A word that leaves the segment by more than SEGMENT_SLACK_S ends
    with it; else the segment has the times of its words. after: end of the segment before.
    """
    first, last = words[0], words[-1]
    second = words[1] if len(words) > 1 else None
    longest, median = lengths.longest, lengths.median
    if first.end - after > 4 * median and (
        first.end - first.start > longest or (second and second.end - first.start > 2 * longest)
    ):
        if second and second.end - second.start > longest:
            first.end = second.start = second.end - longest
        first.start = max(first.start, first.end - longest)
    if first.start + SEGMENT_SLACK_S < start < first.end:
        first.start = max(first.start, min(first.end - median, start))
        start = min(start, first.start)
    else:
        start = first.start
    if last.start < end < last.end - SEGMENT_SLACK_S:
        last.end = min(last.end, max(last.start + median, end))
        end = max(end, last.end)
    else:
        end = last.end
    return start, end


def trim_to_speech(start: float, end: float, speech: Sequence[Seconds]) -> Seconds:
    """`start` to `end` without the pauses at either side; unchanged where there is no speech at all."""
    spans = [span for span in speech if span[0] < end and start < span[1]]
    return (max(start, spans[0][0]), min(end, spans[-1][1])) if spans else (start, end)


def cut_at_pauses(word: TimedWord, speech: Sequence[Seconds]) -> None:
    """Cut a word that covers a pause to the speech that it overlaps most."""
    overlaps = [(min(last, word.end) - max(first, word.start), first, last) for first, last in speech]
    if overlaps and (best := max(overlaps))[0] > 0:
        word.start, word.end = max(word.start, best[1]), min(word.end, best[2])
