"""HTTP mode, SERVE_MODE=http: a load-balancing endpoint, a Pod, Kubernetes or a laptop. Without the SDK.

The server listens before the model loads, so that the platform sees a worker that starts: `/ping` is 204
while it loads and 200 when it is ready. SIGTERM drains: requests that run are answered, new ones are refused.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from types import FrameType

import uvicorn
from pydantic import Field, SecretStr

from shared import startup, telemetry
from shared.admission import Admission
from shared.errors import StartError
from shared.http_app import make_app
from shared.jobs import JobHandler
from shared.logs import log
from shared.settings import EnvironmentSettings, read_settings

MAX_RESULT_BYTES = 30 * 2**20  # what RunPod passes on from a load-balancing endpoint
KEEP_ALIVE_S = 600  # longer than a load balancer keeps its connections


class HttpSettings(EnvironmentSettings):
    """The settings of HTTP mode."""

    port: int = Field(8000, ge=1, le=65535, description="Port of the HTTP server")
    port_health: int | None = Field(None, ge=1, le=65535, description="Port of the health check; unset: PORT")
    health_check_path: str = Field("/ping", pattern=r"^/\S*$", description="Path of the health check")
    host: str = Field("0.0.0.0", description="Address to listen on")  # noqa: S104 (a container's own)
    api_key: SecretStr | None = Field(
        None,
        description="Key that clients must send, for Pods and laptops; on RunPod the edge checks its own",
    )
    cors_origins: str | None = Field(
        None, description="Origins of browsers that may call, with commas between, or *"
    )
    max_waiting: int | None = Field(
        None, ge=0, le=100_000, description="Requests that wait for a slot; unset: MAX_CONCURRENCY"
    )


class _Server(uvicorn.Server):
    """A server that drains at SIGTERM and SIGINT before it closes its listener; a second signal ends it."""

    def __init__(self, config: uvicorn.Config, admission: Admission) -> None:
        super().__init__(config)
        self._admission = admission

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._admission.state in ("draining", "loading"):
            os._exit(128 + sig)
        log.info("%s: draining %d requests", signal.Signals(sig).name, self._admission.in_flight)
        self._admission.close("draining")


def serve(handler: JobHandler, prepare: startup.Prepare, *, worker: str) -> None:
    """Listen, load the model in another thread, serve until a signal. A dead engine exits with status 1."""
    settings = read_settings(HttpSettings)
    admission = Admission()
    key = settings.api_key.get_secret_value() if settings.api_key else None
    origins = [origin.strip() for origin in (settings.cors_origins or "").split(",") if origin.strip()]
    app = make_app(
        handler,
        admission,
        worker=worker,
        health_path=settings.health_check_path,
        api_key=key,
        origins=origins,
    )
    ports = list(dict.fromkeys([settings.port, settings.port_health or settings.port]))
    servers = [
        _Server(
            uvicorn.Config(
                app, settings.host, port, log_config=None, access_log=False, lifespan="off",
                timeout_keep_alive=KEEP_ALIVE_S, h11_max_incomplete_event_size=64 * 1024,
            ),
            admission,
        )
        for port in ports
    ]  # fmt: skip
    log.info(
        "HTTP on port %d. On RunPod: expose %d/http and set PORT=%d, PORT_HEALTH=%d, HEALTH_CHECK_PATH=%s",
        settings.port, settings.port, settings.port, ports[-1], settings.health_check_path,
    )  # fmt: skip
    flush = telemetry.start_otlp(worker)

    def load(loop: asyncio.AbstractEventLoop) -> None:
        """In a thread of its own: the loop answers `/ping` meanwhile."""
        try:
            loaded = startup.load(prepare, worker=worker)
        except SystemExit:  # a cause that another attempt may not meet: exit, and be replaced
            os._exit(1)
        if isinstance(loaded, StartError):
            admission.cause, admission.state = loaded, "failed"
            return
        handler.max_result_bytes = MAX_RESULT_BYTES
        waiting = loaded.max_concurrency if settings.max_waiting is None else settings.max_waiting
        startup.log_ready()
        loop.call_soon_threadsafe(admission.open, loaded.max_concurrency, waiting)

    async def run() -> None:
        threading.Thread(target=load, args=(asyncio.get_running_loop(),), name="load", daemon=True).start()
        serving = [asyncio.create_task(server.serve()) for server in servers]
        closing = asyncio.create_task(admission.closed.wait())
        await asyncio.wait([*serving, closing], return_when=asyncio.FIRST_COMPLETED)
        await admission.idle.wait()
        for server in servers:
            server.should_exit = True
        await asyncio.gather(*serving)

    asyncio.run(run())
    flush()
    sys.exit(1 if admission.state == "dead" else 0)
