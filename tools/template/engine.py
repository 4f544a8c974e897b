"""Counts words, in batches.

A real engine has the same form: it imports torch at the top of this module, `load_engine` reads the weights
from the model's folder, and `_run` is one forward pass over what waits together. It takes plain values, so
that a benchmark can use it without a job.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from serving.dynamic_batching import DynamicBatcher


@dataclass(frozen=True)
class Counts:
    """longest: the first of the longest words; None without words."""

    words: int
    sentences: int
    longest: str | None


class Engine:
    """Counts the words of many texts at a time. max_batch_characters: in one batch."""

    def __init__(self, *, max_batch_characters: int) -> None:
        self._batcher: DynamicBatcher[tuple[str, int], Counts] = DynamicBatcher(
            self._run, budget=max_batch_characters, length=lambda item: len(item[0])
        )

    async def count(self, text: str, *, min_letters: int = 1) -> Counts:
        """The counts of `text`; words with fewer than `min_letters` letters are not counted."""
        (counts,) = await self._batcher.submit([(text, min_letters)])
        return counts

    def _run(self, batch: list[tuple[str, int]]) -> list[Counts]:
        """One batch, on the batcher's thread: the event loop goes on meanwhile."""
        results = []
        for text, min_letters in batch:
            words = [word for word in re.findall(r"[^\W\d_]+", text) if len(word) >= min_letters]
            sentences = re.findall(r"[^.!?]*\w[^.!?]*", text)
            results.append(Counts(len(words), len(sentences), max(words, key=len, default=None)))
        return results


def load_engine(*, max_batch_characters: int) -> Engine:
    """The engine, ready to run. A real one takes the model's folder, the device and the dtype too."""
    return Engine(max_batch_characters=max_batch_characters)
