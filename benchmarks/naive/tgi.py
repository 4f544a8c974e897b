"""What a first handler for TGI looks like: a connection and a wait for each job, one job at a time."""

from __future__ import annotations

import os
from typing import Any

import aiohttp
import runpod

TGI_URL = os.environ.get("TGI_URL", "http://localhost:80")


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    wanted = job["input"]
    temperature = wanted.get("temperature", 0.7)
    parameters = {
        "max_new_tokens": wanted.get("max_tokens", 512),
        "do_sample": temperature > 0,
        **({"temperature": temperature, "top_p": wanted.get("top_p", 0.95)} if temperature > 0 else {}),
    }
    payload = {"inputs": wanted.get("prompt", ""), "parameters": parameters}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{TGI_URL}/generate", json=payload) as response,
    ):
        made = await response.json()
    return {"response": made["generated_text"], "details": made.get("details", {})}


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
