"""RunPod's second endpoint type: HTTP requests go to the workers as they are, the least busy one first.

The rules are RunPod's (docs, serverless/load-balancing): no queue; a request waits two minutes for a worker
that is ready, runs for five and a half, and carries 30 MB each way. The status codes 502 and 504 are
assumptions. WebSockets and worker affinity are left out.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from aiohttp import ClientError, ClientTimeout, web
from multidict import CIMultiDict
from yarl import URL

from local.bodies import json_response
from local.containers import Container
from local.endpoint import Endpoint
from local.jobs import Refused, Rules
from local.workers import WorkerProcess

_HOP_BY_HOP = {"connection", "expect", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
# What aiohttp would add to a request that has none.
_NOT_ADDED = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
_PING = "/ping"
_POLL_S = 0.2  # between pings of a worker that is not ready


class TooLarge(Exception):
    """A body is over the limit."""


class Router:
    """Which worker gets the next request: of those that are ready, the one with the fewest in flight."""

    def __init__(self) -> None:
        self.ready: set[str] = set()  # ids of workers
        self._in_flight: Counter[str] = Counter()  # requests by worker
        self._closed = False
        self._change = asyncio.Event()

    def in_flight(self, worker: str) -> int:
        return self._in_flight[worker]

    def add(self, worker: str) -> None:
        """The worker is ready."""
        self.ready.add(worker)
        self._change.set()

    def withdraw(self, worker: str) -> None:
        self.ready.discard(worker)

    def drop_worker(self, worker: str) -> None:
        self.withdraw(worker)

    def close(self) -> None:
        """No request gets a worker any more."""
        self._closed = True
        self._change.set()

    async def acquire(self, wait: float) -> str:
        """A worker for a request, until `release`. Raises Refused if none is ready within `wait` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(wait):
                while not (self.ready or self._closed):
                    self._change.clear()
                    await self._change.wait()
        if self._closed or not self.ready:
            raise Refused("no workers available")
        worker = min(self.ready, key=self.in_flight)
        self._in_flight[worker] += 1
        return worker

    def release(self, worker: str) -> None:
        self._in_flight[worker] -= 1


