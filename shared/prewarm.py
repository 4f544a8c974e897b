"""Cold start in the open: one log line a phase, and the worker's own requests before the first job."""

from __future__ import annotations

import asyncio
import inspect
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shared.errors import StartError
from shared.logs import log
from shared.settings import WorkerSettings
from shared.volume import ModelPath, resolve_model


def _process_start() -> float:
    """When this process started, on time.monotonic()'s clock (Linux counts both from boot)."""
    try:
        with open("/proc/self/stat") as stat:
            ticks = int(stat.read().rpartition(")")[2].split()[19])
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return time.monotonic()


@dataclass
class Phase:
    """A phase that is running. Set `bytes` to what it read or took, if that says something."""

    bytes: int | None = None


def log_phase(name: str, seconds: float, size: int | None = None) -> None:
    """Log `phase=<name> seconds=<s> [bytes=<n>]`."""
    log.info("phase=%s seconds=%.3f%s", name, seconds, "" if size is None else f" bytes={size}")


@contextmanager
def phase(name: str) -> Iterator[Phase]:
    """Time a phase of the start and log it when it ends well."""
    begin = time.monotonic()
    current = Phase()
    yield current
    log_phase(name, time.monotonic() - begin, current.bytes)


def resolve(settings: WorkerSettings, name: str, *, extra: Sequence[str] = ()) -> ModelPath:
    """The phase `resolve`: the folder of the model `name`; see `shared.volume.resolve_model`."""
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    with phase("resolve") as current:
        model = resolve_model(name, settings.model_revision, token=token, extra=extra)
        current.bytes = model.bytes
    return model


def log_ready() -> None:
    """Log the phase `ready`: seconds since the process began."""
    log_phase("ready", time.monotonic() - _process_start())


def run(handler: Callable[[dict[str, Any]], Any], inputs: Sequence[dict[str, Any]]) -> None:
    """Send `inputs` through `handler` one after another, as jobs, and throw the answers away.

    Raises StartError(code="prewarm_failed") when one is answered with an error: a worker that fails on its
    own small request would fail on every job.
    """

    async def run_one(job: dict[str, Any]) -> None:
        answers = [part async for part in handler(job)] if stream else [await handler(job)]
        for answer in answers:
            if isinstance(answer, dict) and "error" in answer:
                raise StartError(f"The prewarm request failed: {answer['error']}", code="prewarm_failed")

    async def run_all() -> None:
        for number, payload in enumerate(inputs):
            await run_one({"id": f"prewarm-{number}", "input": payload})

    stream = inspect.isasyncgenfunction(handler)
    with phase("prewarm"):
        asyncio.run(run_all())
