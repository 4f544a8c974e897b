"""Requests that would exhaust a worker: bodies and heads that are too large, or never end."""

from __future__ import annotations

import json
import time

import httpx
import pytest

from tests.shared.http.servers import Server

pytestmark = pytest.mark.engine


def test_a_body_that_declares_too_much_is_refused_and_its_sender_reads_the_answer(server: Server) -> None:
    answer = httpx.post(f"{server.url}/runsync", content=bytes(40 * 2**20), timeout=30)
    assert answer.status_code == 413
    assert answer.headers["connection"] == "close"
    assert json.loads(answer.json()["error"])["code"] == "too_large"


@pytest.mark.parametrize(
    "kind", ["application/json", "multipart/form-data; boundary=b", "application/x-www-form-urlencoded"]
)
def test_a_body_that_never_ends_is_refused_and_its_connection_closed(server: Server, kind: str) -> None:
    before, peak = server.rss(), 0
    with server.connect() as connection:
        head = "POST /v1/audio/transcriptions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n"
        connection.sendall(f"{head}content-type: {kind}\r\n\r\n".encode())
        start = b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
        connection.sendall(b"%x\r\n%s\r\n" % (len(start), start))
        mebibyte = b"100000\r\n" + bytes(2**20) + b"\r\n"
        try:
            for _ in range(10_000):
                connection.sendall(mebibyte)
                peak = max(peak, server.rss())
        except OSError:  # reset, or a broken pipe
            pass
        else:
            pytest.fail("10 GiB of body were taken")
    assert peak - before < 110e6
    assert server.ping() == 200


def test_the_answer_to_a_body_that_never_ends_can_be_read(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(b"POST /runsync HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        mebibyte = b"100000\r\n" + bytes(2**20) + b"\r\n"
        for _ in range(32):
            connection.sendall(mebibyte)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("kind", ["header", "url"])
def test_a_head_that_never_ends_is_refused(server: Server, kind: str) -> None:
    start = b"POST /runsync HTTP/1.1\r\nhost: x\r\nx-long: " if kind == "header" else b"GET /"
    before = server.rss()
    with server.connect() as connection:
        connection.sendall(start)
        try:
            for _ in range(1000):
                connection.sendall(b"a" * 2**16)
        except OSError:
            pass
        else:
            pytest.fail("64 MiB of head were taken")
    assert server.rss() - before < 5e6


def test_a_head_of_many_headers_is_refused(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /ping HTTP/1.1\r\nhost: x\r\n")
        data = b""
        try:
            for number in range(10):  # 32 kB each
                connection.sendall(b"".join(b"x-%d-%d: 1\r\n" % (number, header) for header in range(2500)))
                time.sleep(0.05)
            data = connection.recv(100)
        except OSError:  # reset before the answer was read
            return
        assert data.startswith(b"HTTP/1.1 400")
