"""What an engine's process is started with: environment, port on loopback, reaper."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping

from serving.engine_server import reaper
from shared.logs import log

_NOT_FOR_ENGINE = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RUNPOD_AI_API_KEY")


def environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment without what is the worker's own, and with `changes`; None removes."""
    env: dict[str, str | None] = {**os.environ, **dict.fromkeys(_NOT_FOR_ENGINE), **changes}
    return {name: value for name, value in env.items() if value is not None}


def start_reaper(session: int, grace: float) -> subprocess.Popen[bytes]:
    """The process that ends the engine's `session` when this process is gone; see reaper.py."""
    numbers = [str(number) for number in (os.getpid(), session, grace)]
    command = [sys.executable, "-I", "-S", reaper.__file__, *numbers]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def choose_port(preferred: int | None) -> int:
    """The preferred port if no other process listens on it, else a free one."""
    if preferred is not None and not _is_free(preferred):
        log.warning("port %d is in use, taking another one", preferred)
    elif preferred is not None:
        return preferred
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True
