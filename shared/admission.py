"""Which requests an HTTP worker takes: by its state, by what runs and by what waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from shared.errors import JobError, StartError


class Admission:
    """At most `running` requests run and `waiting` wait; any other is refused at once.

    state: loading; ready; failed: the start cannot succeed, for `cause`; draining; dead: the engine has died.
    """

    def __init__(self, running: int = 1, waiting: int = 0) -> None:
        self.state: Literal["loading", "ready", "failed", "draining", "dead"] = "loading"
        self.cause: StartError | None = None
        self._running, self._max_waiting = running, waiting
        self._slots = asyncio.Semaphore(running)
        self.in_flight = self.waiting = 0
        self.idle = asyncio.Event()  # nothing runs or waits
        self.idle.set()
        self.closed = asyncio.Event()  # draining or dead

    def open(self, running: int, waiting: int) -> None:
        """The model is ready; the limits are known with its settings."""
        self._running, self._max_waiting = running, waiting
        self._slots = asyncio.Semaphore(running)
        self.state = "ready"

    def close(self, state: Literal["draining", "dead"]) -> None:
        """Take no new request. Safe in a signal handler of the loop's thread."""
        self.state = state
        self.closed.set()

    def check(self) -> None:
        """Raise JobError for a request that cannot be taken now."""
        if self.state == "loading":
            raise JobError("The model is loading. Try again soon.", code="not_ready", type="server_error")
        if self.state == "failed" and self.cause is not None:
            raise JobError(self.cause.message, code=self.cause.code, type="unavailable")
        if self.state != "ready":
            message = f"This worker is {self.state} and takes no new request. Try again: another one will."
            raise JobError(message, code="not_ready", type="server_error")
        if self._slots.locked() and self.waiting >= self._max_waiting:
            raise JobError(
                f"{self._running} requests run and {self.waiting} wait, which is the limit of this worker. "
                "Try again later, or raise MAX_CONCURRENCY or MAX_WAITING.",
                code="overloaded",
                type="server_error",
            )

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for a slot, first come first served, and hold it."""
        self.check()
        self.waiting += 1
        self.idle.clear()
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
            self._note_idle()
        self.in_flight += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            self._slots.release()
            self._note_idle()

    def _note_idle(self) -> None:
        if not self.in_flight and not self.waiting:
            self.idle.set()
