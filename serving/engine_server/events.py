"""The server-sent events of an engine's answer."""

from __future__ import annotations

import re

from shared.errors import JobError

_BLANK_LINES = re.compile(rb"\n{3,}")
_STREAM_END = re.compile(
    rb"""^data:[ ]?\[DONE\]                                           # chat and completions
    | ^event:[ ]?(?:response\.(?:completed|failed|incomplete)|message_stop)$  # responses, messages
    | "generated_text":[ ]?"                                       # TGI's own""",
    re.MULTILINE | re.VERBOSE,
)  # the last events of a stream, and no others
_ERROR_EVENT = re.compile(
    rb'^(?:event: ?error\ndata: ?(?=\{)|data: ?(?=\{ ?"error"))(?P<data>.*)', re.MULTILINE
)
_TOKENS = {
    name: re.compile(rb'.*"usage": ?\{(?:[^{}]|\{[^{}]*\})*?"(?:%s)": ?(\d+)' % keys, re.DOTALL)
    for name, keys in (("prompt_tokens", b"prompt_tokens|input_tokens"),
                       ("completion_tokens", b"completion_tokens|output_tokens"))
}  # fmt: skip


class EventReader:
    r"""Cuts an HTTP body into complete events, however it arrives.

    Each ends in one blank line. Lines end in `\n` or `\r\n`, which becomes `\n`.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._last = self._usage = b""

    def feed(self, data: bytes) -> bytes:
        """The events that `data` completes; nothing where it completes none."""
        events, blank, self._rest = (self._rest + data).replace(b"\r\n", b"\n").rpartition(b"\n\n")
        events = events.lstrip(b"\n")
        if not events:
            return b""
        events += blank
        return self._note(_BLANK_LINES.sub(b"\n\n", events) if b"\n\n\n" in events else events)

    def end(self) -> bytes:
        """The last event, which may lack its blank line. Raises JobError for a body that ends in a line."""
        event = self._rest.strip(b"\n")
        if not event:
            return b""
        if not self._rest.endswith(b"\n"):
            message = "The engine's answer ended in the middle of an event. Try again."
            raise JobError(message, code="stream_cut", type="server_error")
        return self._note(event + b"\n\n")

    def _note(self, events: bytes) -> bytes:
        self._last = events
        if b'"usage":{' in events or b'"usage": {' in events:
            self._usage = events
        return events

    @property
    def complete(self) -> bool:
        """Whether the last events have one of those that end a stream."""
        return bool(_STREAM_END.search(self._last))

    @property
    def tokens(self) -> dict[str, int]:
        """`prompt_tokens` and `completion_tokens` of the last usage that an event stated."""
        found = {name: pattern.match(self._usage) for name, pattern in _TOKENS.items()}
        return {name: int(match[1]) for name, match in found.items() if match}


def find_error(events: bytes) -> tuple[int, bytes] | None:
    """Where an event begins that holds an error, and its data: engines send it under HTTP status 200."""
    if b'"error"' in events and (error := _ERROR_EVENT.search(events)):
        return error.start(), error["data"]
    return None
