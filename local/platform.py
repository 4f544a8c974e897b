"""The platform as one object: queue, server and workers, on an event loop or on a thread of its own."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from aiohttp import ClientSession, web

from local.client_api import call_webhook
from local.containers import Container
from local.fleet import Fleet
from local.jobs import Job, Rules
from local.queue import Queue
from local.server import make_app
from local.workers import WorkerProcess

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
_TICK = 0.1


class Platform:
    """An endpoint on 127.0.0.1 and its worker processes.

    port: 0 takes a free one.
    require_key: whether clients must send an Authorization header, as on RunPod; any value is accepted.
    echo: print the workers' log lines to standard error.
    """

    def __init__(
        self,
        *,
        endpoint_id: str = "local",
        port: int = 0,
        rules: Rules | None = None,
        require_key: bool = True,
        echo: bool = False,
    ) -> None:
        self.endpoint_id, self._require_key = endpoint_id, require_key
        self.rules = rules or Rules()
        self._port = port
        self._queue = Queue(self.rules, on_end=self._ended)
        self._fleet = Fleet(self._queue, self.rules, endpoint_id=endpoint_id, echo=echo)
        # A worker or a client that hangs up must be noticed while its request waits.
        self._runner = web.AppRunner(
            self.make_app(), access_log=None, handler_cancellation=True, shutdown_timeout=1
        )
        self._tasks: set[asyncio.Task[None]] = set()

    def make_app(self) -> web.Application:
        """What listens: the queue's API for workers, and the public one for clients."""
        return make_app(self._queue, self._fleet, endpoint_id=self.endpoint_id, require_key=self._require_key)

    @property
    def base_url(self) -> str:
        """`http://127.0.0.1:PORT/v2`: what `runpod.endpoint_url_base` takes."""
        return f"http://127.0.0.1:{self._port}/v2"

    @property
    def endpoint_url(self) -> str:
        return f"{self.base_url}/{self.endpoint_id}"

    @property
    def openai_url(self) -> str:
        """What the `openai` client takes as `base_url`."""
        return f"{self.endpoint_url}/openai/v1"

    @property
    def workers(self) -> list[WorkerProcess]:
        """The workers that live, and those that failed and are not (yet) replaced."""
        return list(self._fleet.workers)

    async def start(self) -> None:
        """Listen. Raises OSError when the port is taken."""
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        self._port = self._runner.addresses[0][1]
        self._loop = self._fleet.loop = asyncio.get_running_loop()
        self._fleet.url = self.endpoint_url
        self._session = ClientSession()
        self._spawn(self.tick())

    async def stop(self) -> None:
        """End the workers, SIGTERM first and SIGKILL after `rules.grace`, then the server."""
        try:
            await self._fleet.stop()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._session.close()
            await self._runner.cleanup()

    async def add_worker(
        self, command: Sequence[str] | Container, *, cwd: Path, env: Mapping[str, str] | None = None
    ) -> WorkerProcess:
        """Start a worker process and keep it alive, as `rules` say.

        env: on top of this process's environment and of what RunPod sets.
        """
        return await self._fleet.add(command, cwd, env or {})

    async def wait_ready(self, timeout: float, count: int = 1) -> None:  # noqa: ASYNC109 (adds the logs)
        """Wait until `count` workers are ready: they have asked for a job, or answered /ping with 200.

        Raises WorkerFailed as soon as one has died before that, TimeoutError after `timeout` seconds.
        """
        try:
            async with asyncio.timeout(timeout):
                await self._fleet.ready(count)
        except TimeoutError:
            logs = "".join(f"\n{worker}:\n{worker.tail()}" for worker in self.workers)
            raise TimeoutError(f"After {timeout:g} s not {count} workers are ready.{logs}") from None

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of `coroutine`, run on the platform's loop; for other threads, as under `running`."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def tick(self) -> None:
        """What happens by itself: pings are checked, and jobs expire."""
        while True:
            await asyncio.sleep(_TICK)
            self._fleet.check_pings()
            self._queue.expire()

    def _ended(self, job: Job) -> None:
        if "webhook" in job.payload:
            rules = self.rules
            self._spawn(call_webhook(self._session, job, rules.webhook_retries, rules.webhook_delay))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


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
) -> Iterator[Platform]:
    """A platform with ready workers, on a thread of its own, for code that is not asynchronous.

    worker: the name of a folder under workers/, or the path of a handler's .py file.
    env: on top of this process's environment and of what RunPod sets.
    mode: the endpoint type; http is a load balancer. python: the interpreter that runs the handler.
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
    from local.load_balancer import LoadBalancer  # which is a Platform

    kind = LoadBalancer if mode == "http" else Platform
    platform = kind(port=port, rules=rules, echo=echo)

    async def add_workers() -> None:
        for _ in range(workers):
            await platform.add_worker(container or command, cwd=cwd, env=worker_env)
        await platform.wait_ready(ready_timeout, workers)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="local-platform", daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(platform.start(), loop).result()
        try:
            platform.call(add_workers())
            yield platform
        finally:
            platform.call(platform.stop())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
