"""An EngineServer for engine.py, the small real server beside this file."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.engine_server.process import EngineServer

ENGINE = Path(__file__).with_name("engine.py")
SECRET = "hf_" + "s" * 30


def command(*flags: str) -> Callable[[int], list[str]]:
    return lambda port: [sys.executable, "-u", str(ENGINE), str(port), *flags]


class Watched(EngineServer):
    """A server whose death sets `dead` instead of ending the tests."""

    def __init__(self, *flags: str, **options: Any) -> None:
        self.dead = threading.Event()
        options = {"start_timeout": 60, "grace": 20, **options}
        super().__init__("engine", command(*flags), on_death=lambda _: self.dead.set(), **options)

    def start(self) -> None:
        super().start()
        self.prove(lambda: None)

    def waiting(self) -> int:
        return int(self.get("/metrics")[1].split()[1])

    def is_idle(self) -> bool:
        return self.waiting() == 0
