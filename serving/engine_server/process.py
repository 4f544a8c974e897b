"""An inference server (vLLM, TGI) as a child process on loopback, with its client.

    server = EngineServer("vllm", lambda port: ["vllm", "serve", path, "--port", str(port)],
                          on_death=lambda error: handler.on_engine_death(error))
    server.start()  # returns when its health route answers; StartError has the cause if it cannot
    server.prove(prewarm)  # returns when the worker's own first requests are answered
    answer = await server.request("POST", "/v1/completions", body)
    async for events in relay(server.stream("/v1/completions", body)):
        yield events

A child process, because an engine's Python interfaces change with every release and its pinned packages
conflict with the SDK's; its command line and its HTTP routes are stable. The hop costs half a millisecond a
request.

Every exit of the child is a crash, whatever its status. Jobs in flight get an error with the code
`engine_died`, and `on_death` ends the worker, which is then replaced; see `shared.startup.serve`. An engine
whose health route is silent for `hang_timeout` is killed. One that dies before `prove` has returned is
started once more, and then given up.

The child leads a session of its own, so that a SIGTERM to the worker's group does not end it before the SDK
has drained. The child ends with the worker's process: at exit, or by the reaper if the worker was killed.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from serving.engine_server import reaper
from serving.engine_server.client import EngineClient
from serving.engine_server.launch import choose_port, environment, start_reaper
from serving.engine_server.log_causes import classify_log, first_error
from serving.engine_server.output import Output
from shared.errors import ENGINE_DIED, JobError, StartError
from shared.logs import log

START_TRIES = 3  # another process may take the port before the child binds it
DYING_S = 15.0  # a vLLM whose core has died exits a second later
_PORT_TAKEN = re.compile(r"address already in use|errno: ?98|errno 98|EADDRINUSE", re.IGNORECASE)


class EngineFailed(RuntimeError):
    """The engine did not start, for a cause that may be temporary."""


class EngineServer(EngineClient):
    """The child process and its client.

    name: for the log. command: the argv for a port. port: the preferred port; another one where it is in use.
    env: on top of this process's environment; None removes a variable. health: the route that answers 200
    when the engine can work.

    start_timeout: seconds until the engine must answer. hang_timeout: seconds of silent health after which a
    started engine counts as dead. grace: seconds from SIGTERM to SIGKILL.
    on_death: called with the error of the jobs in flight when a proven engine has died, in a thread of its
    own; default: exit the process with status 1.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[int], Sequence[str]],
        *,
        port: int | None = None,
        env: Mapping[str, str | None] | None = None,
        health: str = "/health",
        start_timeout: float = 1800,
        hang_timeout: float = 60,
        grace: float = 10,
        on_death: Callable[[JobError], None] = lambda _: os._exit(1),
    ) -> None:
        super().__init__("")  # `_launch` sets the URL
        self.name = name
        self.command = command
        self.env = dict(env or {})
        self.health = health
        self.start_timeout, self.hang_timeout, self.grace = start_timeout, hang_timeout, grace
        self._preferred_port = port
        self._on_death = on_death
        self._process: subprocess.Popen[bytes] | None = None
        self._reaper: subprocess.Popen[bytes] | None = None
        self._output: Output | None = None
        self._exited = threading.Event()  # the child has exited
        self._stopping = False
        self._death: str | None = None
        self._proven = False  # from now on a death ends the worker
        self._proving = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The child's process id, which is also its session's."""
        return self._process.pid if self._process else None

    @property
    def last_lines(self) -> list[str]:
        """The last lines that the child has written, without secrets."""
        return list(self._output.last_lines) if self._output else []

    @property
    def death(self) -> str | None:
        """Why the engine has died; None while it has not."""
        return self._death

    # ---- start ----

    def start(self) -> None:
        """Start the child and wait until its health route answers.

        Raises StartError where there is no such program or the last lines of its log have a permanent cause,
        else EngineFailed.
        """
        for tries_left in reversed(range(START_TRIES)):
            self._launch()
            try:
                self._wait_ready()
            except BaseException:
                self.stop()
                if tries_left and any(map(_PORT_TAKEN.search, self.last_lines)):
                    log.warning("%s: port taken, trying another one", self.name)
                    self._preferred_port = None
                    continue
                raise
            self._watcher = threading.Thread(target=self._watch, name=f"{self.name}-watch", daemon=True)
            self._watcher.start()
            return

    def prove(self, requests: Callable[[], None]) -> None:
        """Run `requests`, the worker's own first ones. An engine that dies of them is started once more.

        Raises StartError where it dies again: the next worker's would too, and a crash loop bills. An error
        of `requests` that leaves the engine alive is raised.
        """
        cause = self._death_of(requests)
        if cause is None:
            return
        log.warning("%s Starting it once more.", cause.message)
        self.stop()
        self._watcher.join()
        try:
            self.start()
        except EngineFailed as error:
            raise _failed(str(error)) from None
        if again := self._death_of(requests):
            raise again

    def _death_of(self, requests: Callable[[], None]) -> StartError | None:
        """The cause of the engine's death during `requests`; None where it lives, and is proven."""
        try:
            requests()
        except Exception:
            if self.get(self.health)[0] == 200:
                raise
            self._exited.wait(DYING_S)
        else:
            with self._proving:
                self._proven = self._death is None and not self._exited.is_set()
            if self._proven:
                return None
        lines = self._all_lines()
        line = first_error(lines) or self._death or "it did not say why"
        return classify_log(lines) or _failed(f"{self.name} died of its first requests: {line}")

    def _launch(self) -> None:
        port = choose_port(self._preferred_port)
        self.url = f"http://127.0.0.1:{port}"
        env = environment(self.env)
        argv = list(self.command(port))
        log.info("%s: %s", self.name, shlex.join(argv))
        self._exited, self._stopping, self._death = threading.Event(), False, None
        try:
            process = self._process = subprocess.Popen(
                argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            message = f"{argv[0]} cannot be started: {error.strerror}. Use the image that has it."
            raise StartError(message, code="no_engine") from error
        log.info("%s: process %d at %s", self.name, process.pid, self.url)
        self._reaper = start_reaper(process.pid, self.grace)
        atexit.register(self.stop)
        self._output = Output(self.name, process)
        threading.Thread(target=_wait, args=(process, self._exited), daemon=True).start()

    def _wait_ready(self) -> None:
        started = last_logged = time.monotonic()
        while not self._exited.wait(0.1):
            if self.get(self.health)[0] == 200 and not self._exited.is_set():
                return
            now = time.monotonic()
            if now - started > self.start_timeout:
                raise EngineFailed(f"{self.name} did not answer within {self.start_timeout:g} s.")
            if now - last_logged > 30:
                last_logged = now
                log.info("%s: starting for %.0f s", self.name, now - started)
        if cause := classify_log(self._all_lines()):
            raise cause
        status = self._process.returncode if self._process else None
        raise EngineFailed(f"{self.name} ended with status {status} before it was ready.")

    def _all_lines(self) -> list[str]:
        """The last lines of a child that has ended."""
        assert self._output is not None
        self._output.wait_for_end()
        return self.last_lines

    # ---- watch ----

    def _watch(self) -> None:
        """Wait until the engine dies, and end the worker.

        Returns if `stop` ended the engine, or if it was not proven.
        """
        exited, last_healthy = self._exited, time.monotonic()
        interval = min(5.0, self.hang_timeout / 4)
        while not exited.wait(interval):
            if self.get(self.health, timeout=interval)[0] == 200:
                last_healthy = time.monotonic()
            elif time.monotonic() - last_healthy > self.hang_timeout:
                self._declare_dead(f"its health was silent for {self.hang_timeout:g} s")
                break
        else:
            assert self._process is not None
            self._declare_dead(f"it ended with status {self._process.returncode}")
        with self._proving:
            if self._stopping or not self._proven:
                return
        log.error("The worker ends, and RunPod replaces it.")
        self._on_death(self._died())

    def _declare_dead(self, reason: str) -> None:
        """Record the death, and kill what is left of the engine: jobs wait for its connections."""
        if self._stopping:
            return
        self._death = reason
        log.error("%s died: %s.", self.name, reason)
        assert self._process is not None
        reaper.end(self._process.pid, 0)

    async def _raise_if_dead(self) -> None:
        """Raise JobError(code=ENGINE_DIED) if the engine is dead, and not one job alone has failed.

        A vLLM whose core has died answers its health route with an error at once, and exits a second later.
        """
        if self._exited.is_set() or not await self._is_healthy():
            raise self._died()

    async def _connection_lost(self, error: Exception) -> JobError:
        for _ in range(20):  # the connection may break before the exit is known
            if self._exited.is_set() or self._death:
                return self._died()
            await asyncio.sleep(0.05)
        if not await self._is_healthy():
            return self._died()
        return await super()._connection_lost(error)

    async def _is_healthy(self) -> bool:
        return (await asyncio.to_thread(self.get, self.health))[0] == 200

    def _died(self) -> JobError:
        return JobError(
            f"The engine died{f': {self._death}' if self._death else ''}. Send the job again: this worker is "
            "being replaced.",
            code=ENGINE_DIED,
            type="server_error",
        )

    # ---- stop ----

    def stop(self) -> None:
        """End the child and all processes that it started: SIGTERM, and SIGKILL after `grace` seconds."""
        self._stopping = True
        atexit.unregister(self.stop)
        if self._process is not None:
            reaper.end(self._process.pid, self.grace)
            self._exited.wait(5)
        if self._reaper is not None:
            self._reaper.kill()
            self._reaper.wait()
            self._reaper = None


def _failed(cause: str) -> StartError:
    message = f"{cause.rstrip('.')}. Use another model or GPU, or change the engine's settings."
    return StartError(message, code="engine_failed")


def _wait(process: subprocess.Popen[bytes], exited: threading.Event) -> None:
    process.wait()
    exited.set()
