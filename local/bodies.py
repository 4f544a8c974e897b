"""JSON in and out of the platform's HTTP."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from aiohttp import web

from local.jobs import MIB, Refused


async def read_json(request: web.Request, limit: int) -> Any:
    """The JSON of the body. Raises Refused (as observed) when it has more than `limit` bytes."""
    body = bytearray()
    if (request.content_length or 0) <= limit:
        async for chunk in request.content.iter_any():
            body += chunk
            if len(body) > limit:
                break
        else:
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(body, parse_constant=_refuse_constant)
            raise Refused("bad request: body: it must be JSON")
    raise Refused(f"bad request: body: exceeded max body size of {limit / MIB:g}MiB")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON outside Python")


def json_response(body: Any, status: int = 200) -> web.Response:
    text = json.dumps(body, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(body)  # a lone surrogate, which JSON can escape and UTF-8 cannot encode
    return json_text_response(text, status)


def json_text_response(text: str, status: int = 200) -> web.Response:
    return web.Response(text=text, status=status, content_type="application/json")
