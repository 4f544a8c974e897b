"""One logger: each event is one line, without secrets."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from contextvars import ContextVar

job_id: ContextVar[str | None] = ContextVar("job_id", default=None)
"""The id of the job that the running task serves; on RunPod every log line has it."""

_SECRET_NAME = re.compile(r"TOKEN$|SECRET|PASSWORD|API_KEY$|ACCESS_KEY", re.IGNORECASE)
# Hugging Face tokens and the user part of a URL, whatever their source.
_SECRET_TEXT = re.compile(r"hf_[A-Za-z0-9]{8,}|(?<=://)[^/\s@]+(?=@)")


def redact(text: str) -> str:
    """`text` without the values of secret environment variables, Hugging Face tokens and URL passwords."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return _SECRET_TEXT.sub("***", text)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = redact(super().format(record))
        if not os.environ.get("RUNPOD_ENDPOINT_ID"):
            return f"{record.levelname.ljust(7)}| {message}"
        # The format of the SDK, which RunPod's log view parses.
        line = {"requestId": job_id.get(), "message": message, "level": record.levelname}
        return json.dumps(line, ensure_ascii=False)


class _Stdout(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to sys.stdout as it is at the time of the event: tests replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def _make_logger() -> logging.Logger:
    logger = logging.getLogger("worker")
    handler = _Stdout()
    handler.setFormatter(_Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # the SDK gives the root logger a handler, which would print each line again
    return logger


log = _make_logger()
