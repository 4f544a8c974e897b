"""A worker in this process, and many of its jobs at once: the handler without SDK and platform."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from benchmarks.gpu.models import CASES
from benchmarks.gpu.report import Part

_ids = itertools.count()
NAMES = {
    torch_name: torch_name.removeprefix("torch.")
    for torch_name in ("torch.bfloat16", "torch.float16", "torch.float32")
}


def environment(part: Part, **more: str) -> dict[str, str]:
    """The settings of the worker with the part's model."""
    return {
        "MODEL_NAME": str(part.folder), "HF_HUB_OFFLINE": "1", "DEVICE": part.device.type,
        "DTYPE": str(part.dtype).removeprefix("torch."), "MAX_CONCURRENCY": "64",
        **CASES[part.worker].env, **more,
    }  # fmt: skip


def load(part: Part, **more: str) -> ModuleType:
    """The worker's handler module, its model loaded."""
    from tools.workers import load_handler

    os.environ.update(environment(part, **more))
    worker = load_handler(part.worker)
    worker.prepare()
    return worker


def failure(output: Any) -> str | None:
    """The message of an answer that is an error."""
    if isinstance(output, dict) and "error" in output:
        return str(json.loads(output["error"])["message"])
    return None


async def ask(worker: ModuleType, value: dict[str, Any]) -> Any:
    return await worker.handler({"id": f"check-{next(_ids)}", "input": value})


async def together(worker: ModuleType, values: Sequence[dict[str, Any]]) -> tuple[float, list[Any]]:
    """Seconds of all of them at once, and their answers. Raises RuntimeError for an error among them."""
    begin = time.perf_counter()
    outputs = await asyncio.gather(*(ask(worker, value) for value in values))
    took = time.perf_counter() - begin
    for output in outputs:
        if message := failure(output):
            raise RuntimeError(message)
    return took, outputs


async def first_part(worker: ModuleType, value: dict[str, Any]) -> float:
    """Seconds to the first part of a streamed answer."""
    begin = time.perf_counter()
    stream = worker.handler.stream({"id": f"check-{next(_ids)}", "input": value})
    try:
        await anext(stream)
        return time.perf_counter() - begin
    finally:
        await stream.aclose()
