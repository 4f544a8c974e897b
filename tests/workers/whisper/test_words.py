"""Word times where attention has nothing to follow: beside pauses and punctuation."""

import pytest

from workers.whisper.words import (
    TimedWord,
    cut_at_pauses,
    cut_at_sentence_ends,
    fit_in_segment,
    join_punctuation,
    trim_to_speech,
    typical_lengths,
)

Times = list[tuple[str, float, float]]


def words(times: Times) -> list[TimedWord]:
    return [TimedWord(*word) for word in times]


def shown(timed: list[TimedWord]) -> Times:
    return [(word.text.strip(), round(word.start, 3), round(word.end, 3)) for word in timed]


USUAL: Times = [(" of", 3.0, 3.3), (" bread", 3.3, 3.6)]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        # A pause falls on the end of the sentence, or on the word after it.
        (
            [*USUAL, (".", 3.6, 7.4), (" The", 7.4, 19.6), (" train", 19.6, 19.9)],
            [("of", 3.0, 3.3), ("bread.", 3.3, 3.6), ("The", 19.0, 19.6), ("train", 19.6, 19.9)],
        ),
        # The time of punctuation is not added to the word.
        ([("a", 3.3, 3.6), (",", 3.6, 4.1), (" b", 4.1, 4.4)], [("a,", 3.3, 3.6), ("b", 4.1, 4.4)]),
        ([(' "', 1.0, 2.0), ("Yes", 2.0, 2.3), ('"', 2.3, 2.9)], [('"Yes"', 2.0, 2.3)]),
    ],
)  # fmt: skip
def test_pauses_and_punctuation_do_not_make_words_longer(times: Times, expected: Times) -> None:
    timed = words(times)
    cut_at_sentence_ends(timed, typical_lengths(timed))
    assert shown(join_punctuation(timed)) == expected


@pytest.mark.parametrize(
    ("lengths", "median"), [([], 0), ([0, 0], 0), ([0.2, 0, 0.4], 0.3), ([2, 3, 9], 0.7)]
)
def test_the_typical_length_is_a_median_with_a_limit(lengths: list[float], median: float) -> None:
    typical = typical_lengths([TimedWord("a", 1, 1 + length) for length in lengths])
    assert (typical.median, typical.longest) == (pytest.approx(median), pytest.approx(2 * median))


@pytest.mark.parametrize(
    ("times", "segment", "after", "expected", "fitted"),
    [
        # The first word begins long before its segment.
        ([("a", 0, 7), ("b", 7, 7.3)], (6.6, 7.5), 6.5, [("a", 6.6, 7), ("b", 7, 7.3)], (6.6, 7.3)),
        # The last word ends long after its segment.
        ([("a", 5, 5.3), ("b", 5.3, 9)], (5, 5.8), 5, [("a", 5, 5.3), ("b", 5.3, 5.8)], (5, 5.8)),
        # Else the segment has the times of its words.
        ([("a", 5.2, 5.5), ("b", 5.5, 5.7)], (5, 6), 5, [("a", 5.2, 5.5), ("b", 5.5, 5.7)], (5.2, 5.7)),
        # After a pause a word is cut, and the second one may be the one that is too long.
        ([("a", 1, 9), ("b", 9, 9.3)], (1, 9), 0, [("a", 8.4, 9), ("b", 9, 9.3)], (8.4, 9.3)),
        ([("a", 5, 5.2), ("b", 5.2, 9)], (5, 9), 0, [("a", 7.8, 8.4), ("b", 8.4, 9)], (7.8, 9)),
    ],
)
def test_words_stay_in_their_segment(
    times: Times, segment: tuple[float, float], after: float, expected: Times, fitted: tuple[float, float]
) -> None:
    timed = words(times)
    lengths = typical_lengths(words([("x", 0, 0.3)]))
    assert fit_in_segment(timed, *segment, after=after, lengths=lengths) == pytest.approx(fitted)
    assert shown(timed) == expected


def test_detected_pauses_are_no_part_of_words_and_segments() -> None:
    speech = [(1.0, 4.0), (19.0, 22.0)]
    timed = words([("bread", 3.6, 7.4), ("the", 3.9, 19.6), ("in", 8.0, 9.0)])
    for word in timed:
        cut_at_pauses(word, speech)
    assert shown(timed) == [("bread", 3.6, 4.0), ("the", 19.0, 19.6), ("in", 8.0, 9.0)]
    assert trim_to_speech(0.0, 7.0, speech) == (1.0, 4.0)
    assert trim_to_speech(3.0, 30.0, speech) == (3.0, 22.0)
    assert trim_to_speech(5.0, 6.0, speech) == (5.0, 6.0)
