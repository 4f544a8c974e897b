"""Real servers: the toy worker in HTTP mode, as a process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil

from tests.helpers import wait_until
from tools.workers import ROOT


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
    return port


class Server:
    """A running worker. log: its lines so far."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port
        self.url = f"http://127.0.0.1:{port}"
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        self.log.extend(self.process.stdout)

    def ping(self) -> int | None:
        try:
            return httpx.get(f"{self.url}/ping", timeout=5).status_code
        except httpx.TransportError:
            return None

    def health(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.url}/health", timeout=5).json()
        return answer

    def work(self, **payload: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/runsync", json={"input": payload}, timeout=60)

    def rss(self) -> int:
        size: int = psutil.Process(self.process.pid).memory_info().rss
        return size

    def descriptors(self) -> int:
        count: int = psutil.Process(self.process.pid).num_fds()
        return count

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def send(self, path: str, body: bytes, *headers: str) -> socket.socket:
        """A connection with one POST request sent."""
        connection = self.connect()
        head = "\r\n".join([f"POST {path} HTTP/1.1", "host: x", *headers, f"content-length: {len(body)}"])
        connection.sendall(f"{head}\r\n\r\n".encode() + body)
        return connection

    def end(self, seconds: float = 30) -> int:
        """The exit status."""
        status = self.process.wait(seconds)
        self._reader.join(5)
        return status


@contextmanager
def running(
    *args: str,
    module: str = "tests.shared.http.toy",
    until_ping: int | None = 200,
    port: int | None = None,
    **env: str,
) -> Iterator[Server]:
    """The toy worker, or another one's `module`, with these arguments and environment variables.

    until_ping: the status to wait for.
    """
    port = port or free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "RUNPOD_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", module, *args],
        env=clean | {"SERVE_MODE": "http", "PORT": str(port), "HOST": "127.0.0.1"} | env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    server = Server(process, port)
    try:
        if until_ping:
            wait_until(lambda: server.ping() == until_ping or process.poll() is not None, 180)
            assert process.poll() is None, "".join(server.log)
        yield server
    finally:
        process.kill()
        process.wait()
