"""Bytes that a client sent: base64, a `data:` URI or an http(s) URL.

Every limit is checked before the work that it guards. Nothing is written to disk. An unreadable source raises
JobError with the field and the cause. The error never quotes a URL, which may hold passwords and signatures.

    data = await load_bytes(request.image, param="image")
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import re
from urllib.parse import unquote, unquote_to_bytes

from shared.errors import JobError, invalid

MAX_BYTES = 50 * 2**20
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30}):")
# Characters decoded at a time, a multiple of 4. One C call over 50 MB holds the interpreter lock, and so
# stops the event loop, for 0.4 s even on another thread.
_PART = 2**20
_STANDARD = bytes.maketrans(b"-_", b"+/")


def decode_base64(text: str, *, param: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Decode base64, standard or URL-safe, with or without padding; ASCII white space is ignored.

    Raises JobError(code="bad_base64") for any other character, for both alphabets in one text and for more
    padding than the last group needs; JobError(code="too_large") before decoding.
    """
    try:
        parts = (text[start : start + _PART] for start in range(0, len(text), _PART))
        packed = b"".join(part.encode("ascii").translate(None, b" \t\n\r\v\f") for part in parts)
        body = packed.rstrip(b"=")
        if len(body) * 3 // 4 > max_bytes:
            raise too_large(param, f"{max_bytes} bytes")
        padding = -len(body) % 4
        if len(packed) - len(body) > padding:
            raise ValueError("too much padding")
        if (b"-" in body or b"_" in body) and (b"+" in body or b"/" in body):
            raise ValueError("the standard and the URL-safe alphabet are mixed")
        if b"=" in body:  # at the end of a part, it would be valid
            raise ValueError("padding before the end")
        body += b"=" * padding
        starts = range(0, len(body), _PART)
        return b"".join(
            base64.b64decode(body[start : start + _PART].translate(_STANDARD), validate=True)
            for start in starts
        )
    except UnicodeEncodeError:
        cause = "it is not ASCII"
    except ValueError as error:
        cause = str(error)
    raise invalid(param, f"not valid base64: {cause}", "bad_base64")


async def load_bytes(
    source: str | bytes, *, param: str, max_bytes: int = MAX_BYTES, timeout_s: float = 30.0
) -> bytes:
    """The bytes, at least one, of base64 text, of a `data:` URI or at an http(s) URL; bytes as they are.

    A URL whose host has no public address is refused, after redirects too; see `shared.download`. After
    `timeout_s`, or when the job is cancelled, the connection is closed.
    """
    if isinstance(source, str):
        data = await _load_text(source.strip(), param, max_bytes, timeout_s)
    elif len(source) > max_bytes:
        raise too_large(param, f"{max_bytes} bytes")
    else:
        data = source
    if not data:
        raise invalid(param, "empty.", "empty")
    return data


async def _load_text(source: str, param: str, max_bytes: int, timeout_s: float) -> bytes:
    scheme = match[1].lower() if (match := _SCHEME.match(source)) else ""
    if scheme in ("http", "https"):
        return await _download(source, param, max_bytes, timeout_s)
    if scheme in ("", "data"):
        read = _read_data_uri if scheme else decode_base64
        return await asyncio.to_thread(read, source, param=param, max_bytes=max_bytes)
    raise invalid(param, "neither base64 nor a data: URI nor an http(s) URL.", "bad_url")


def _read_data_uri(uri: str, *, param: str, max_bytes: int) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma:
        raise invalid(param, "a data: URI without a comma.", "bad_url")
    if head.lower().rstrip().endswith(";base64"):
        return decode_base64(unquote(body), param=param, max_bytes=max_bytes)
    if len(body) > 3 * max_bytes or len(data := unquote_to_bytes(body)) > max_bytes:
        raise too_large(param, f"{max_bytes} bytes")
    return data


async def _download(url: str, param: str, max_bytes: int, timeout_s: float) -> bytes:
    # An import of 0.2 s, which most jobs do without.
    module = await asyncio.to_thread(importlib.import_module, "shared.download")
    try:
        async with asyncio.timeout(timeout_s):
            data: bytes = await module.download(url, max_bytes)
            return data
    except TimeoutError:
        raise invalid(param, f"the download took longer than {timeout_s:g} s.", "download_timeout") from None
    except module.TooLarge:
        raise too_large(param, f"{max_bytes} bytes") from None
    except module.DownloadFailed as error:
        raise invalid(param, f"the download failed: {error}.", "download_failed") from None


def too_large(param: str, limit: str) -> JobError:
    """The error for a field over a limit, such as `50_000_000 pixels`."""
    return invalid(param, f"over the limit of {limit}.", "too_large")
