"""Bytes that a client sent: base64, a `data:` URI or an http(s) URL.

Every limit is checked before the work that it guards. Nothing is written to disk. An unreadable source raises
`JobError` with the field and the cause, and never the text of a URL: passwords and signatures are in it.

    data = await load_bytes(request.image, param="image")
"""

from __future__ import annotations

import asyncio
import base64
import functools
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from shared.errors import JobError, invalid

MAX_BYTES = 50 * 2**20
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30}):")
_STANDARD = bytes.maketrans(b"-_", b"+/")
_SOCKET_TIMEOUT_S = 10.0
_BLOCK = 2**16
# A pool of its own: servers that are slow must not keep the decoders of other jobs waiting.
_downloads = ThreadPoolExecutor(16, thread_name_prefix="download")


def decode_base64(text: str, *, param: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Decode base64 as the standard library's strict decoder does, after taking out ASCII white space,
    mapping the URL-safe alphabet to the standard one and adding missing padding.

    The two alphabets mixed in one text, padding that the last group does not need and any other character
    are refused.
    """
    try:
        packed = text.encode("ascii").translate(None, b" \t\n\r\v\f")
        body = packed.rstrip(b"=")
        if len(body) * 3 // 4 > max_bytes:
            raise too_large(param, f"{max_bytes} bytes")
        padding = -len(body) % 4
        if len(packed) - len(body) > padding:
            raise ValueError("too much padding")
        if re.search(rb"[-_]", body) and re.search(rb"[+/]", body):
            raise ValueError("the standard and the URL-safe alphabet are mixed")
        return base64.b64decode(body.translate(_STANDARD) + b"=" * padding, validate=True)
    except UnicodeEncodeError:
        cause = "it is not ASCII"
    except ValueError as error:
        cause = str(error)
    raise invalid(param, f"not valid base64: {cause}", "bad_base64")


async def load_bytes(
    source: str, *, param: str, max_bytes: int = MAX_BYTES, timeout_s: float = 30.0
) -> bytes:
    """The bytes, at least one, of base64 text, of a `data:` URI or at an http(s) URL.

    URLs go through the SDK's download, which refuses addresses that are not public, behind redirects too.
    After `timeout_s`, or when the job is cancelled, this returns at once; the thread that reads ends with the
    next bytes that arrive, or after 10 s without any, and closes its connection.
    """
    source = source.strip()
    scheme = match[1].lower() if (match := _SCHEME.match(source)) else ""
    if scheme in ("http", "https"):
        data = await _download(source, param, max_bytes, timeout_s)
    elif scheme in ("", "data"):
        read = _read_data_uri if scheme else decode_base64
        data = await asyncio.to_thread(read, source, param=param, max_bytes=max_bytes)
    else:
        raise invalid(param, "neither base64 nor a data: URI nor an http(s) URL.", "bad_url")
    if not data:
        raise invalid(param, "empty.", "empty")
    return data


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
    abandoned = threading.Event()
    fetch = functools.partial(_fetch, url, param, max_bytes, min(timeout_s, _SOCKET_TIMEOUT_S), abandoned)
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.get_running_loop().run_in_executor(_downloads, fetch)
    except TimeoutError:
        raise invalid(param, f"the download took longer than {timeout_s:g} s.", "download_timeout") from None
    finally:
        abandoned.set()


class _Abandoned(BaseException):
    """Nobody waits for this download any more. Not an Exception: HTTP libraries try again after those."""


def _fetch(url: str, param: str, max_bytes: int, patience_s: float, abandoned: threading.Event) -> bytes:
    from runpod.serverless.utils import rp_ssrf
    from urllib3.exceptions import HTTPError

    def leave_if_abandoned(*_: Any) -> None:
        if abandoned.is_set():
            raise _Abandoned

    headers = {"Accept-Encoding": "identity"}
    # A socket's time-out starts anew with each byte, and a server can trickle headers as well as a body. A
    # profile function is called in this thread at each call of Python, so after each wait on the socket.
    sys.setprofile(leave_if_abandoned)
    try:
        with rp_ssrf.safe_get(url, timeout=patience_s, headers=headers, max_bytes=max_bytes) as response:
            if response.status_code == 200:
                return b"".join(rp_ssrf.iter_content_capped(response, _BLOCK, max_bytes))
            cause = f"the server answered {response.status_code}"
    except rp_ssrf.SSRFError as error:
        if "size cap" in str(error):
            raise too_large(param, f"{max_bytes} bytes") from None
        cause = re.sub(r"\S*://.*", "the URL", str(error).split(": ")[0], flags=re.DOTALL)
    except (OSError, ValueError, HTTPError) as error:  # their texts quote the URL
        cause = type(error).__name__
    finally:
        sys.setprofile(None)
    raise invalid(param, f"the download failed: {cause}.", "download_failed")


def too_large(param: str, limit: str) -> JobError:
    """The error for a field over a limit, such as `50_000_000 pixels`."""
    return invalid(param, f"over the limit of {limit}.", "too_large")
