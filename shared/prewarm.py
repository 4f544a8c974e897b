"""Small requests that a worker sends to itself before its first job."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from shared.errors import StartError
from shared.jobs import JobHandler
from shared.startup import phase


def run(handler: JobHandler, inputs: Sequence[dict[str, Any]]) -> None:
    """Send `inputs` through `handler` as jobs, one after another, and discard the answers.

    Raises StartError(code="prewarm_failed") at the first error: a worker that fails on its own small request
    would fail on every job.
    """

    async def run_all() -> None:
        for number, payload in enumerate(inputs):
            answer = await handler({"id": f"prewarm-{number}", "input": payload})
            if isinstance(answer, dict) and "error" in answer:
                raise StartError(f"The prewarm request failed: {answer['error']}", code="prewarm_failed")

    with phase("prewarm"):
        asyncio.run(run_all())
