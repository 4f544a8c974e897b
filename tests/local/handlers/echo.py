"""Does what its input says: `progress`, `sleep`, `gate`, `block`, `big`, `raise`, `exit`, `return` (one of
RETURNS).
With `gate`, the path of a file, it ends when that is there.

Notes its jobs in the file NOTES: `<event> <job's id> <worker's id>`.
"""

import asyncio
import os
import time

import runpod

WORKER = os.environ["RUNPOD_POD_ID"]
RETURNS = {
    "nan": {"x": float("nan")},
    "bytes": {"x": b"bytes"},
    "dict_error": {"error": {"message": "lost"}},
    "error": {"error": "no luck"},
    "refresh": {"refresh_worker": True, "worker": WORKER},
}


def note(event, job):
    if path := os.environ.get("NOTES"):
        with open(path, "a") as notes:
            notes.write(f"{event} {job['id']} {WORKER}\n")


async def handler(job):
    order = job["input"]
    note("start", job)
    if order.get("exit"):
        os._exit(1)
    if "progress" in order:
        runpod.serverless.progress_update(job, order["progress"])
    time.sleep(order.get("block", 0))  # noqa: ASYNC251 (it is to block)
    try:
        await asyncio.sleep(order.get("sleep", 0))
        while "gate" in order and not os.path.exists(order["gate"]):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    except asyncio.CancelledError:
        note("cancelled", job)
        raise
    note("end", job)
    if "raise" in order:
        raise RuntimeError(order["raise"])
    if "return" in order:
        return dict(RETURNS[order["return"]])
    return {"echo": order, "worker": WORKER, "big": "x" * order.get("big", 0)}


if __name__ == "__main__":
    concurrency = int(os.environ.get("CONCURRENCY", "1"))
    runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda _: concurrency})
