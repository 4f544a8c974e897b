"""workers/whisper, whose engine and clock a test moves, by files in the folder GATE.

`batches`: how many batches may run; `clock`: what time it is to Progress, in seconds. The worker writes how
many batches it has begun to `begun`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.workers import load_handler

worker = load_handler("whisper")
gate = Path(os.environ["GATE"])
begun = 0


class Clock:
    @staticmethod
    def monotonic() -> float:
        return float((gate / "clock").read_text())


def gated(decode: Any) -> Any:
    def run(self: Any, windows: Sequence[Any]) -> Any:
        global begun
        begun += 1
        (gate / "begun.new").write_text(str(begun))
        (gate / "begun.new").rename(gate / "begun")
        while int((gate / "batches").read_text()) < begun:
            time.sleep(0.02)
        return decode(self, windows)

    return run


for engine in (worker.TransformersEngine, worker.CTranslateEngine):
    engine.decode = gated(engine.decode)
worker.time = Clock
worker.main()
