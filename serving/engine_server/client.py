"""The client of an inference server (vLLM, TGI) on loopback: pooled HTTP, its errors, its event streams."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import AddrInfoType, ClientResponse, ClientSession, StreamReader

from serving.streaming import STREAM_LIMIT, sse_events
from shared.errors import JobError
from shared.logs import redact

KEEP_ALIVE_S = 3.0  # shorter than the 5 s after which uvicorn closes an idle connection
PROBE_S = 10.0
STREAM_END = re.compile(
    r"""^data:[ ]?\[DONE\]                                           # chat and completions
    | ^event:[ ]?(?:response\.(?:completed|failed|incomplete)|message_stop)$  # responses, messages
    | "generated_text":[ ]?"                                       # TGI's own""",
    re.MULTILINE | re.VERBOSE,
)
"""What the last events of a stream have, and no others."""
FIRST_S = 0.005  # a chat's role comes by itself, just before the first token
_ERROR = re.compile(r'^(?:event: ?error\ndata: ?(?=\{)|data: ?(?=\{ ?"error"))(?P<data>.*)', re.MULTILINE)


class EngineClient:
    """Requests to an inference server at `url`; for one elsewhere it is enough by itself.

    headers: sent with every request. Paths are the caller's own: never join a job's text into one.

    All methods raise JobError. One for an answer of the server keeps its `type`, `message`, `param` and
    `code` as they were (the HTTP status where it gave no code).
    """

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None) -> None:
        self.url = url.rstrip("/")
        self.headers = dict(headers or {})
        self._loop: asyncio.AbstractEventLoop | None = None

    def get(self, path: str, *, timeout: float = PROBE_S) -> tuple[int, str]:
        """Status and text of a GET, 0 and "" where nobody answers. Blocks: for the start, and for threads."""
        request = urllib.request.Request(self.url + path, headers=self.headers)  # noqa: S310
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout) as response:
                return response.status, response.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, ""
        except (OSError, ValueError, http.client.HTTPException):
            return 0, ""

    async def request(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> Any:
        """The JSON of the answer. When the caller's task is cancelled, the connection is closed."""
        return (await self.call(method, path, body, headers=headers))[0]

    async def call(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> tuple[Any, Mapping[str, str]]:
        """The JSON of the answer, and the answer's headers."""
        async with self._answer(method, path, body, headers) as response:
            return await self._json(response), response.headers

    async def stream(
        self, path: str, body: Any, *, headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[str]:
        """The server-sent events that a POST is answered with: at a time those that have come, each whole.

        For `serving.streaming.relay`. With a connection that breaks, what was not taken yet is lost.

        Closed early, it closes the connection, upon which the engine drops the request. An event that holds
        an error is raised as one, after those before it: engines send them under HTTP status 200. An answer
        that ends without its last event (STREAM_END) is a lost connection, though HTTP may call it whole.
        """
        ended = False
        async with self._answer("POST", path, body, headers) as response:
            async with aclosing(sse_events(_reads(response.content))) as blocks:
                async for events in blocks:
                    if error := _ERROR.search(events):
                        if before := events[: error.start()]:
                            yield before
                        await self._check()
                        raise problem(500, _parse(error["data"]))
                    ended = ended or bool(STREAM_END.search(events))
                    yield events
            if not ended:
                raise aiohttp.ClientPayloadError("the stream stopped before its end")

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, body: Any, headers: Mapping[str, str] | None
    ) -> AsyncIterator[ClientResponse]:
        pooled, fresh = await self._sessions()
        options: dict[str, Any] = {"headers": headers} if body is None else {"headers": headers, "json": body}
        try:
            try:
                response = await pooled.request(method, self.url + path, **options)
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                # No byte of an answer came: the server may have closed the idle connection just then.
                response = await fresh.request(method, self.url + path, **options)
            try:
                if response.status >= 400:
                    error = problem(response.status, _parse(await response.text(errors="replace")))
                    if response.status >= 500 or response.status == 424:  # TGI's for a model that failed
                        await self._check()
                    raise error
                yield response
            finally:
                response.release()  # closes the connection where the answer was not read to its end
        except (aiohttp.ClientError, OSError) as error:
            raise await self._lost(error) from error

    async def _json(self, response: ClientResponse) -> Any:
        text = await response.text(errors="replace")
        try:
            return json.loads(text)
        except ValueError:
            message = f"The engine's answer is not JSON: {text[:200]!r}."
            raise JobError(message, code="bad_answer", type="server_error") from None

    async def _check(self) -> None:
        """Raise JobError(code=ENGINE_DIED) if the engine behind a failure is gone; here it is another's."""

    async def _lost(self, error: Exception) -> JobError:
        """What a job is told whose connection was lost."""
        return JobError(
            f"The engine's server did not answer ({type(error).__name__}). Try again.",
            code="engine_unreachable",
            type="server_error",
        )

    async def _sessions(self) -> tuple[ClientSession, ClientSession]:
        """The running loop's sessions: one with a pool, one whose connections are always new."""
        if self._loop is not asyncio.get_running_loop():
            self._loop = asyncio.get_running_loop()
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=PROBE_S)
            # aiohttp's own limit is 100 connections, which would queue the others unseen.
            pool = aiohttp.TCPConnector(
                limit=0, keepalive_timeout=KEEP_ALIVE_S, socket_factory=_probing_socket
            )
            new = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_probing_socket)
            options: dict[str, Any] = {"timeout": timeout, "headers": self.headers}
            options["read_bufsize"] = STREAM_LIMIT  # of a stream that waits while its last part is posted
            self._pooled = aiohttp.ClientSession(connector=pool, **options)
            self._fresh = aiohttp.ClientSession(connector=new, **options)
            # asyncio.run closes generators before it closes its loop, and this one the sessions with itself.
            self._keeper = _hold(self._pooled, self._fresh)
            await anext(self._keeper)
        return self._pooled, self._fresh


async def _reads(body: StreamReader) -> AsyncGenerator[bytes]:
    """All that has come, each time; what comes right after the first part goes with it, not a post later."""
    first = True
    async for data in body.iter_any():
        if first:
            first = False
            await asyncio.sleep(FIRST_S)
            if body.exception() is None:
                data += body.read_nowait()
        yield data


def _probing_socket(address: AddrInfoType) -> socket.socket:
    """One that breaks a minute after its host has vanished; an answer itself may take any time."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10)):
        made.setsockopt(socket.IPPROTO_TCP, option, seconds)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    return made


async def _hold(*sessions: ClientSession) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        for session in sessions:
            await session.close()


def problem(status: int, body: Any) -> JobError:
    """An engine's error answer as JobError.

    body: OpenAI's `{"error": {"message", "type", "param", "code"}}`, TGI's `{"error", "error_type"}`,
    FastAPI's `{"detail"}`, or text.
    """
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    blame = "invalid_request_error" if status < 500 else "server_error"
    if isinstance(error, dict) and "message" in error:
        return JobError(
            redact(str(error["message"])),
            param=_field(error.get("param")),
            code=error.get("code") or status,
            type=error.get("type") or blame,
        )
    code = body.get("error_type") if isinstance(body, dict) else None
    text = error if isinstance(error, str) and error else json.dumps(error, ensure_ascii=False)
    return JobError(redact(text)[:2000], code=code or status, type=blame)


def _field(param: Any) -> str | None:
    """`body.temperature` is FastAPI's way to say `temperature`."""
    return str(param).removeprefix("body.") if param else None


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
