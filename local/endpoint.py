"""What both endpoint types have: a server on 127.0.0.1, and worker processes that are kept alive."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

from local.containers import Container
from local.fleet import Fleet, Work
from local.jobs import Rules
from local.workers import WorkerProcess

T = TypeVar("T")

_TICK = 0.1


class Endpoint(ABC):
    """An endpoint on 127.0.0.1 and its worker processes.

    port: 0 takes a free one.
    require_key: whether clients must send an Authorization header, as on RunPod; any value is accepted.
    echo: print the workers' log lines to standard error.
    shutdown_timeout: seconds that the requests which still run have at the end, once the workers have exited.
    """

    shutdown_timeout = 1.0

    def __init__(
        self,
        work: Work,
        rules: Rules,
        *,
        endpoint_id: str = "local",
        port: int = 0,
        require_key: bool = True,
        echo: bool = False,
    ) -> None:
        self.endpoint_id, self.rules, self._port = endpoint_id, rules, port
        self._fleet = Fleet(work, rules, endpoint_id=endpoint_id, variables=self.variables, echo=echo)
        # A worker or a client that hangs up must be noticed while its request waits.
        self._runner = web.AppRunner(
            self.make_app(require_key=require_key),
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=self.shutdown_timeout,
        )
        self._tasks: set[asyncio.Task[None]] = set()

    @abstractmethod
    def make_app(self, *, require_key: bool) -> web.Application:
        """What listens."""

    @abstractmethod
    def variables(self, worker_id: str) -> Mapping[str, str]:
        """The environment variables of a worker that this type of endpoint sets."""

    @abstractmethod
    def tick(self) -> None:
        """What happens by itself; called ten times a second."""

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`."""
        return f"http://127.0.0.1:{self._port}"

    @property
    @abstractmethod
    def base_url(self) -> str:
        """The address that RunPod's own has the same paths under."""

    @property
    @abstractmethod
    def endpoint_url(self) -> str:
        """The address under which `/runsync` is."""

    @property
    @abstractmethod
    def openai_url(self) -> str:
        """What the `openai` client takes as `base_url`."""

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
        # Each request has a deadline of its own. A body passes as it is, compressed or not.
        self._session = ClientSession(
            connector=TCPConnector(limit=0), timeout=ClientTimeout(total=None), auto_decompress=False
        )
        self._spawn(self._tick())

    async def stop(self) -> None:
        """End the workers, SIGTERM first and SIGKILL after `rules.grace`, then the server."""
        try:
            await self._fleet.stop()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._runner.cleanup()
            await self._session.close()

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
        """The result of `coroutine`, run on the endpoint's loop; for other threads, as under `running`."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            self.tick()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
