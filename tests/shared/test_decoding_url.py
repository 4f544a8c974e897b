"""Downloads from a real server on loopback, which counts as public at one address: PUBLIC, `allowed.test`."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from shared import download
from shared.decoding import load_bytes
from shared.errors import JobError
from tests.helpers import until

SECRET, PUBLIC = "hunter2", "127.9.9.9"
Reply = list[bytes | float]


class Server:
    """Sends `replies[path]`, in which a float is a pause in seconds, and records the paths."""

    def __init__(self) -> None:
        self.replies: dict[str, Reply] = {}
        self.requested: list[str] = []
        self.client_gone = threading.Event()
        self.socket = socket.create_server(("0.0.0.0", 0))
        self.base = f"http://allowed.test:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        with connection:
            path = connection.recv(65536).split()[1].decode().partition("?")[0]
            self.requested.append(path)
            try:
                for part in self.replies[path]:
                    if isinstance(part, float):
                        time.sleep(part)
                    else:
                        connection.sendall(part)
            except OSError:
                self.client_gone.set()


def body(data: bytes) -> Reply:
    return [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data), data]


def redirect(url: str) -> Reply:
    return [f"HTTP/1.1 302 Found\r\nLocation: {url}\r\nContent-Length: 0\r\n\r\n".encode()]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    is_public, getaddrinfo = download.is_public, socket.getaddrinfo

    def look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if str(host).endswith(".invalid"):  # a name server that is out of reach takes half a minute
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return getaddrinfo(PUBLIC if host == "allowed.test" else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(download, "is_public", lambda address: address == PUBLIC or is_public(address))
    monkeypatch.setenv("http_proxy", f"http://user:{SECRET}@127.0.0.1:1")  # not used: it would hide addresses
    monkeypatch.delenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", raising=False)
    server = Server()
    yield server
    server.socket.close()


async def refused(url: str, **limits: Any) -> JobError:
    with pytest.raises(JobError) as caught:
        await load_bytes(url, param="image_url", **limits)
    error = caught.value
    assert error.param == "image_url"
    assert error.message.startswith("image_url: ")
    assert SECRET not in str(error.body())
    # A traceback in the log would print the URL.
    assert error.__suppress_context__ or error.__context__ is None
    return error


async def test_a_body_arrives_after_a_redirect_too(server: Server) -> None:
    data = bytes(range(256)) * 1000
    server.replies |= {"/a": redirect("/b"), "/b": body(data)}
    assert await load_bytes(f"  {server.base}/b?c=d\n", param="x") == data
    assert await load_bytes(f"{server.base}/a", param="x") == data


PRIVATE = ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]"]
PRIVATE += ["169.254.169.254", "[fe80::1]", "10.0.0.1", "[::ffff:10.0.0.1]", "172.16.0.1", "192.168.1.1"]
PRIVATE += ["100.64.0.1", "[fd00::1]", "224.0.0.1"]


@pytest.mark.parametrize("host", PRIVATE)
async def test_addresses_that_are_not_public_are_refused(server: Server, host: str) -> None:
    port = server.base.rpartition(":")[2]
    server.replies["/meta-data"] = body(b"credentials")
    error = await refused(f"http://user:{SECRET}@{host}:{port}/meta-data?sig={SECRET}")
    assert "non-public" in error.message
    assert server.requested == []
    server.replies["/a"] = redirect(f"http://{host}:{port}/meta-data?sig={SECRET}")
    assert "non-public" in (await refused(f"{server.base}/a")).message
    assert server.requested == ["/a"]


async def test_the_sdks_variable_allows_private_addresses(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    monkeypatch.delenv("http_proxy")
    server.replies["/a"] = body(b"private")
    assert await load_bytes(server.base.replace("allowed.test", "localhost") + "/a", param="x") == b"private"


@pytest.mark.parametrize("target", [f"file:///etc/{SECRET}", f"ftp://u:{SECRET}@h/ a", "http://", "/a"])
async def test_redirects_without_an_end_are_refused(server: Server, target: str) -> None:
    server.replies["/a"] = redirect(target)
    await refused(f"{server.base}/a?sig={SECRET}")


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{SECRET}@",
        f"http:///{SECRET}",
        f"http://allowed.test:{SECRET}/",
        f"http://user:{SECRET}@allowed.test:99999/",
        f"http://[{SECRET}/",
        f"http://{'a' * 70}.test/{SECRET}",
        f"https://allowed.test:1/?{SECRET}",
        f"http://allowed.test:1/?{SECRET}",
        f"http://no-such-host.invalid/?{SECRET}",
        f"http:{SECRET}",
        "http://2130706433/",  # 127.0.0.1
    ],
)
async def test_broken_urls_are_refused_without_being_quoted(server: Server, url: str) -> None:
    assert (await refused(url)).code == "download_failed"


@pytest.mark.parametrize(
    ("reply", "code", "text"),
    [
        *(
            (f"{status} Nope\r\nContent-Length: 0\r\n\r\n", "download_failed", str(status))
            for status in (204, 304, 404, 500)
        ),
        ("200 OK\r\nContent-Length: 0\r\n\r\n", "empty", "empty"),
        ("200 OK\r\nContent-Length: 100\r\n\r\nonly this", "download_failed", "failed"),
        ("200 OK\r\nContent-Length: 2000000\r\n\r\n" + "x" * 2_000_000, "too_large", "1000000 bytes"),
        ("200 OK\r\nConnection: close\r\n\r\n" + "x" * 2_000_000, "too_large", "1000000 bytes"),
    ],
    ids=["204", "304", "404", "500", "empty", "short", "large", "large, of unknown length"],
)
async def test_http_errors_of_a_download(server: Server, reply: str, code: str, text: str) -> None:
    server.replies["/a"] = [f"HTTP/1.1 {reply}".encode()]
    error = await refused(f"{server.base}/a?sig={SECRET}", max_bytes=1_000_000)
    assert error.code == code
    assert text in error.message


# The server sends headers for 3 s, a body for 20 s, unless its connection breaks.
DRIPS: dict[str, Reply] = {
    "silence": [60.0],
    "header": [b"HTTP/1.1 200 OK\r\nX-Slow: ", *[0.05, b"x"] * 60],
    "headers": [b"HTTP/1.1 200 OK\r\n", *[0.05, b"X-Slow: x\r\n"] * 60],
    "body": [b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n", *[0.05, b"x"] * 400],
    "chunks": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[0.05, b"1\r\nx\r\n"] * 400],
}


@pytest.mark.parametrize("drip", DRIPS)
async def test_a_slow_server_cannot_exceed_the_time_limit(server: Server, drip: str) -> None:
    """A limit that does not hold gives another code. The server sees the connection's end."""
    server.replies["/a"] = DRIPS[drip]
    started = time.monotonic()
    assert (await refused(f"{server.base}/a?sig={SECRET}", timeout_s=0.5)).code == "download_timeout"
    assert time.monotonic() - started > 0.4
    if drip != "silence":
        assert await asyncio.to_thread(server.client_gone.wait, 15)


async def test_a_cancelled_job_ends_its_download(server: Server) -> None:
    server.replies["/a"] = DRIPS["body"]
    task = asyncio.create_task(load_bytes(f"{server.base}/a", param="x"))
    await until(lambda: server.requested)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.client_gone.wait, 15)


async def test_slow_downloads_leave_the_threads_to_later_ones(server: Server) -> None:
    server.replies |= {"/slow": DRIPS["body"], "/fast": body(b"picture")}
    await asyncio.gather(*(refused(f"{server.base}/slow", timeout_s=0.3) for _ in range(20)))
    assert await load_bytes(f"{server.base}/fast", param="x", timeout_s=5) == b"picture"
