"""Answers with its input, after `sleep` seconds, and says which worker it was."""

import asyncio
import os

import runpod


async def handler(job):
    await asyncio.sleep(job["input"].get("sleep", 0))
    return {"echo": job["input"], "worker": os.environ["RUNPOD_POD_ID"]}


if __name__ == "__main__":
    concurrency = int(os.environ.get("CONCURRENCY", "1"))
    runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda _: concurrency})
