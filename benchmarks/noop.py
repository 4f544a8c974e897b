"""A handler that does nothing: what is left is the SDK's own time and the platform's."""

from __future__ import annotations

from typing import Any


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    return {"count": 1}


if __name__ == "__main__":
    import runpod

    runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda _: 256})
