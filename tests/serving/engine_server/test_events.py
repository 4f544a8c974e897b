"""serving.engine_server.events: bodies that arrive in any pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine_server.events import EventReader
from shared.errors import JobError

LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=12)
EVENT = st.lists(LINE.filter(bool), min_size=1, max_size=3)


def events_of(data: bytes, cuts: list[int]) -> list[str]:
    """The events of `data`, sent in pieces that end at `cuts`."""
    reader = EventReader()
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    parts = [reader.feed(data[start:end]) for start, end in itertools.pairwise(edges)]
    made = [part.decode() for part in [*parts, reader.end()] if part]  # no character is cut
    assert all(part.endswith("\n\n") for part in made)
    return [f"{event}\n\n" for part in made for event in part.removesuffix("\n\n").split("\n\n")]


@settings(deadline=None)
@given(
    events=st.lists(EVENT, max_size=6),
    newline=st.sampled_from(["\n", "\r\n"]),
    blanks=st.integers(1, 3),
    cuts=st.lists(st.integers(0, 500), max_size=20),
)
def test_any_cut_of_the_body_gives_the_same_events(
    events: list[list[str]], newline: str, blanks: int, cuts: list[int]
) -> None:
    data = "".join(newline.join(lines) + newline + newline * blanks for lines in events).encode()
    assert events_of(data, cuts) == ["\n".join(lines) + "\n\n" for lines in events]


def test_an_event_is_given_as_soon_as_it_is_whole_and_with_those_that_come_with_it() -> None:
    reader = EventReader()
    pieces = [b"data: 1\n", b"\n\n\ndata: 2\n\nda", b"ta: 3\n", b"\n"]
    given_ = [reader.feed(piece) for piece in pieces]
    assert given_ == [b"", b"data: 1\n\ndata: 2\n\n", b"", b"data: 3\n\n"]


@pytest.mark.parametrize(
    ("data", "events"), [(b"", []), (b"\n\n\n", []), (b"data: 1\n\ndata: 2\n", ["1", "2"])]
)
def test_an_end_between_lines_is_an_end(data: bytes, events: list[str]) -> None:
    assert events_of(data, []) == [f"data: {event}\n\n" for event in events]


@pytest.mark.parametrize("rest", [b"data: 2", b"data: \xe6\xbc", b"data: 2\n\ndata"])
def test_an_end_within_a_line_is_an_error(rest: bytes) -> None:
    with pytest.raises(JobError) as caught:
        events_of(b"data: 1\n\n" + rest, [9])
    assert (caught.value.code, caught.value.type) == ("stream_cut", "server_error")


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ('{"prompt_tokens":5,"total_tokens":7,"completion_tokens":2,"prompt_tokens_details":null}', (5, 2)),
        ('{"input_tokens": 5, "input_tokens_details": {"cached_tokens": 1}, "output_tokens": 2}', (5, 2)),
        ("null", None),
    ],
    ids=["chat", "responses", "none"],
)
def test_the_tokens_that_the_last_usage_states(usage: str, tokens: tuple[int, int] | None) -> None:
    reader = EventReader()
    first = '{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}' if tokens else "{}"
    reader.feed(f'data: {first}\n\ndata: {{"usage": {usage}}}\n\ndata: {{"usage":null}}\n\n'.encode())
    reader.feed(b"data: [DONE]\n\n")
    expected = dict(zip(("prompt_tokens", "completion_tokens"), tokens, strict=True)) if tokens else {}
    assert reader.tokens == expected
