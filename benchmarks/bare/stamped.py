"""The worker STAMPED, unchanged but for a note in the file STAMPS: when each job came in, its first part, its
end.

The SDK looks for jobs ten times a second, so a job waits up to 100 ms for a handler that does nothing: what
the worker itself adds is measured from where the SDK calls it. Times are of the monotonic clock, which all
processes of a machine share.
"""

import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from tools.workers import load_handler

worker = load_handler(os.environ["STAMPED"])
inner = worker.handler
stamps = open(os.environ["STAMPS"], "a", buffering=1)  # noqa: SIM115 (as long as the worker lives)


async def handler(job: dict[str, Any]) -> AsyncIterator[Any]:
    times = {"begun": time.monotonic()}
    async for part in inner(job):
        times.setdefault("first", time.monotonic())
        yield part
    stamps.write(json.dumps({"id": job["id"], **times, "done": time.monotonic()}) + "\n")


if __name__ == "__main__":
    worker.handler = handler
    worker.main()
