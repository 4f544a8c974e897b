"""An inference server (vLLM, TGI) as a child process on loopback, and the client that speaks to it.

    server = EngineServer("vllm", lambda port: ["vllm", "serve", path, "--port", str(port)])
    server.start()  # until its health answers; StartError says why it cannot
    answer = await server.request("POST", "/v1/completions", body)
    async for events in relay(server.stream("/v1/completions", body)):
        yield events

A child process, because an engine's Python interfaces change with every release and its pins do not go with
the SDK's; its command line and its HTTP routes are what stays. One hop costs half a millisecond a request.

Any end of the child is a crash, whatever its exit status. Jobs in flight get an error with the code
`engine_died`, upon which the worker asks to be replaced, and the worker exits with status 1 as soon as their
results are posted: an idle one at once. So does an engine end whose health is silent for `hang_timeout`.

The child leads a session of its own, so that a SIGTERM to the worker's group does not end it before the SDK
has drained. It is ended with the worker's process: at exit, and by the reaper where there was none.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from serving.engine_server import reaper
from serving.engine_server.client import EngineClient
from serving.engine_server.log_causes import classify_log
from shared.errors import ENGINE_DIED, JobError, StartError
from shared.logs import log, redact

START_TRIES = 3  # a free port may be taken before the child binds it
LAST_LINES = 200
LINE_LENGTH = 4000  # RunPod's log cuts there
POST_S = 15.0  # what the SDK may take to post the errors of the jobs in flight
_PORT_TAKEN = re.compile(r"address already in use|errno: ?98|errno 98|EADDRINUSE", re.IGNORECASE)
_LEVEL = re.compile(r"\b(WARNING|WARN|ERROR|CRITICAL)\b")
_NOT_FOR_ENGINE = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RUNPOD_AI_API_KEY")


class EngineFailed(RuntimeError):
    """The engine did not start, for a cause that a new try may mend."""


class EngineServer(EngineClient):
    """The child process and its client.

    name: for the log. command: the argv for a port that was found free. port: one to prefer; another is taken
    where it is in use. env: on top of this process's own environment, None removes a variable. health: the
    route that answers 200 when the engine can work.

    start_timeout: seconds until the engine must answer. hang_timeout: seconds of silent health after which
    an engine that had started counts as dead. grace: seconds from SIGTERM to SIGKILL.
    on_death: called when the engine has died by itself and no job is in flight; exits the process.
    in_flight: how many jobs the worker has in flight.
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
        on_death: Callable[[], None] | None = None,
        in_flight: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__("http://127.0.0.1:0")
        self.name = name
        self.command = command
        self.env = dict(env or {})
        self.health = health
        self.start_timeout, self.hang_timeout, self.grace = start_timeout, hang_timeout, grace
        self._wish = port
        self._on_death, self._in_flight = on_death or _exit, in_flight
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._ended = threading.Event()  # the child has exited
        self._stopping = False
        self._death: str | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id, which is also its session's."""
        return self._process.pid if self._process else None

    @property
    def last_lines(self) -> list[str]:
        """What the child wrote last, without secrets."""
        return list(self._lines)

    # ---- start ----

    def start(self) -> None:
        """Start the child and wait until its health answers. To be called from the main thread.

        Raises StartError when there is no such program or its last lines tell a cause that a new try cannot
        mend, else EngineFailed.
        """
        for left in reversed(range(START_TRIES)):
            self._launch()
            try:
                self._wait_ready()
            except BaseException:
                self.stop()
                if left and any(_PORT_TAKEN.search(line) for line in self._lines):
                    log.warning("%s: port taken, trying another one", self.name)
                    self._wish = None
                    continue
                raise
            threading.Thread(target=self._watch, name=f"{self.name}-watch", daemon=True).start()
            return

    def _launch(self) -> None:
        port = _free_port(self._wish)
        if self._wish and port != self._wish:
            log.warning("%s: port %d is in use, taking %d", self.name, self._wish, port)
        self.url = f"http://127.0.0.1:{port}"
        env = {key: value for key, value in os.environ.items() if key not in _NOT_FOR_ENGINE}
        for key, value in self.env.items():
            env.pop(key, None)
            if value is not None:
                env[key] = value
        argv = list(self.command(port))
        log.info("%s: %s", self.name, shlex.join(argv))
        self._lines.clear()
        self._ended, self._stopping, self._death = threading.Event(), False, None
        try:
            process = self._process = subprocess.Popen(
                argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            message = f"{argv[0]} cannot be started: {error.strerror}. Use the image that has it."
            raise StartError(message, code="no_engine") from error
        log.info("%s: process %d at %s", self.name, process.pid, self.url)
        numbers = [str(number) for number in (os.getpid(), process.pid, self.grace)]
        guard = [sys.executable, "-I", "-S", reaper.__file__, *numbers]
        self._guard = subprocess.Popen(guard, stdin=subprocess.DEVNULL, start_new_session=True)
        atexit.register(self.stop)
        self._reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        self._reader.start()
        threading.Thread(target=_wait, args=(process, self._ended), daemon=True).start()

    def _wait_ready(self) -> None:
        begun = said = time.monotonic()
        while not self._ended.wait(0.1):
            if self.get(self.health)[0] == 200 and not self._ended.is_set():
                return
            now = time.monotonic()
            if now - begun > self.start_timeout:
                raise EngineFailed(f"{self.name} did not answer within {self.start_timeout:g} s.")
            if now - said > 30:
                said = now
                log.info("%s: starting for %.0f s", self.name, now - begun)
        self._reader.join(timeout=5)
        if cause := classify_log(self._lines):
            raise cause
        status = self._process.returncode if self._process else None
        raise EngineFailed(f"{self.name} ended with status {status} before it was ready.")

    # ---- watch ----

    def _watch(self) -> None:
        """Until the engine ends: that alone is the end of this worker, unless `stop` has asked for it."""
        ended, heard = self._ended, time.monotonic()
        interval = min(5.0, self.hang_timeout / 4)
        while not ended.wait(interval):
            if self.get(self.health, timeout=interval)[0] == 200:
                heard = time.monotonic()
            elif time.monotonic() - heard > self.hang_timeout:
                self._dies(f"its health was silent for {self.hang_timeout:g} s")
                break
        else:
            assert self._process is not None
            self._dies(f"it ended with status {self._process.returncode}")
        if self._stopping:
            return
        deadline = time.monotonic() + POST_S
        while self._in_flight() and time.monotonic() < deadline:
            time.sleep(0.05)
        self._on_death()

    def _dies(self, reason: str) -> None:
        if self._stopping:
            return
        self._death = reason
        log.error("%s died: %s. The worker ends, and RunPod replaces it.", self.name, reason)
        assert self._process is not None
        reaper.end(self._process.pid, 0)  # what still hangs on: jobs wait for its connections

    async def _check(self) -> None:
        """A failure of the engine itself (5xx, an error in a stream): is it one job's, or is the engine dead?

        A vLLM whose core has died says so by its health at once and exits a second later.
        """
        if self._ended.is_set() or (await asyncio.to_thread(self.get, self.health))[0] != 200:
            raise self._died()

    async def _lost(self, error: Exception) -> JobError:
        # The connection may break before the exit is known.
        for _ in range(20):
            if self._ended.is_set() or self._death:
                return self._died()
            await asyncio.sleep(0.05)
        if (await asyncio.to_thread(self.get, self.health))[0] != 200:
            return self._died()
        return await super()._lost(error)

    def _died(self) -> JobError:
        return JobError(
            f"The engine died{f': {self._death}' if self._death else ''}. Send the job again: this worker is "
            "being replaced.",
            code=ENGINE_DIED,
            type="server_error",
        )

    # ---- stop ----

    def stop(self) -> None:
        """End the child and all that it started: SIGTERM, and SIGKILL after `grace` seconds. Runs at exit."""
        self._stopping = True
        atexit.unregister(self.stop)
        if self._process is not None:
            reaper.end(self._process.pid, self.grace)
            self._ended.wait(5)
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
            self._guard = None

    # ---- its output ----

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as output:
            rest = b""
            while data := os.read(output.fileno(), 65536):
                *lines, rest = re.split(rb"[\r\n]+", rest + data)
                if len(rest) > LINE_LENGTH:
                    lines, rest = [*lines, rest], b""
                for line in filter(None, lines):
                    self._say(line)
            if rest:
                self._say(rest)

    def _say(self, line: bytes) -> None:
        text = redact(line[:LINE_LENGTH].decode(errors="replace"))
        self._lines.append(text)
        level = _LEVEL.search(text[:80])
        (log.warning if level else log.info)("%s: %s", self.name, text)


def _wait(process: subprocess.Popen[bytes], ended: threading.Event) -> None:
    process.wait()
    ended.set()


def _exit() -> None:
    """End this process now, with status 1: the SDK's loop may wait 90 s for a job."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(1)


def _free_port(wish: int | None) -> int:
    """`wish` where nobody listens on it, else a port that is free now."""
    for port in filter(None, [wish]):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            probe.listen()
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found
