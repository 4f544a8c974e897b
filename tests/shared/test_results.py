"""Results: plain JSON within the platform's limit; a larger one goes to a bucket.

The upload is the SDK's own, with a real boto3. The bucket stands on loopback and serves the two requests of
S3's protocol that are used: PUT and GET of an object, by path.
"""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from shared.jobs import Job, JobHandler, Request, job_handler, start_config
from shared.results import to_plain
from shared.settings import WorkerSettings
from tests.helpers import error_of, longest_stall, send

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


class Anything(Request):
    pass


class Answer(BaseModel):
    vectors: list[list[float]]


class Answers(BaseModel):
    answers: list[Answer]


def returning(value: Any, max_result_mb: float = 10) -> JobHandler:
    @job_handler(Anything)
    async def handler(request: Anything, job: Job) -> Any:
        return value

    start_config(handler, WorkerSettings(model_name="m", max_result_mb=max_result_mb))
    return handler


# ---- JSON ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (
            {"a": np.float32(0.5), "b": np.arange(3), "c": [np.int64(7)], "d": np.bool_(True)},
            {"a": 0.5, "b": [0, 1, 2], "c": [7], "d": True},
        ),
        (Answer(vectors=[[0.5]]), {"vectors": [[0.5]]}),
        ({"a": [Answer(vectors=[])]}, {"a": [{"vectors": []}]}),
        (Answers(answers=[Answer(vectors=[[1.0]] * 700)]), {"answers": [{"vectors": [[1.0]] * 700}]}),
        ({"a": (1, 2), "b": {3}, "c": b"bytes", 4: None}, {"a": [1, 2], "b": [3], "c": "bytes", "4": None}),
        ({"text": "a\ud83d", "more": "😀", "n": 10**70}, {"text": "a\ufffd", "more": "😀", "n": 10**70}),
        ({"text": "NaN, -Infinity"}, {"text": "NaN, -Infinity"}),
        ("text", "text"),
        ([1.5, None], [1.5, None]),
    ],
)
async def test_results_are_plain_json(value: Any, plain: Any) -> None:
    content, data = await to_plain(value)
    assert content == json.loads(data) == plain
    assert json.dumps(content, ensure_ascii=False).encode()  # as the SDK sends it
    assert await send(returning(value)) == plain


@pytest.mark.parametrize(
    ("value", "code", "text"),
    [
        ({"a": [1.0, float("nan")]}, "not_finite", "DTYPE"),
        ({"a": {"b": float("-inf")}}, "not_finite", "DTYPE"),
        ({"a": np.array([1.0, np.nan])}, "not_finite", "DTYPE"),
        (Answer(vectors=[[float("nan")]]), "not_finite", "DTYPE"),
        ({"a": b"\xff"}, "not_json", "utf-8"),
        ({"a": [object()]}, "not_json", "object"),
        ({"a": np.array([object()])}, "not_json", "object"),
    ],
)
async def test_a_value_that_json_has_no_form_for_is_an_error(value: Any, code: str, text: str) -> None:
    error = error_of(await send(returning(value)))
    assert (error["code"], error["type"]) == (code, "server_error")
    assert text in error["message"]


async def test_the_sdks_debug_log_does_not_format_results() -> None:
    value = {"vectors": [0.5] * 1000}
    result = await send(returning(value))
    assert repr(result) == "<result of 5013 bytes>"
    assert json.loads(json.dumps(result)) == value


async def test_a_large_result_does_not_block_the_event_loop() -> None:
    """About 40 ms for 9 MB of floats. The best of three tries counts: other processes may hold the cores."""
    vectors = np.random.default_rng(0).normal(size=(1150, 384)).astype(np.float32).tolist()
    handler, longest = returning(Answer.model_construct(vectors=vectors)), []
    for _ in range(3):
        with longest_stall() as stalls:
            result = await send(handler)
        assert result.size > 9e6
        longest.append(stalls[0])
    assert min(longest) < 0.1


# ---- the limit and the bucket --------------------------------------------------------------------------


class Bucket(BaseHTTPRequestHandler):
    objects: dict[str, bytes]

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/closed/"):
            self.send_error(403)
            return
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
def objects() -> dict[str, bytes]:
    return {}


@pytest.fixture
def bucket(objects: dict[str, bytes]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Bucket,), {"objects": objects}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY", "BUCKET_NAME"):
        monkeypatch.delenv(name, raising=False)


VALUE = {"text": "é" * 2000}
LARGE = returning(VALUE, max_result_mb=0.002)


def fetched(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as response:
        return json.loads(response.read())


async def test_a_result_over_the_limit_is_refused_with_size_limit_and_advice() -> None:
    fits = {"a": "é" * 494}  # 988 bytes, and 9 around them
    assert await send(returning(fits, 0.001)) == fits
    error = error_of(await send(returning({"a": "é" * 500}, 0.001)))
    assert error["code"] == "result_too_large"
    assert "0.001 MB" in error["message"]
    assert "BUCKET_ENDPOINT_URL" in error["message"]


async def test_the_workers_own_bucket(
    bucket: str, objects: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", bucket)
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", "access")
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "secret-value")
    monkeypatch.setenv("BUCKET_NAME", "shelf")
    answer = await LARGE({"id": "job-7", "input": {}})
    assert answer["bytes"] == len(json.dumps(VALUE, ensure_ascii=False, separators=(",", ":")).encode())
    assert list(objects) == ["/shelf/results/job-7.json"]
    assert await asyncio.to_thread(fetched, answer["url"]) == VALUE
    assert "secret-value" not in json.dumps(answer)


async def test_the_bucket_of_the_job(bucket: str, objects: dict[str, bytes]) -> None:
    s3 = {"endpointUrl": bucket, "accessId": "access", "accessSecret": "secret", "bucketName": "mine"}
    answer = await LARGE({"id": "job-8", "input": {}, "s3Config": s3})
    assert list(objects) == ["/mine/results/job-8.json"]
    assert await asyncio.to_thread(fetched, answer["url"]) == VALUE


async def test_an_upload_that_fails_is_an_error(bucket: str) -> None:
    s3 = {"endpointUrl": bucket, "accessId": "a", "accessSecret": "top-secret", "bucketName": "closed"}
    problem = error_of(await LARGE({"id": "job-9", "input": {}, "s3Config": s3}))
    assert problem["code"] == "upload_failed"
    assert "s3Config" in problem["message"]
    assert "top-secret" not in problem["message"]


@pytest.mark.parametrize("s3", [{"accessId": "a", "accessSecret": "b", "bucketName": "c"}, "mine"])
async def test_an_incomplete_configuration_is_ignored(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK would write the result into a folder of the container and report it as uploaded."""
    monkeypatch.chdir(tmp_path)
    problem = error_of(await LARGE({"id": "job-10", "input": {}, "s3Config": s3}))
    assert problem["code"] == "result_too_large"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1999, 2001])
def test_the_size_of_a_result_can_be_checked_before_the_work(size: int) -> None:
    job, s3 = Job({"id": "1"}, 2000), {"endpointUrl": "u", "accessId": "a", "accessSecret": "s"}
    Job({"id": "1", "s3Config": s3}, 2000).check_size(size)
    if size < 2000:
        return job.check_size(size)
    with pytest.raises(Exception, match=r"Use base64\. Split the job"):
        job.check_size(size, "Use base64. ")
