"""How the tokens of a window become segments."""

import pytest

from workers.whisper.engine import repeats_itself
from workers.whisper.segments import compression_ratio, split_segments

T = 1000  # the first timestamp token; tokens below it are text


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
        # A pair at the end: the rest of the window has speech that is not in the result.
        ([at(0), 1, at(2), at(2)], [(0, 2, 1)], 2.0),
        ([at(0), 1, at(2), at(3), 2, at(5), at(5)], [(0, 2, 1), (3, 5, 1)], 5.0),
        # A segment without an end: decoded again from where it starts.
        ([at(0), 1, at(2), at(3), 2, 2], [(0, 2, 1)], 2.0),
        # A time after the end of the audio is its end.
        ([at(0), 1, at(29)], [(0, 20, 1)], 20.0),
    ],
)
def test_segments_are_split_as_in_openai_whisper(
    tokens: list[int], expected: list[tuple[float, float, int]], covered: float
) -> None:
    segments, end = split_segments(tokens, T, 20.0)
    shown = [(start, end, sum(token < T for token in made)) for start, end, made in segments]
    assert (shown, end) == (expected, covered)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([T, 1, 2, 3, 4, 5, T + 9, T + 9, 1, 2, 3, 4, 5], True),
        ([T, 1, 2, 3, 4, 5, T + 9, T + 9, 6, T + 20, T + 20, 1, 2, 3, 4, 5, T + 30], True),
        ([T, 1, 2, T + 9, T + 9, 1, 2, T + 20], False),  # so little may be spoken twice
        ([T, 1, 2, 3, 4, 5, T + 9, T + 9, 1, 2, 3, 4, 6], False),
        ([], False),
    ],
)
def test_repeated_segments_are_noticed(tokens: list[int], expected: bool) -> None:
    assert repeats_itself(tokens, T) == expected


def test_the_compression_ratio_of_no_text_is_zero() -> None:
    assert compression_ratio("") == 0
    assert compression_ratio("hello " * 40) > 2.4 > compression_ratio("hello, how are you?")
