"""RunPod's second endpoint type: HTTP requests go to the workers as they are, the least busy one first.

The rules are RunPod's (docs, serverless/load-balancing): no queue; a request waits two minutes for a worker
that is ready, runs for five and a half, and carries 30 MB each way. A worker's health is polled at its /ping.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, web

from local.containers import Container
from local.jobs import Rules
from local.platform import Platform
from local.workers import WorkerProcess

_HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
_POLL_S = 0.2  # while a worker is not ready


class TooLarge(Exception):
    """A body is over the limit."""


class LoadBalancer(Platform):
    """A load-balancing endpoint on 127.0.0.1 and its worker processes, which serve HTTP."""

    def __init__(
        self, *, port: int = 0, rules: Rules | None = None, require_key: bool = True, echo: bool = False
    ) -> None:
        self._healthy: set[str] = set()  # ids of workers whose last /ping was 200
        self._in_flight: Counter[str] = Counter()  # requests by worker
        self._changed = asyncio.Event()
        super().__init__(port=port, rules=rules, require_key=require_key, echo=echo)

    @property
    def endpoint_url(self) -> str:
        """`http://127.0.0.1:PORT`; RunPod's is `https://<endpoint>.api.runpod.ai`."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def openai_url(self) -> str:
        return f"{self.endpoint_url}/v1"

    def make_app(self) -> web.Application:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        return app

    async def start(self) -> None:
        await super().start()
        await self._session.close()
        # The request's own deadline bounds it. A body passes as it is, compressed or not.
        self._session = ClientSession(timeout=ClientTimeout(total=None), auto_decompress=False)

    async def add_worker(
        self, command: Sequence[str] | Container, *, cwd: Path, env: Mapping[str, str] | None = None
    ) -> WorkerProcess:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        http = {"SERVE_MODE": "http", "PORT": port, "PORT_HEALTH": port, "HOST": "127.0.0.1"}
        worker = await super().add_worker(command, cwd=cwd, env={**(env or {}), **http})
        return worker

    # ---- health ----

    async def tick(self) -> None:
        """Poll /ping of every worker: often until it is ready, then at the rules' interval."""
        due: dict[str, float] = {}
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_POLL_S / 2)
            for worker in self.workers:
                if worker.alive and loop.time() >= due.get(worker.id, 0):
                    ready = worker.id in self._healthy
                    due[worker.id] = loop.time() + (self.rules.ping_interval if ready else _POLL_S)
                    self._spawn(self._ping(worker))

    async def _ping(self, worker: WorkerProcess) -> None:
        try:
            timeout = ClientTimeout(total=5)
            async with self._session.get(f"{_url(worker)}/ping", timeout=timeout) as response:
                status = response.status
        except (ClientError, OSError, TimeoutError):
            status = 0
        if status == 200:
            worker.polled()
            worker.ping_received()
            self._healthy.add(worker.id)
            self._changed.set()
        else:
            self._healthy.discard(worker.id)
        worker.check_pings(self.rules.missed_pings * self.rules.ping_interval)
        if worker.unresponsive and worker.alive:
            worker.kill()  # taken out, and replaced

    # ---- requests ----

    async def _pick(self) -> WorkerProcess | None:
        """The ready worker with the fewest requests in flight; None if there is none in time."""
        try:
            async with asyncio.timeout(self.rules.worker_wait):
                while True:
                    ready = [
                        worker
                        for worker in self.workers
                        if worker.id in self._healthy and worker.alive and not worker.draining
                    ]
                    if ready:
                        return min(ready, key=lambda worker: self._in_flight[worker.id])
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if self._require_key and not request.headers.get("Authorization", "").strip():
            return _error(401, "unauthorized")
        if (request.content_length or 0) > self.rules.http_bytes:
            return _error(413, "request body too large")
        worker = await self._pick()
        if worker is None:
            return _error(400, "no workers available")
        self._in_flight[worker.id] += 1
        worker.jobs_taken += 1
        response = web.StreamResponse(headers={"X-Runpod-Worker-Id": worker.id})
        try:
            async with asyncio.timeout(self.rules.request_timeout):
                await self._forward(request, worker, response)
            return response
        except TooLarge:
            status, cause = 413, "body too large"
        except TimeoutError:
            status, cause = 504, "the request took too long"
        except (ClientError, OSError) as error:
            if isinstance(error.__cause__, TooLarge):  # of the client's body, which aiohttp was sending
                return _error(413, "body too large")
            self._healthy.discard(worker.id)  # until it answers /ping again
            status, cause = 502, f"the worker did not answer: {type(error).__name__}"
        finally:
            self._in_flight[worker.id] -= 1
        if response.prepared:  # too late for a status: the client sees a connection that breaks
            assert request.transport is not None
            request.transport.abort()
            return response
        return _error(status, cause)

    async def _forward(
        self, request: web.Request, worker: WorkerProcess, response: web.StreamResponse
    ) -> None:
        """Send the request to the worker and its answer to the client, part by part."""
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        url = f"{_url(worker)}{request.rel_url}"
        body = self._limited(request.content.iter_any()) if request.can_read_body else None
        async with self._session.request(
            request.method, url, headers=headers, data=body, allow_redirects=False
        ) as answer:
            response.set_status(answer.status, answer.reason)
            for name, value in answer.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    response.headers[name] = value
            await response.prepare(request)
            async for part in self._limited(answer.content.iter_any()):
                await response.write(part)
            await response.write_eof()

    async def _limited(self, parts: Any) -> AsyncGenerator[bytes]:
        size = 0
        async for part in parts:
            size += len(part)
            if size > self.rules.http_bytes:
                raise TooLarge
            yield part


def _url(worker: WorkerProcess) -> str:
    return f"http://127.0.0.1:{worker.env['PORT']}"


def _error(status: int, cause: str) -> web.Response:
    return web.json_response({"error": cause}, status=status)
