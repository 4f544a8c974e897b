"""What a child process writes, line by line into the worker's log, and its last lines."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections import deque

from shared.logs import log, redact

LAST_LINES = 200
LINE_LENGTH = 4000  # RunPod's log truncates longer lines
_LEVEL = re.compile(r"\b(WARNING|WARN|ERROR|CRITICAL)\b")


class Output:
    """Reads the output of `process` in a thread of its own, until it is closed.

    name: before each line in the log. last_lines: without secrets.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._thread = threading.Thread(target=self._read, args=(process,), daemon=True)
        self._thread.start()

    def wait_for_end(self, seconds: float = 5) -> None:
        """After the process has ended: until its last line is read. Its children may hold the pipe open."""
        self._thread.join(seconds)

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as output:
            rest = b""
            while data := os.read(output.fileno(), 65536):
                *lines, rest = re.split(rb"[\r\n]+", rest + data)
                if len(rest) > LINE_LENGTH:
                    lines, rest = [*lines, rest], b""
                for line in filter(None, lines):
                    self._log(line)
            if rest:
                self._log(rest)

    def _log(self, line: bytes) -> None:
        text = redact(line[:LINE_LENGTH].decode(errors="replace"))
        self.last_lines.append(text)
        level = _LEVEL.search(text[:80])
        (log.warning if level else log.info)("%s: %s", self.name, text)
