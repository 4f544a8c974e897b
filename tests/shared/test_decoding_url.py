"""Downloads, through the SDK's own check of addresses and against a real server on loopback.

Loopback is refused, so that a test of anything else needs one host that passes. Patched, and nothing else:
`rp_ssrf.resolve_and_validate` gives 127.0.0.1 for `allowed.test`; every other host meets the SDK's own check.
"""

import asyncio
import socket
import threading
import time

import pytest

from shared.decoding import load_bytes
from shared.errors import JobError

SECRET = "hunter2"


class Server:
    """Sends `replies[path]` and counts; a float among the pieces is a pause in seconds."""

    def __init__(self):
        self.replies: dict[str, list[bytes | float]] = {}
        self.asked: list[str] = []
        self.client_gone = threading.Event()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection):
        with connection:
            request = connection.recv(65536)
            path = request.split()[1].decode().partition("?")[0]
            self.asked.append(path)
            try:
                for piece in self.replies[path]:
                    if isinstance(piece, float):
                        time.sleep(piece)
                    else:
                        connection.sendall(piece)
            except OSError:
                self.client_gone.set()


def body(data: bytes) -> list[bytes | float]:
    return [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data), data]


def redirect(url: str) -> list[bytes | float]:
    return [f"HTTP/1.1 302 Found\r\nLocation: {url}\r\nContent-Length: 0\r\n\r\n".encode()]


@pytest.fixture
def server(monkeypatch):
    from runpod.serverless.utils import rp_ssrf

    checked, found = rp_ssrf.resolve_and_validate, socket.getaddrinfo

    def look_up(host, *arguments, **options):
        if str(host).endswith(".invalid"):  # a name server that is out of reach takes half a minute to say so
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return found(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(
        rp_ssrf,
        "resolve_and_validate",
        lambda host, port: ["127.0.0.1"] if host == "allowed.test" else checked(host, port),
    )
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", raising=False)
    server = Server()
    yield server
    server.socket.close()


async def refusal(url: str, **limits) -> JobError:
    with pytest.raises(JobError) as caught:
        await load_bytes(url, param="image_url", **limits)
    error = caught.value
    assert error.param == "image_url"
    assert error.message.startswith("image_url: ")
    assert SECRET not in str(error.body())
    assert error.__suppress_context__ or error.__context__ is None, (
        "a traceback in the log would print the URL"
    )
    return error


async def test_a_body_arrives(server):
    data = bytes(range(256)) * 1000
    server.replies["/a"] = body(data)
    assert await load_bytes(f"  http://allowed.test:{server.port}/a?b=c\n", param="x") == data


async def test_a_redirect_to_an_allowed_host_is_followed(server):
    server.replies["/a"] = redirect("/b")
    server.replies["/b"] = body(b"picture")
    assert await load_bytes(f"http://allowed.test:{server.port}/a", param="x") == b"picture"


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "2130706433",
        "0.0.0.0",
        "[::ffff:127.0.0.1]",
        "169.254.169.254",
        "[fe80::1]",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "[fd00::1]",
        "224.0.0.1",
    ],
)
async def test_addresses_that_are_not_public_are_refused(server, host):
    server.replies["/latest/meta-data"] = body(b"credentials")
    error = await refusal(f"http://user:{SECRET}@{host}:{server.port}/latest/meta-data?sig={SECRET}")
    assert "non-public" in error.message
    assert server.asked == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "169.254.169.254", "10.0.0.1", "[::ffff:10.0.0.1]"]
)
async def test_a_redirect_into_a_private_address_is_refused(server, host):
    server.replies["/a"] = redirect(f"http://{host}:{server.port}/inside?sig={SECRET}")
    server.replies["/inside"] = body(b"credentials")
    error = await refusal(f"http://allowed.test:{server.port}/a")
    assert "non-public" in error.message
    assert server.asked == ["/a"]


