"""Progress reports of a long job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from .chunking import Span
from .engine import SAMPLE_RATE

INTERVAL_S = 5.0
GRACE_S = 2.0  # after which a report has arrived

OnProgress = Callable[[float, float], None]  # receives the seconds decoded, and those to decode in all


class Progress:
    """Reports how much of a long job is decoded, at most every INTERVAL_S.

    An update that arrived after the result would set the job back to running. So none is sent when fewer than
    `at_least` chunks are left, and `settled` waits until the last one must have arrived.
    """

    def __init__(self, chunks: Sequence[Span], send: OnProgress | None, *, at_least: int) -> None:
        self._send, self._left, self._at_least = send, len(chunks), at_least
        self._total_s = sum(end - start for start, end in chunks) / SAMPLE_RATE
        self._done_s = 0.0
        self._last_update = time.monotonic()
        self._sent = False

    def chunk_done(self, chunk: Span) -> None:
        self._left -= 1
        self._done_s += (chunk[1] - chunk[0]) / SAMPLE_RATE
        if self._send is None or self._left < self._at_least:
            return
        if time.monotonic() - self._last_update >= INTERVAL_S:
            self._last_update, self._sent = time.monotonic(), True
            self._send(self._done_s, self._total_s)

    async def settled(self) -> None:
        if self._sent:
            await asyncio.sleep(max(0.0, self._last_update + GRACE_S - time.monotonic()))
