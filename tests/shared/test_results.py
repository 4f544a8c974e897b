"""Results: plain JSON within the platform's limit; a larger one goes to a bucket.

The upload is the SDK's own, with a real boto3.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from pydantic import BaseModel

from shared.jobs import Job, JobHandler, Request, job_handler, start_config
from shared.results import to_plain
from shared.settings import WorkerSettings
from tests.helpers import error_of, least_stall, send

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
    """About 40 ms for 9 MB of floats."""
    vectors = np.random.default_rng(0).normal(size=(1150, 384)).astype(np.float32).tolist()
    handler = returning(Answer.model_construct(vectors=vectors))
    assert (await send(handler)).size > 9e6
    assert await least_stall(lambda: send(handler)) < 0.1


# ---- the limit and the bucket --------------------------------------------------------------------------


KEYS = {"aws_access_key_id": "access", "aws_secret_access_key": "secret-value", "region_name": "us-east-1"}


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A client of moto's S3 server on loopback, which has the buckets `shelf` and `mine`."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", **KEYS)
    for name in ("shelf", "mine"):
        client.create_bucket(Bucket=name)
    yield client
    server.stop()


def stored(s3: Any, bucket: str) -> list[str]:
    return [entry["Key"] for entry in s3.list_objects_v2(Bucket=bucket)["Contents"]]


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


async def test_the_workers_own_bucket(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", s3.meta.endpoint_url)
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", "access")
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "secret-value")
    monkeypatch.setenv("BUCKET_NAME", "shelf")
    answer = await LARGE({"id": "job-7", "input": {}})
    assert answer["bytes"] == len(json.dumps(VALUE, ensure_ascii=False, separators=(",", ":")).encode())
    assert stored(s3, "shelf") == ["results/job-7.json"]
    assert await asyncio.to_thread(fetched, answer["url"]) == VALUE
    assert "secret-value" not in json.dumps(answer)


def s3_config(s3: Any, bucket: str) -> dict[str, str]:
    keys = {"accessId": KEYS["aws_access_key_id"], "accessSecret": KEYS["aws_secret_access_key"]}
    return {"endpointUrl": s3.meta.endpoint_url, "bucketName": bucket, **keys}


async def test_the_bucket_of_the_job(s3: Any) -> None:
    answer = await LARGE({"id": "job-8", "input": {}, "s3Config": s3_config(s3, "mine")})
    assert stored(s3, "mine") == ["results/job-8.json"]
    assert await asyncio.to_thread(fetched, answer["url"]) == VALUE


async def test_an_upload_that_fails_is_an_error(s3: Any) -> None:
    job = {"id": "job-9", "input": {}, "s3Config": s3_config(s3, "no-such-bucket")}
    problem = error_of(await LARGE(job))
    assert problem["code"] == "upload_failed"
    assert "s3Config" in problem["message"]
    assert "secret-value" not in problem["message"]


@pytest.mark.parametrize("s3", [{"accessId": "a", "accessSecret": "b", "bucketName": "c"}, "mine"])
async def test_an_incomplete_s3_config(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