@pytest.mark.parametrize("target", [f"file:///etc/{SECRET}", f"ftp://u:{SECRET}@h/ a", "http://", "/a"])
async def test_redirects_that_lead_nowhere_are_refused(server, target):
    server.replies["/a"] = redirect(target)
    await refusal(f"http://allowed.test:{server.port}/a?sig={SECRET}")


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
    ],
)
async def test_broken_urls_are_refused_without_being_quoted(server, url):
    error = await refusal(url)
    assert error.code == "download_failed"


async def test_a_proxy_is_refused_without_its_password(server, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", f"http://user:{SECRET}@127.0.0.1:1")
    assert "refusing to fetch" in (await refusal(f"http://allowed.test/?sig={SECRET}")).message


@pytest.mark.parametrize("status", [204, 304, 404, 500])
async def test_a_status_other_than_200_is_an_error_that_names_it(server, status):
    server.replies["/a"] = [f"HTTP/1.1 {status} Nope\r\nContent-Length: 0\r\n\r\n".encode()]
    assert str(status) in (await refusal(f"http://allowed.test:{server.port}/a?sig={SECRET}")).message


async def test_an_empty_body_is_an_error(server):
    server.replies["/a"] = body(b"")
    assert (await refusal(f"http://allowed.test:{server.port}/a")).code == "empty"


async def test_a_body_that_ends_early_is_an_error(server):
    server.replies["/a"] = [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this"]
    assert (await refusal(f"http://allowed.test:{server.port}/a?sig={SECRET}")).code == "download_failed"


@pytest.mark.parametrize("head", [b"Content-Length: 2000000\r\n\r\n", b"Connection: close\r\n\r\n"])
async def test_the_byte_cap_holds_with_and_without_a_declared_length(server, head):
    server.replies["/a"] = [b"HTTP/1.1 200 OK\r\n" + head, bytes(2_000_000)]
    error = await refusal(f"http://allowed.test:{server.port}/a?sig={SECRET}", max_bytes=1_000_000)
    assert error.code == "too_large"
    assert "1000000" in error.message


DRIPS = {
    "silence": [60.0],
    "headers": [b"HTTP/1.1 200 OK\r\nX-Slow: ", *[0.05, b"x"] * 400],
    "many headers": [b"HTTP/1.1 200 OK\r\n", *[0.05, b"X-Slow: x\r\n"] * 400],
    "body": [b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n", *[0.05, b"x"] * 400],
    "chunks": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *[0.05, b"1\r\nx\r\n"] * 400],
}


@pytest.mark.parametrize("drip", DRIPS)
async def test_a_slow_server_cannot_exceed_the_time_limit(server, drip):
    """The limit is 0.5 s, and only one that does not hold takes 15: the server is busy for at least 20. The
    end of the thread is seen from the server, whose connection breaks."""
    server.replies["/a"] = DRIPS[drip]
    started = time.monotonic()
    error = await refusal(f"http://allowed.test:{server.port}/a?sig={SECRET}", timeout_s=0.5)
    assert error.code == "download_timeout"
    assert 0.4 < time.monotonic() - started < 15
    if drip != "silence":
        assert await asyncio.to_thread(server.client_gone.wait, 15)


async def test_a_cancelled_job_ends_its_download(server):
    server.replies["/a"] = DRIPS["body"]
    task = asyncio.create_task(load_bytes(f"http://allowed.test:{server.port}/a", param="x"))
    async with asyncio.timeout(20):
        while not server.asked:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.client_gone.wait, 15)


async def test_the_time_limit_leaves_the_next_download_alone(server):
    """A thread of the pool that was stopped once serves again."""
    server.replies["/slow"] = DRIPS["body"]
    server.replies["/fast"] = body(b"picture")
    base = f"http://allowed.test:{server.port}"
    slow = [refusal(f"{base}/slow", timeout_s=0.3) for _ in range(20)]
    await asyncio.gather(*slow)
    assert await load_bytes(f"{base}/fast", param="x") == b"picture"
