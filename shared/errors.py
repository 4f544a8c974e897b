"""The two errors that cross the boundary between a worker and its user."""

from __future__ import annotations

import json
from typing import Any

_LONGEST = 2000


def whole(text: str) -> str:
    """`text` as it can be sent: U+FFFD for half a surrogate pair, which JSON can name and UTF-8 cannot."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _told(text: str) -> str:
    """What a message may carry of a client's text: whole characters, both ends of megabytes."""
    return whole(text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}")


class JobError(Exception):
    """One job cannot be answered, and the client is told why.

    message: one sentence of what was wrong, one of what to do.
    param: the input field, dotted (`messages.0.content`), None when no single field is to blame.
    code: a stable machine-readable name (`too_long`, `unknown_field`); an engine's own may be a number.
    type: OpenAI's class of error; `invalid_request_error` blames the request, `server_error` the worker.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | int | None = None,
        type: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.message = _told(message)
        self.param = None if param is None else _told(param)
        self.code = code
        self.type = type

    def body(self) -> dict[str, Any]:
        """The error object in OpenAI's shape."""
        return {"type": self.type, "message": self.message, "param": self.param, "code": self.code}

    def json(self) -> str:
        """The error object as text: the SDK loses an `error` that is not a string."""
        return json.dumps(self.body(), ensure_ascii=False)


class StartError(Exception):
    """The worker cannot start, and a new try would fail in the same way.

    `shared.startup` answers it to every job instead of crashing: a crash loop bills, an answer does not.

    message: what was wrong and what to change, on one line.
    code: a stable machine-readable name (`model_not_found`, `gated`, `bad_setting`, `no_space`, ...).
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
