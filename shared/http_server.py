"""HTTP mode, SERVE_MODE=http: a load-balancing endpoint, a Pod, Kubernetes or a laptop. Without the SDK.

The server listens before the model is loaded, so that the platform sees a worker that starts: `/ping` is 204
while it loads and 200 when it is ready. SIGTERM drains: requests that run are answered, new ones are refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from concurrent.futures import Future
from types import FrameType

import uvicorn
from starlette.types import Message, Receive, Scope, Send

from shared import startup
from shared.admission import Admission
from shared.errors import JobError, StartError
from shared.http_app import make_app
from shared.jobs import JobHandler
from shared.logs import log
from shared.settings import HttpSettings, WorkerSettings

MAX_RESULT_BYTES = 30 * 10**6  # what RunPod passes on from a load-balancing endpoint
KEEP_ALIVE_S = 600  # longer than a load balancer keeps its connections
DEAD_S = 3.0  # how long /ping answers 503 after the engine has died, with nothing in flight
MAX_HEAD_BYTES = 64 * 1024  # of a request: its line and headers


class _Server(uvicorn.Server):
    """SIGTERM and SIGINT start a drain; while the model loads, or at the second signal, they end at once."""

    def __init__(self, config: uvicorn.Config, admission: Admission) -> None:
        super().__init__(config)
        self._admission = admission

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._admission.state in ("draining", "loading"):
            os._exit(128 + sig)
        log.info("%s: draining %d requests", signal.Signals(sig).name, self._admission.in_flight)
        self._admission.close("draining")


def serve(
    handler: JobHandler,
    loading: Future[WorkerSettings | StartError | None],
    settings: HttpSettings,
    *,
    worker: str,
) -> None:
    """Serve until a signal, status 0, or until the engine is dead, status 1.

    loading: gives the worker's settings once its model is loaded, a permanent cause why it cannot be, or None
    for a failure that another attempt may not meet: status 1.
    """
    admission = Admission()
    app = make_app(
        handler,
        admission,
        worker=worker,
        health_path=settings.health_check_path,
        api_key=settings.api_key.get_secret_value() if settings.api_key else None,
        origins=settings.origins,
    )
    ports = list(dict.fromkeys([settings.port, settings.port_health or settings.port]))

    async def closing_when_drained(scope: Scope, receive: Receive, send: Send) -> None:
        """While the worker drains, answers ask clients not to send the next request on their connection."""

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and admission.closed.is_set():
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        await app(scope, receive, closing)

    configs = [
        uvicorn.Config(
            closing_when_drained, settings.host, port, http=_protocol(), ws="none", lifespan="off",
            log_config=None, access_log=False, server_header=False, proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        for port in ports
    ]  # fmt: skip
    server_log = logging.getLogger("uvicorn.error")  # its warnings, in the format of the worker's own
    server_log.handlers, server_log.propagate = log.handlers, False
    server_log.setLevel(logging.WARNING)
    servers = [_Server(config, admission) for config in configs]
    log.info(
        "HTTP on port %d. On RunPod: expose %s and set PORT=%d, PORT_HEALTH=%d, HEALTH_CHECK_PATH=%s",
        settings.port, ", ".join(f"{port}/http" for port in ports), settings.port, ports[-1],
        settings.health_check_path,
    )  # fmt: skip

    async def open_when_loaded() -> None:
        loaded = await asyncio.wrap_future(loading)
        if loaded is None:
            admission.close("dead")
        elif isinstance(loaded, StartError):
            admission.fail(loaded)
        else:
            handler.max_result_bytes = MAX_RESULT_BYTES
            waiting = loaded.max_concurrency if settings.max_waiting is None else settings.max_waiting
            startup.log_ready()
            admission.open(loaded.max_concurrency, waiting)

    async def run() -> None:
        opening = asyncio.create_task(open_when_loaded())
        serving = [asyncio.create_task(server.serve()) for server in servers]
        closing = asyncio.create_task(admission.closed.wait())
        await asyncio.wait([*serving, closing], return_when=asyncio.FIRST_COMPLETED)
        await admission.idle.wait()
        if admission.state == "dead" and admission.cause:  # the load balancer sees it before the worker ends
            await asyncio.sleep(DEAD_S)
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*serving)
        opening.cancel()

    with asyncio.Runner(loop_factory=configs[0].get_loop_factory()) as runner:
        loop = runner.get_loop()

        def engine_died(error: JobError) -> None:
            loop.call_soon_threadsafe(admission.close, "dead", error)

        handler.on_engine_death = engine_died
        runner.run(run())
    sys.exit(1 if admission.state == "dead" else 0)


def _protocol() -> type[asyncio.Protocol] | str:
    """uvicorn's faster protocol with a limit on a request's head, which the slower one has by itself."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "h11"

    class LimitedHead(HttpToolsProtocol):
        _in_head, _head_bytes = False, 0

        def data_received(self, data: bytes) -> None:
            if self._in_head:  # since an earlier call
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES:
                    return self.send_400_response("The head of the request is too large.")
            super().data_received(data)

        def on_message_begin(self) -> None:
            self._in_head, self._head_bytes = True, 0
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._in_head = False
            super().on_headers_complete()

    return LimitedHead
