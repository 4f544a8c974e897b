"""The body of an HTTP request as a dict of fields: JSON, or a form whose files are bytes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from shared.errors import JobError

MAX_BODY_BYTES = 30 * 2**20  # what RunPod passes on to a load-balancing endpoint
UPLOAD_TIMEOUT_S = 120.0
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


async def read_fields(request: Request) -> tuple[dict[str, Any], bool]:
    """The fields of a request's body, and whether it was a form, whose values are text and bytes.

    Raises JobError for a body that is too large, too slow, or no JSON object, and ClientDisconnect.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    limited = Request(request.scope, _limited(request.receive))
    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT_S):
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() in _FORMS:
                data = await limited.body()  # kept, so that the form is parsed from memory
                form = data.lstrip()[:1] != b"{"  # curl -d sends JSON under the type of a form
                return (await _form_fields(limited), True) if form else (_json_fields(data), False)
            return _json_fields(await limited.body()), False
    except TimeoutError:
        message = f"The body did not arrive within {UPLOAD_TIMEOUT_S:g} s. Send it faster, or a smaller one."
        raise JobError(message, code=408) from None


def _limited(receive: Receive) -> Receive:
    size = 0

    async def limited() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MAX_BODY_BYTES:
            raise _too_large()
        return message

    return limited


def _json_fields(data: bytes) -> dict[str, Any]:
    if not data.strip():
        return {}
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise JobError("The body is not valid JSON. Send a JSON object.", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise JobError("The body must be a JSON object.", code="invalid_json")
    return fields


async def _form_fields(request: Request) -> dict[str, Any]:
    """Each field's text, or its file's bytes; a field that comes more than once is a list."""
    try:
        form = await request.form(max_files=8, max_fields=100)
    except HTTPException as error:
        raise JobError(f"The form cannot be read: {error.detail}.", code="invalid_form") from None
    fields: dict[str, Any] = {}
    for name in form:
        values = [
            await value.read() if isinstance(value, UploadFile) else value for value in form.getlist(name)
        ]
        fields[name] = values if len(values) > 1 or name.endswith("[]") else values[0]
    return fields


def _too_large() -> JobError:
    message = f"The body is over the limit of {MAX_BODY_BYTES // 2**20} MiB. Send a URL, or a smaller file."
    return JobError(message, code="too_large")


__all__ = ["MAX_BODY_BYTES", "ClientDisconnect", "read_fields"]
