"""The body of an HTTP request as a dict of fields: JSON, or a form whose files are bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import parse_qs

from fastapi import Request
from pydantic_core import from_json
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from shared.errors import JobError

__all__ = ["MAX_BODY_BYTES", "ClientDisconnect", "read_fields"]

MAX_BODY_BYTES = 30 * 2**20  # what RunPod passes on to a load-balancing endpoint
UPLOAD_TIMEOUT_S = 120.0
MAX_FIELDS = 100  # of a form
# Of a JSON body. No thread can parse beside the event loop, which a million numbers block for 0.1 s: OpenAI
# takes 300,000 tokens in a request.
MAX_VALUES = 1_000_000


class _InMemory(MultiPartParser):
    spool_max_size = MAX_BODY_BYTES  # no file is written to disk


async def read_fields(request: Request) -> tuple[dict[str, Any], bool]:
    """The fields of a request's body, and whether it was a form, whose values are text and bytes.

    Raises JobError for a body that is too large, too slow, or no JSON object, and ClientDisconnect.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    chunks = _limited(request.receive)
    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT_S):
            if content_type == "multipart/form-data":
                return await _multipart_fields(request.headers, chunks), True
            data = b"".join([chunk async for chunk in chunks])
    except TimeoutError:
        message = f"The body did not arrive within {UPLOAD_TIMEOUT_S:g} s. Send it faster, or a smaller one."
        raise JobError(message, code="body_timeout") from None
    # curl -d sends JSON under the type of a form.
    if content_type == "application/x-www-form-urlencoded" and data.lstrip()[:1] != b"{":
        return _urlencoded_fields(data), True
    return _json_fields(data), False


async def _limited(receive: Receive) -> AsyncGenerator[bytes, None]:
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        data = message.get("body", b"")
        size += len(data)
        if size > MAX_BODY_BYTES:
            raise _too_large()
        more = message.get("more_body", False)
        yield data


def _json_fields(data: bytes) -> dict[str, Any]:
    if not data.strip():
        return {}
    if data.count(b",") >= MAX_VALUES and _count_values(data) > MAX_VALUES:
        message = f"The body has over {MAX_VALUES:,} values. Send fewer, or text in place of token ids."
        raise JobError(message, code="too_large")
    try:
        try:
            fields = from_json(data)  # 30 times as fast as json with 20 MB of base64
        except ValueError:  # a lone surrogate, UTF-16, deep nesting
            fields = json.loads(data)
    except (ValueError, RecursionError):
        message = "The body is not valid JSON. Send a JSON object, or a form as multipart/form-data."
        raise JobError(message, code="invalid_json") from None
    if not isinstance(fields, dict):
        raise JobError("The body is not a JSON object. Send one.", code="invalid_json")
    return fields


def _count_values(data: bytes) -> int:
    """An upper bound of the values in a JSON text: one more than the commas outside of its strings."""
    unescaped = data.replace(rb"\\", b"").replace(rb"\"", b"")
    return b"".join(unescaped.split(b'"')[::2]).count(b",") + 1


def _urlencoded_fields(data: bytes) -> dict[str, Any]:
    try:
        fields = parse_qs(data.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError as error:
        raise _bad_form(str(error)) from None
    return {name: _one_or_all(name, values) for name, values in fields.items()}


async def _multipart_fields(headers: Headers, chunks: AsyncGenerator[bytes, None]) -> dict[str, Any]:
    """Each field's text, or its file's bytes; a field that comes more than once is a list."""
    parser = _InMemory(headers, chunks, max_files=8, max_fields=MAX_FIELDS, max_part_size=MAX_BODY_BYTES)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise _bad_form(error.message) from None
    fields: dict[str, list[Any]] = {}
    for name, value in form.multi_items():
        data = await value.read() if isinstance(value, UploadFile) else value
        fields.setdefault(name, []).append(data)
    await form.close()
    return {name: _one_or_all(name, values) for name, values in fields.items()}


def _one_or_all(name: str, values: list[Any]) -> Any:
    return values if len(values) > 1 or name.endswith("[]") else values[0]


def _bad_form(cause: str) -> JobError:
    return JobError(f"The form cannot be read: {cause.rstrip('.')}.", code="invalid_form")


def _too_large() -> JobError:
    message = f"The body is over the limit of {MAX_BODY_BYTES // 2**20} MiB. Send a URL, or a smaller file."
    return JobError(message, code="too_large")
