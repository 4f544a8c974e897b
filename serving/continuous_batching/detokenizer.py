"""Token ids as text while they are generated, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What decoders give for bytes that are not a character, or not yet."""

MAX_CONTEXT = 8  # tokens of the prompt


class Detokenizer:
    """Token ids to text as they come. The parts put together are `decode` of all ids at once.

    prompt_ids: the ids before them. Many decoders strip the space before the first token of a text, so that
    the answer's first token needs some of the prompt: the text is `decode` of both, less the prompt's.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        # Context, whose text is out, and open ids: a decoder may look back.
        self._ids, self._context = _context(decode, prompt_ids)
        self._open = len(self._ids)  # index of the first open id
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


def _context(decode: Callable[[list[int]], str], prompt_ids: Sequence[int]) -> tuple[list[int], str]:
    """The shortest end of a prompt that has a text, and that text; nothing where none has."""
    for size in range(1, min(len(prompt_ids), MAX_CONTEXT) + 1):
        ids = list(prompt_ids[-size:])
        text = decode(ids)
        if text and not text.endswith(REPLACEMENT):
            return ids, text
    return [], ""


class StopStrings:
    """Cuts a text before the stop string that ends first in it, and emits nothing that may be part of one.

    How the text is cut into parts makes no difference to what is emitted in all.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._pending = ""
        self._hidden: list[tuple[int, int]] = []  # stretches of it that are not emitted

    def feed(self, text: str, *, hidden: bool = False) -> tuple[str, bool]:
        """The text that may be emitted now, and whether a stop string has ended it.

        hidden: `text` may be part of a stop string, and is not emitted.
        """
        pending = self._pending + text
        if hidden:
            self._hidden.append((len(self._pending), len(pending)))
        ends = [(at + len(stop), -len(stop)) for stop in self._stops if (at := pending.find(stop)) >= 0]
        if ends:
            end, minus_length = min(ends)  # the first to end; of two, the longer
            self._pending = ""
            return self._visible(pending[: end + minus_length]), True
        keep = max((_overlap(pending, stop) for stop in self._stops), default=0)
        size = len(pending) - keep
        self._pending = pending[size:]
        visible = self._visible(pending[:size])
        self._hidden = [(max(0, start - size), end - size) for start, end in self._hidden if end > size]
        return visible, False

    def rest(self) -> str:
        """The text that waits for the rest of a stop string, when no more text comes."""
        return self._visible(self._pending)

    def _visible(self, text: str) -> str:
        for start, end in reversed(self._hidden):
            text = text[:start] + text[end:]
        return text


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the beginning of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
