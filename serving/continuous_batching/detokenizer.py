"""Token ids as text while they are generated, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Detokenizer:
    """Token ids to text as they come. What it gave, put together, is `decode` of all ids at once."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # from a little before what is still open: a decoder may look back
        self._start = 0  # index of the first open id
        self._context = ""  # text of the ids before it
        self._given = 0  # how many characters of the open ids' text are out

    def feed(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The text that is certain now. A character whose bytes are not all there waits, until `last`."""
        self._ids += ids
        text = self._decode(self._ids)[len(self._context) :]
        certain = text if last else text.rstrip("\ufffd")
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        if new and len(certain) == len(text):
            self._ids = self._ids[self._start :]
            self._start, self._context, self._given = len(self._ids), self._decode(self._ids), 0
        return new


class StopStrings:
    """Cuts a text before the stop string that ends first in it; gives out nothing that may be part of one.

    How the text is cut into pieces makes no difference to what is given out in all.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """What of the text so far may go out, and whether a stop string was found."""
        held = self._held + text
        ends = [(at + len(stop), -len(stop)) for stop in self._stops if (at := held.find(stop)) >= 0]
        if ends:
            end, minus_length = min(ends)
            self._held = ""
            return held[: end + minus_length], True
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def rest(self) -> str:
        """What was held back, when no more text comes."""
        return self._held


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the beginning of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
