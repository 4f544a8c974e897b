"""The two errors that a user of a worker receives: JobError for one job, StartError for all of them."""

from __future__ import annotations

import json
from typing import Any

ENGINE_DIED = "engine_died"
"""The code of a JobError after which the worker can serve no job any more, and asks to be replaced."""

_MAX_TEXT = 2000  # characters of a message
_STATUS = {
    "invalid_api_key": 401,
    "unknown_route": 404,
    "model_not_found": 404,
    "method_not_allowed": 405,
    "body_timeout": 408,
    "too_large": 413,
    "result_too_large": 413,
    "overloaded": 429,
    "not_ready": 503,
    ENGINE_DIED: 503,
}


def replace_lone_surrogates(text: str) -> str:
    """`text` with U+FFFD for each lone surrogate, which JSON can escape and UTF-8 cannot encode."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _clip_middle(text: str) -> str:
    """`text` with valid Unicode only, and without its middle where it is long."""
    if len(text) > _MAX_TEXT:
        text = f"{text[: _MAX_TEXT // 2]} ... {text[-_MAX_TEXT // 2 :]}"
    return replace_lone_surrogates(text)


class JobError(Exception):
    """One job cannot be answered, and the client receives the reason.

    message: one sentence of what was wrong, one of what to do.
    param: the input field, dotted (`messages.0.content`), None when no single field is to blame.
    code: a stable machine-readable name (`too_long`, `unknown_field`); an engine's own may be a number.
    type: OpenAI's class of error; `invalid_request_error` blames the request, `server_error` the worker;
    `unavailable`: the worker can serve no request, and another attempt meets the same cause.
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
        self.message = _clip_middle(message)
        self.param = None if param is None else _clip_middle(param)
        self.code = code
        self.type = type

    @property
    def status(self) -> int:
        """The HTTP status: by the code, else 400 for the request's fault and 500 for the worker's."""
        if isinstance(self.code, int) and 400 <= self.code < 600:  # an inference server's own status
            return self.code
        if self.type == "unavailable":
            return 503
        return _STATUS.get(str(self.code), 400 if self.type == "invalid_request_error" else 500)

    def body(self) -> dict[str, Any]:
        """The error object in OpenAI's shape."""
        return {"type": self.type, "message": self.message, "param": self.param, "code": self.code}

    def json(self) -> str:
        """The error object as text: the SDK loses an `error` that is not a string."""
        return json.dumps(self.body(), ensure_ascii=False)

    def event(self) -> str:
        """The end of an OpenAI stream that failed: the error as a server-sent event, then `[DONE]`."""
        return f"data: {json.dumps({'error': self.body()})}\n\ndata: [DONE]\n\n"


def invalid(param: str, message: str, code: str = "invalid_value") -> JobError:
    """A JobError about the field `param`; the message starts with its name."""
    return JobError(f"{param}: {message}", param=param, code=code)


def engine_died(error: BaseException) -> JobError:
    """The error of the jobs of an engine thread that `error` has ended. The worker is then replaced."""
    return JobError(
        f"The engine of this worker stopped ({type(error).__name__}). Send the job again: the worker is "
        "being replaced.",
        code=ENGINE_DIED,
        type="server_error",
    )


def not_finite(advice: str) -> JobError:
    """The error of a job whose result has a NaN or an infinity. advice: what to change, a sentence."""
    message = f"The model produced a number that is not finite. {advice}"
    return JobError(message, code="not_finite", type="server_error")


class StartError(Exception):
    """The worker cannot start, and a new attempt would fail in the same way.

    `shared.startup` answers every job with it instead of exiting: a crash loop bills, an answer does not.

    message: what was wrong and what to change, on one line.
    code: a stable machine-readable name (`model_not_found`, `gated`, `bad_setting`, `no_space`, ...).
    """

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
