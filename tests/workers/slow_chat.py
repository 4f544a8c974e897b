"""`python -m tests.workers.slow_chat <worker>`: a worker that generates text, 50 ms for each token."""

from __future__ import annotations

import runpy
import sys
import time
from typing import Any

from serving.continuous_batching.generator import Generator

if __name__ == "__main__":
    decode = Generator.decode

    def slow(generator: Generator, batch: Any) -> Any:
        time.sleep(0.05)
        return decode(generator, batch)

    Generator.decode = slow  # type: ignore[method-assign]
    runpy.run_module(f"workers.{sys.argv[1]}.handler", run_name="__main__", alter_sys=True)
