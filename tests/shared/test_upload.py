"""A result too large for the platform goes to the bucket, through the SDK's own upload and a real boto3.

The bucket is a stand-in on loopback that speaks the two requests of S3's protocol that are used: PUT and GET
of an object, by path.
"""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shared.jobs import Request, job_handler, start_config
from shared.settings import WorkerSettings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


class Bucket(BaseHTTPRequestHandler):
    objects: dict[str, bytes]

    def do_PUT(self) -> None:
        if self.path.startswith("/closed/"):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_error(403)
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            chunks, rest = b"", body
            while size := int((head := rest.split(b"\r\n", 1))[0].split(b";")[0], 16):
                chunks, rest = chunks + head[1][:size], head[1][size + 2 :]
            body = chunks
        self.objects[self.path.partition("?")[0]] = body
        self.send_response(200)
        self.send_header("ETag", '"0"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        body = self.objects[self.path.partition("?")[0]]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def bucket() -> Iterator[tuple[str, dict[str, bytes]]]:
    objects: dict[str, bytes] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Bucket,), {"objects": objects}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", objects
    server.shutdown()
    thread.join()
    server.server_close()


class Anything(Request):
    pass


VALUE = {"text": "é" * 2000}


@job_handler(Anything)
async def large(request: Anything) -> Any:
    return VALUE


@pytest.fixture(autouse=True)
def small_limit() -> Iterator[None]:
    start_config(large, WorkerSettings(model_name="m", max_result_mb=0.002))
    yield
    start_config(large, WorkerSettings(model_name="m"))


def fetched(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.loads(response.read())


async def test_the_workers_own_bucket(
    bucket: tuple[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, objects = bucket
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", address)
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", "access")
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "secret-value")
    monkeypatch.setenv("BUCKET_NAME", "shelf")
    answer = await large({"id": "job-7", "input": {}})
    assert answer["bytes"] == len(json.dumps(VALUE, ensure_ascii=False).encode())
    assert list(objects) == ["/shelf/results/job-7.json"]
    assert fetched(answer["url"]) == VALUE
    assert "secret-value" not in json.dumps(answer)


async def test_the_bucket_that_the_job_names(bucket: tuple[str, dict[str, bytes]]) -> None:
    address, objects = bucket
    s3 = {"endpointUrl": address, "accessId": "access", "accessSecret": "secret", "bucketName": "mine"}
    answer = await large({"id": "job-8", "input": {}, "s3Config": s3})
    assert list(objects) == ["/mine/results/job-8.json"]
    assert fetched(answer["url"]) == VALUE


async def test_an_upload_that_fails_is_told(bucket: tuple[str, dict[str, bytes]]) -> None:
    s3 = {"endpointUrl": bucket[0], "accessId": "a", "accessSecret": "top-secret", "bucketName": "closed"}
    problem = json.loads((await large({"id": "job-9", "input": {}, "s3Config": s3}))["error"])
    assert problem["code"] == "upload_failed"
    assert "s3Config" in problem["message"]
    assert "top-secret" not in problem["message"]


@pytest.mark.parametrize("s3", [{"accessId": "a", "accessSecret": "b", "bucketName": "c"}, "mine"])
async def test_half_a_configuration_is_none(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK would write the result into a folder of the container and call that uploaded."""
    monkeypatch.chdir(tmp_path)
    problem = json.loads((await large({"id": "job-10", "input": {}, "s3Config": s3}))["error"])
    assert problem["code"] == "result_too_large"
    assert not list(tmp_path.iterdir())
