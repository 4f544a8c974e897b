"""Bytes that a client sent: base64, a `data:` URI or an http(s) URL.

Every limit is checked before the work that it guards. Nothing is written to disk. An unreadable source raises
JobError with the field and the cause. The error never quotes a URL, which may hold passwords and signatures.

    data = await load_bytes(request.image, param="image")
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from shared.errors import JobError, invalid

MAX_BYTES = 50 * 2**20
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30}):")
# Characters decoded at a time, a multiple of 4. One C call over 50 MB holds the interpreter lock, and so
# stops the event loop, for 0.4 s even on another thread.
_PART = 2**20
_STANDARD = bytes.maketrans(b"-_", b"+/")
_SOCKET_TIMEOUT_S = 10.0
_CHUNK_BYTES = 2**16
# A separate pool: slow servers must not occupy the threads that decode other jobs' input.
_downloads = ThreadPoolExecutor(16, thread_name_prefix="download")


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

    URLs go through the SDK's download, which refuses addresses that are not public, after redirects too.
    After `timeout_s`, or when the job is cancelled, this returns at once and the connection is closed. The
    exception is a server that trickles its headers: it holds one of 16 threads until they end, or until it
    pauses for 10 s.
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
    download = _Download(url, param, max_bytes, min(timeout_s, _SOCKET_TIMEOUT_S))
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.get_running_loop().run_in_executor(_downloads, download.run)
    except TimeoutError:
        raise invalid(param, f"the download took longer than {timeout_s:g} s.", "download_timeout") from None
    finally:
        download.stop()


class _Download:
    """One download, which another thread can stop while it waits for the body."""

    def __init__(self, url: str, param: str, max_bytes: int, socket_timeout_s: float) -> None:
        self.url, self.param, self.max_bytes = url, param, max_bytes
        self.socket_timeout_s = socket_timeout_s
        self._stopped = threading.Event()
        self._response: Any = None

    def stop(self) -> None:
        """Wake the thread that reads the body; its connection is then closed. Harmless after the end."""
        self._stopped.set()
        if self._response is not None:
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # closed already
                self._response.raw.shutdown()

    def run(self) -> bytes:
        from runpod.serverless.utils import rp_ssrf
        from urllib3.exceptions import HTTPError

        limits: dict[str, Any] = {"timeout": self.socket_timeout_s, "max_bytes": self.max_bytes}
        try:
            with rp_ssrf.safe_get(self.url, headers={"Accept-Encoding": "identity"}, **limits) as response:
                self._response = response
                if response.status_code == 200 and not self._stopped.is_set():
                    return b"".join(rp_ssrf.iter_content_capped(response, _CHUNK_BYTES, self.max_bytes))
                cause = f"the server answered {response.status_code}"
        except rp_ssrf.SSRFError as error:
            if "size cap" in str(error):
                raise too_large(self.param, f"{self.max_bytes} bytes") from None
            cause = re.sub(r"\S*://.*", "the URL", str(error).split(": ")[0], flags=re.DOTALL)
        except (OSError, ValueError, HTTPError) as error:  # their texts quote the URL
            cause = type(error).__name__
        raise invalid(self.param, f"the download failed: {cause}.", "download_failed")


def too_large(param: str, limit: str) -> JobError:
    """The error for a field over a limit, such as `50_000_000 pixels`."""
    return invalid(param, f"over the limit of {limit}.", "too_large")