class LoadBalancer(Endpoint):
    """A load-balancing endpoint and its worker processes, which serve HTTP at ports of their own."""

    def __init__(
        self, *, port: int = 0, rules: Rules | None = None, require_key: bool = True, echo: bool = False
    ) -> None:
        rules = rules or Rules()
        self._router = Router()
        self._ports: dict[str, int] = {}  # by worker
        self._next_ping: dict[str, float] = {}
        self._last_good_ping: dict[str, float] = {}
        self.shutdown_timeout = rules.grace
        super().__init__(self._router, rules, port=port, require_key=require_key, echo=echo)

    @property
    def base_url(self) -> str:
        """`http://127.0.0.1:PORT`; RunPod's is `https://<endpoint>.api.runpod.ai`."""
        return self.url

    @property
    def endpoint_url(self) -> str:
        return self.url

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"

    def worker_url(self, worker: WorkerProcess) -> str:
        """Where the worker itself listens."""
        return f"http://127.0.0.1:{self._ports[worker.id]}"

    def make_app(self, *, require_key: bool) -> web.Application:
        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                if require_key and not request.headers.get("Authorization", "").strip():
                    raise Refused("unauthorized", 401)
                if (request.content_length or 0) > self.rules.http_bytes:
                    raise Refused("the body is too large", 413)
                return await self._handle(request)
            except Refused as refused:
                return json_response({"error": str(refused)}, refused.status)

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handle)
        return app

    def variables(self, worker_id: str) -> Mapping[str, str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = self._ports[worker_id] = probe.getsockname()[1]
        ports = {"PORT": str(port), "PORT_HEALTH": str(port)}
        return {"SERVE_MODE": "http", "HOST": "127.0.0.1", **ports, "HEALTH_CHECK_PATH": _PING}

    async def add_worker(
        self, command: Sequence[str] | Container, *, cwd: Path, env: Mapping[str, str] | None = None
    ) -> WorkerProcess:
        own = ("SERVE_MODE", "HOST", "PORT", "PORT_HEALTH")
        env = {name: value for name, value in (env or {}).items() if name not in own}
        return await super().add_worker(command, cwd=cwd, env=env)

    async def stop(self) -> None:
        self._router.close()
        await super().stop()

    # ---- health ------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Poll /ping of every worker: often until it is ready, then at the rules' interval."""
        for worker in self.workers:
            if worker.alive and time.monotonic() >= self._next_ping.get(worker.id, 0):
                self._next_ping[worker.id] = math.inf
                self._spawn(self._ping(worker))

    async def _ping(self, worker: WorkerProcess) -> None:
        url = self.worker_url(worker) + worker.env.get("HEALTH_CHECK_PATH", _PING)
        timeout = ClientTimeout(total=self.rules.ping_interval)
        try:
            async with self._session.get(url, timeout=timeout, allow_redirects=False) as response:
                status = response.status
        except (ClientError, OSError):
            status = 0  # it may not listen yet
        now = time.monotonic()
        if status == 200 and not worker.draining:
            worker.mark_ready()
            self._router.add(worker.id)
        else:
            self._router.withdraw(worker.id)
        if status in (200, 204):
            self._last_good_ping[worker.id] = now
        elif status:
            self._last_good_ping.setdefault(worker.id, now)
        patience = self.rules.missed_pings * self.rules.ping_interval
        if now - self._last_good_ping.get(worker.id, now) >= patience and not worker.draining:
            worker.kill()  # and so it is replaced
        self._next_ping[worker.id] = now + (self.rules.ping_interval if status == 200 else _POLL_S)

    # ---- requests ----------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        worker_id = await self._router.acquire(self.rules.worker_wait)
        response = web.StreamResponse()
        try:
            worker = self._fleet.get(worker_id)
            if worker is None:  # it was killed a moment ago
                self._router.withdraw(worker_id)
                return await self._handle(request)
            worker.jobs_taken += 1
            async with asyncio.timeout(self.rules.request_timeout):
                await self._forward(request, worker, response)
        except TimeoutError:
            refused = Refused("the request took too long", 504)
        except TooLarge:
            refused = Refused("the answer is too large", 413)
        except (ClientError, OSError) as error:
            if isinstance(error.__cause__, TooLarge):
                refused = Refused("the body is too large", 413)
            elif request.content.exception() or request.transport is None or request.transport.is_closing():
                refused = Refused("the body cannot be read")  # or the client has hung up
            else:
                self._router.withdraw(worker_id)  # until it answers /ping again
                self._next_ping[worker_id] = 0
                refused = Refused(f"the worker did not answer: {type(error).__name__}", 502)
        else:
            return response
        finally:
            self._router.release(worker_id)
        if not response.prepared:
            raise refused
        if request.transport is not None:  # the status is sent: the client gets a connection that breaks
            request.transport.abort()
        return response

    async def _forward(
        self, request: web.Request, worker: WorkerProcess, response: web.StreamResponse
    ) -> None:
        """Send the request to the worker and its answer to the client, each part as it comes."""
        async with self._session.request(
            request.method,
            URL(self.worker_url(worker) + request.rel_url.raw_path_qs, encoded=True),
            headers=_end_to_end(request.headers),
            data=self._limited(request.content.iter_any()) if request.can_read_body else None,
            skip_auto_headers=_NOT_ADDED,
            allow_redirects=False,
        ) as answer:
            if (answer.content_length or 0) > self.rules.http_bytes:
                raise TooLarge
            response.set_status(answer.status, answer.reason)
            response.headers.extend(_end_to_end(answer.headers))
            response.headers["X-Runpod-Worker-Id"] = worker.id
            await response.prepare(request)
            async for part in self._limited(answer.content.iter_any()):
                await response.write(part)
        await response.write_eof()

    async def _limited(self, parts: AsyncIterable[bytes]) -> AsyncGenerator[bytes]:
        size = 0
        async for part in parts:
            size += len(part)
            if size > self.rules.http_bytes:
                raise TooLarge
            yield part


def _end_to_end(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """All but those of the connection."""
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in _HOP_BY_HOP)
