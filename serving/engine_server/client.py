"""HTTP client of an inference server (vLLM, TGI) on loopback: pooled connections, errors, event streams."""

from __future__ import annotations

import asyncio
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import ClientResponse, ClientSession
from pydantic_core import PydanticSerializationError, from_json, to_json

from serving.engine_server.events import EventReader, find_error
from serving.streaming import STREAM_LIMIT
from shared import telemetry
from shared.errors import JobError
from shared.logs import redact

KEEP_ALIVE_S = 3.0  # shorter than the 5 s after which uvicorn closes an idle connection
PROBE_S = 10.0  # for a GET of `get`, and to connect
FIRST_READ_S = 0.005  # a chat's role comes in an event of its own, just before the first token
LARGE = 1_000_000  # bytes of an answer


class EngineClient:
    """Requests to the inference server at `url`. Never join a job's text into a path.

    All methods raise JobError. One for an error answer of the server keeps its `type`, `message`, `param` and
    `code` (the HTTP status where it gave no code).
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._loop: asyncio.AbstractEventLoop | None = None

    def get(self, path: str, *, timeout: float = PROBE_S) -> tuple[int, str]:
        """Status and text of a GET; 0 and "" where no server answers. Blocks: call it in a thread."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(self.url + path, timeout=timeout) as response:
                return response.status, response.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, ""
        except (OSError, ValueError, http.client.HTTPException):
            return 0, ""

    async def metrics(self) -> bytes:
        """The server's metrics in Prometheus' text format; nothing where it does not answer."""
        return (await asyncio.to_thread(self.get, "/metrics"))[1].encode()

    async def request(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> Any:
        """The JSON of the answer. When the caller's task is cancelled, the connection is closed."""
        return (await self.call(method, path, body, headers=headers))[0]

    async def call(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> tuple[Any, Mapping[str, str]]:
        """The JSON of the answer, and the answer's headers."""
        async with self._send(method, path, body, headers) as response:
            data = await response.read()
            if len(data) > LARGE:
                await asyncio.sleep(0)  # other jobs run between the read, the parser and the caller
            try:
                answer = _parse(data)
            except ValueError:
                message = f"The engine's answer is not JSON: {data[:200].decode(errors='replace')!r}."
                raise JobError(message, code="bad_answer", type="server_error") from None
            if len(data) > LARGE:
                await asyncio.sleep(0)
            return answer, response.headers

    async def stream(
        self, path: str, body: Any, *, headers: Mapping[str, str] | None = None, in_posts: bool = True
    ) -> AsyncGenerator[str]:
        """The server-sent events that answer a POST: each time all complete events that have arrived.

        in_posts: for a queue endpoint, by way of `serving.streaming.relay`; see `read_first`. Closed early,
        this closes the connection, upon which the engine drops the request. What was not taken from a
        connection that breaks is lost.

        An event that holds an error is raised as one, after those before it. An answer without one of the
        events that end a stream is a lost connection, even if HTTP ended in order. The tokens that the
        answer states are observed for the job.
        """
        reader = EventReader()
        async with self._send("POST", path, body, headers) as response:
            content = response.content
            data = await (read_first(content) if in_posts else content.readany())
            while True:
                if events := reader.feed(data) if data else reader.end():
                    if error := find_error(events):
                        start, problem = error
                        if start:
                            yield events[:start].decode(errors="replace")
                        await self._raise_if_dead()
                        raise parse_error_body(500, _parse_or_text(problem))
                    yield events.decode(errors="replace")
                if not data:
                    break
                data = await content.readany()
            if not reader.complete:
                raise aiohttp.ClientPayloadError("the stream stopped before its end")
        for name, count in reader.tokens.items():
            telemetry.observe(name, count)

    @asynccontextmanager
    async def _send(
        self, method: str, path: str, body: Any, headers: Mapping[str, str] | None
    ) -> AsyncIterator[ClientResponse]:
        session = await self._session_of_loop()
        headers = dict(headers or {})
        data = None
        if body is not None:
            data = _dump(body)
            headers["Content-Type"] = "application/json"
        try:
            try:
                response = await session.request(method, self.url + path, data=data, headers=headers)
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                # No byte of an answer came: the server may have closed the idle connection at that moment.
                response = await session.request(method, self.url + path, data=data, headers=headers)
            try:
                if response.status >= 400:
                    error = parse_error_body(response.status, _parse_or_text(await response.read()))
                    if response.status >= 500 or response.status == 424:  # TGI's for a model that failed
                        await self._raise_if_dead()
                    raise error
                yield response
            finally:
                response.release()  # closes the connection where the answer was not read to its end
        except (aiohttp.ClientError, OSError) as error:
            raise await self._connection_lost(error) from error

    async def _raise_if_dead(self) -> None:
        """At a failure of the engine itself: raise JobError(code=ENGINE_DIED) if the engine is dead."""

    async def _connection_lost(self, error: Exception) -> JobError:
        """The error of a job whose connection broke."""
        return JobError(
            f"The engine's server did not answer ({type(error).__name__}). Try again.",
            code="engine_unreachable",
            type="server_error",
        )

    async def _session_of_loop(self) -> ClientSession:
        """The running loop's session: prewarm runs in another loop than the SDK."""
        if self._loop is not asyncio.get_running_loop():
            self._loop = asyncio.get_running_loop()
            self._opened = _open_session()
            self._session = await anext(self._opened)
        return self._session


async def _open_session() -> AsyncGenerator[ClientSession]:
    """Yield a session. asyncio.run, which closes generators before it closes its loop, closes the session."""
    # aiohttp's default is 100 connections: more requests would wait unseen.
    pool = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=PROBE_S)
    # The buffer is for a stream that waits while its last part is posted.
    async with aiohttp.ClientSession(connector=pool, timeout=timeout, read_bufsize=STREAM_LIMIT) as session:
        yield session


async def read_first(body: aiohttp.StreamReader) -> bytes:
    """What arrives first, and FIRST_READ_S later, which would cost the first token a post of its own."""
    data = await body.readany()
    if data:
        await asyncio.sleep(FIRST_READ_S)
        if body.exception() is None:
            data += body.read_nowait()
    return data


def parse_error_body(status: int, body: Any) -> JobError:
    """An engine's error answer as JobError.

    body: OpenAI's `{"error": {"message", "type", "param", "code"}}`, TGI's `{"error", "error_type"}`,
    FastAPI's `{"detail"}`, or text.
    """
    error = body.get("error", body.get("detail", body)) if isinstance(body, dict) else body
    blame = "invalid_request_error" if status < 500 else "server_error"
    if isinstance(error, dict) and "message" in error:
        param = error.get("param")
        return JobError(
            redact(str(error["message"])),
            param=str(param).removeprefix("body.") if param else None,  # FastAPI's form: body.temperature
            code=error.get("code") or status,
            type=error.get("type") or blame,
        )
    code = body.get("error_type") if isinstance(body, dict) else None
    text = error if isinstance(error, str) and error else json.dumps(error, ensure_ascii=False)
    return JobError(redact(text)[:2000], code=code or status, type=blame)


# pydantic's parser and serializer take a third of json's time, in which no other job runs. They know no lone
# surrogates, which json.dumps escapes.


def _dump(body: Any) -> bytes:
    try:
        return to_json(body, inf_nan_mode="constants")
    except (PydanticSerializationError, UnicodeEncodeError):
        return json.dumps(body).encode()


def _parse(data: bytes) -> Any:
    try:
        return from_json(data)
    except ValueError:
        return json.loads(data)


def _parse_or_text(data: bytes) -> Any:
    try:
        return _parse(data)
    except ValueError:
        return data.decode(errors="replace")
