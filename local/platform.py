"""A queue endpoint as one object, and either type of endpoint on a thread of its own."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from aiohttp import web

from local.client_api import call_webhook
from local.containers import Container
from local.endpoint import Endpoint
from local.jobs import Job, Rules
from local.load_balancer import LoadBalancer
from local.queue import Queue
from local.server import make_app

ROOT = Path(__file__).resolve().parents[1]


class Platform(Endpoint):
    """A queue endpoint: its workers take jobs with the SDK."""

    def __init__(
        self,
        *,
        endpoint_id: str = "local",
        port: int = 0,
        rules: Rules | None = None,
        require_key: bool = True,
        echo: bool = False,
    ) -> None:
        rules = rules or Rules()
        self._queue = Queue(rules, on_end=self._ended)
        super().__init__(
            self._queue, rules, endpoint_id=endpoint_id, port=port, require_key=require_key, echo=echo
        )

    @property
    def base_url(self) -> str:
        """`http://127.0.0.1:PORT/v2`: what `runpod.endpoint_url_base` takes."""
        return f"{self.url}/v2"

    @property
    def endpoint_url(self) -> str:
        return f"{self.base_url}/{self.endpoint_id}"

    @property
    def openai_url(self) -> str:
        return f"{self.endpoint_url}/openai/v1"

    def make_app(self, *, require_key: bool) -> web.Application:
        return make_app(self._queue, self._fleet, endpoint_id=self.endpoint_id, require_key=require_key)

    def variables(self, worker_id: str) -> Mapping[str, str]:
        return {
            "RUNPOD_PING_INTERVAL": str(round(1000 * self.rules.ping_interval)),
            "RUNPOD_WEBHOOK_GET_JOB": f"{self.endpoint_url}/job-take/$ID?gpu=local",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{self.endpoint_url}/job-done/$RUNPOD_POD_ID/$ID?gpu=local",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{self.endpoint_url}/job-stream/$RUNPOD_POD_ID/$ID?gpu=local",
            "RUNPOD_WEBHOOK_PING": f"{self.endpoint_url}/ping/$RUNPOD_POD_ID?gpu=local",
            # The SDK's checks demand 4 GB of memory, the internet and a GPU.
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            "RUNPOD_SKIP_GPU_CHECK": "true",
        }

    def tick(self) -> None:
        self._fleet.check_pings()
        self._queue.expire()

    def _ended(self, job: Job) -> None:
        if "webhook" in job.payload:
            rules = self.rules
            self._spawn(call_webhook(self._session, job, rules.webhook_retries, rules.webhook_delay))


def find_handler(worker: str | Path) -> Path:
    """The handler file of a worker folder's name, or of a path to a .py file. Raises FileNotFoundError."""
    if str(worker).endswith(".py"):
        handler = Path(worker).resolve()
    else:
        handler = ROOT / "workers" / worker / "handler.py"
    if not handler.is_file():
        known = ", ".join(sorted(path.parent.name for path in ROOT.glob("workers/*/handler.py")))
        raise FileNotFoundError(f"No handler at {handler}. Workers: {known or 'none'}.")
    return handler


@contextmanager
def running(
    worker: str | Path,
    *,
    workers: int = 1,
    env: Mapping[str, str] | None = None,
    rules: Rules | None = None,
    port: int = 0,
    mode: Literal["queue", "http"] = "queue",
    python: str = sys.executable,
    container: Container | None = None,
    ready_timeout: float = 240,
    echo: bool = False,
) -> Iterator[Endpoint]:
    """An endpoint with ready workers, on a thread of its own, for code that is not asynchronous.

    worker: the name of a folder under workers/, or the path of a handler's .py file.
    env: on top of this process's environment and of what RunPod sets.
    mode: queue, which gives a Platform, or http, which gives a LoadBalancer.
    python: the interpreter that runs the handler.
    container: an image that is run in the handler's place.
    ready_timeout: seconds.
    Raises FileNotFoundError, WorkerFailed, TimeoutError, OSError (port taken).
    """
    handler = find_handler(worker)
    paths = [str(ROOT), *filter(None, [(env or {}).get("PYTHONPATH", os.environ.get("PYTHONPATH"))])]
    worker_env = dict(env or {}) if container else {**(env or {}), "PYTHONPATH": os.pathsep.join(paths)}
    if handler.parent.parent == ROOT / "workers":
        command, cwd = [python, "-u", "-m", f"workers.{handler.parent.name}.handler"], ROOT
    else:
        command, cwd = [python, "-u", handler.name], handler.parent
    kind: type[Platform] | type[LoadBalancer] = LoadBalancer if mode == "http" else Platform
    endpoint = kind(port=port, rules=rules, echo=echo)

    async def add_workers() -> None:
        for _ in range(workers):
            await endpoint.add_worker(container or command, cwd=cwd, env=worker_env)
        await endpoint.wait_ready(ready_timeout, workers)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="local-endpoint", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(endpoint.start(), loop).result()
        try:
            endpoint.call(add_workers())
            yield endpoint
        finally:
            endpoint.call(endpoint.stop())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
