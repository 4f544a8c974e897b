"""Which requests an HTTP worker takes: by its state, by what runs and by what waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Literal

from shared.errors import JobError, StartError


class Admission:
    """At most `running` requests run and `waiting` wait or arrive; any other is refused at once.

    state: loading; ready; failed: the start cannot succeed; draining; dead: the engine has died.
    cause: of `failed` and `dead`, where it is known.
    """

    def __init__(self) -> None:
        self.state: Literal["loading", "ready", "failed", "draining", "dead"] = "loading"
        self.cause: StartError | JobError | None = None
        self.in_flight = 0
        self.idle = asyncio.Event()  # no request is admitted
        self.idle.set()
        self.closed = asyncio.Event()  # draining or dead
        self._admitted = 0

    @property
    def waiting(self) -> int:
        """Requests that are admitted and have no slot: their bodies arrive, or they wait for one."""
        return self._admitted - self.in_flight

    def open(self, running: int, waiting: int) -> None:
        """The model is ready; the limits are known with its settings."""
        self._running, self._max_waiting = running, waiting
        self._slots = asyncio.Semaphore(running)
        if not self.closed.is_set():
            self.state = "ready"

    def fail(self, cause: StartError) -> None:
        """The start cannot succeed: each request is answered with the cause."""
        self.cause, self.state = cause, "failed"

    def close(self, state: Literal["draining", "dead"], cause: JobError | None = None) -> None:
        """Take no new request. Safe in a signal handler of the loop's thread."""
        self.state, self.cause = state, cause or self.cause
        self.closed.set()

    def check(self) -> None:
        """Raise JobError in a state that takes no request."""
        if self.state == "loading":
            raise JobError("The model is loading. Try again soon.", code="not_ready", type="server_error")
        if self.cause is not None and self.state in ("failed", "dead"):
            kind = "unavailable" if self.state == "failed" else "server_error"
            raise JobError(self.cause.message, code=self.cause.code, type=kind)
        if self.state != "ready":
            message = f"This worker is {self.state} and takes no new request. Try again: another one will."
            raise JobError(message, code="not_ready", type="server_error")

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count a request from the first byte of its body to the last of its answer.

        Raises JobError(code="overloaded") beyond the limits. So uploads are bounded too, and a worker that
        drains waits for them.
        """
        self.check()
        if self._admitted >= self._running + self._max_waiting:
            raise JobError(
                f"{self.in_flight} requests run and {self.waiting} wait, which is the limit of this worker. "
                "Try again later, or raise MAX_CONCURRENCY or MAX_WAITING.",
                code="overloaded",
                type="server_error",
            )
        self._admitted += 1
        self.idle.clear()
        try:
            yield
        finally:
            self._admitted -= 1
            if not self._admitted:
                self.idle.set()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """For an admitted request: wait for a slot, first come first served, and hold it."""
        async with self._slots:
            self.in_flight += 1
            try:
                yield
            finally:
                self.in_flight -= 1
