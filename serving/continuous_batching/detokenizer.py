"""Token ids as text while they are generated, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What decoders give for bytes that are not a character, or not yet."""


class Detokenizer:
    """Token ids to text as they come. The parts put together are `decode` of all ids at once."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # context, whose text is out, and open ids: a decoder may look back
        self._open = 0  # index of the first open id
        self._context = ""  # text of the ids before it
        self._emitted = 0  # characters of the open ids' text that are out

    def feed(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The text that is certain now. A character whose bytes are incomplete waits, until `last`."""
        self._ids += ids
        text = self._decode(self._ids)[len(self._context) :]
        certain = text if last else text.rstrip(REPLACEMENT)
        new = certain[self._emitted :]
        self._emitted = max(self._emitted, len(certain))
        if new and len(certain) == len(text):
            self._ids = self._ids[self._open :]
            self._open, self._context, self._emitted = len(self._ids), self._decode(self._ids), 0
        return new


class StopStrings:
    """Cuts a text before the stop string that ends first in it, and emits nothing that may be part of one.

    How the text is cut into parts makes no difference to what is emitted in all.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._pending = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that may be emitted now, and whether a stop string has ended it."""
        pending = self._pending + text
        ends = [(at + len(stop), -len(stop)) for stop in self._stops if (at := pending.find(stop)) >= 0]
        if ends:
            end, minus_length = min(ends)  # the first to end; of two, the longer
            self._pending = ""
            return pending[: end + minus_length], True
        keep = max((_overlap(pending, stop) for stop in self._stops), default=0)
        self._pending = pending[len(pending) - keep :]
        return pending[: len(pending) - keep], False

    def rest(self) -> str:
        """The text that waits for the rest of a stop string, when no more text comes."""
        return self._pending


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the beginning of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
