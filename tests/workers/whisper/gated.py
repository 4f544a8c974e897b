"""workers/whisper, whose engine and clock a test moves, by files in the folder GATE.

`batches`: how many batches may run; `clock`: what time it is to Progress, in seconds. The worker writes how
many batches it has begun to `begun`.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workers.whisper import handler, progress
from workers.whisper.engine_ctranslate2 import CTranslate2Engine

gate = Path(os.environ["GATE"])
begun = 0
decode = CTranslate2Engine.decode


class Clock:
    @staticmethod
    def monotonic() -> float:
        return float((gate / "clock").read_text())


def gated_decode(self: Any, requests: Sequence[Any]) -> Any:
    global begun
    begun += 1
    (gate / "begun.new").write_text(str(begun))
    (gate / "begun.new").rename(gate / "begun")
    while int((gate / "batches").read_text()) < begun:
        time.sleep(0.02)
    return decode(self, requests)


CTranslate2Engine.decode = gated_decode  # type: ignore[method-assign]
progress.time = Clock  # type: ignore[assignment]
handler.main()
