"""A worker's handler without SDK and platform: jobs.py WORKER, its settings in the environment.

Reads JSON lists of inputs, one a line; answers each with the seconds that all of them took as jobs at once,
and the first vector of each.
"""

import asyncio
import json
import logging
import sys
import time
from typing import Any

from shared.logs import log
from tools.workers import load_handler

log.setLevel(logging.WARNING)
worker = load_handler(sys.argv[1])
worker.prepare()


async def serve(inputs: list[Any]) -> list[Any]:
    jobs = [{"id": str(number), "input": value} for number, value in enumerate(inputs)]
    return await asyncio.gather(*(worker.handler(job) for job in jobs))


for line in sys.stdin:
    inputs = json.loads(line)
    begin = time.perf_counter()
    answers = asyncio.run(serve(inputs))
    seconds = time.perf_counter() - begin
    vectors = [answer["embeddings"][0] for answer in answers]
    print(json.dumps({"seconds": seconds, "answers": vectors}), flush=True)
