"""The worker under the local platform and the unmodified SDK."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import numpy as np
import openai
import pytest
import requests

from local import Platform, running
from tests.workers.xtts.sounds import RATE, alike, decoded, recording, wav
from tools.models import local_env
from tools.models.tiny_xtts import SPEAKERS
from tools.workers import ROOT

pytestmark = pytest.mark.engine


def post(platform: Platform, value: dict[str, Any], **extra: Any) -> dict[str, Any]:
    answer = requests.post(
        f"{platform.endpoint_url}/runsync?wait=300000", json={"input": value, **extra},
        headers={"Authorization": "Bearer local"}, timeout=320,
    )  # fmt: skip
    answer.raise_for_status()
    return answer.json()  # type: ignore[no-any-return]


def output(answer: dict[str, Any]) -> Any:
    assert answer["status"] == "COMPLETED", answer.get("error")
    return answer["output"]


def problem_of(answer: dict[str, Any]) -> dict[str, Any]:
    assert answer["status"] == "FAILED", answer["status"]
    return json.loads(answer["error"])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def plain() -> Iterator[Platform]:
    env = {**local_env("xtts"), "MAX_RESULT_MB": "0.1"}
    with running("xtts", env=env, ready_timeout=300) as platform:
        yield platform


@pytest.fixture(scope="module")
def streaming() -> Iterator[Platform]:
    env = {**local_env("xtts"), "STREAMING": "true", "PREWARM": "false"}
    with running("xtts", env=env, ready_timeout=300) as platform:
        yield platform


def test_a_worker_without_the_licence_says_so_to_every_job() -> None:
    with running("xtts", env={"COQUI_TOS_AGREED": "", "MODEL_NAME": "/nowhere"}) as platform:
        for _ in range(2):
            problem = problem_of(post(platform, {"text": "Hello."}))
            assert problem["code"] == "licence_not_agreed"
            assert "COQUI_TOS_AGREED=1" in problem["message"]


def test_the_example_runs(plain: Platform) -> None:
    example = json.loads((ROOT / "workers/xtts/test_input.json").read_text())
    answer = output(post(plain, {**example["input"], "response_format": "mp3"}))
    assert len(decoded(answer)) / RATE == pytest.approx(answer["duration"], abs=0.3)


def test_jobs_never_share_a_voice(plain: Platform) -> None:
    """Twelve jobs at once with four voices: each sounds as it does alone."""
    voices: list[dict[str, Any]] = [{"speaker_wav": wav(recording(pitch=pitch))} for pitch in (110, 220, 330)]
    voices.append({"speaker": SPEAKERS[0]})
    jobs = [{"text": "Who am I?", "seed": 5, **voice} for voice in voices]
    with ThreadPoolExecutor(12) as threads:
        # At first no voice is in the cache; later they all are.
        answers = list(threads.map(lambda job: decoded(output(post(plain, job))), jobs * 3))
    alone = [decoded(output(post(plain, job))) for job in jobs]
    for one, other in itertools.combinations(alone, 2):
        assert not alike(one, other)
    for number, samples in enumerate(answers):
        assert alike(samples, alone[number % 4]), number


def test_bad_jobs_and_the_next_one(plain: Platform) -> None:
    for value, param in [
        ({"language": "en"}, "text"), ({"text": "👋"}, "text"), ({"text": "a", "stream": True}, "stream"),
        ({"text": "a", "speaker": "Bob"}, "speaker"),
        ({"text": "a", "speaker_wav": wav(recording(0.1))}, "speaker_wav"),
    ]:  # fmt: skip
        assert problem_of(post(plain, value))["param"] == param
    assert output(post(plain, {"text": "Hello."}))["duration"] > 0


def test_a_large_answer_goes_to_the_bucket(plain: Platform) -> None:
    """moto's server speaks S3; the limit is lowered to 0.1 MB."""
    from moto.server import ThreadedMotoServer

    job = {"text": "A sentence. " * 12, "seed": 1}
    problem = problem_of(post(plain, job))
    assert problem["code"] == "result_too_large"
    assert "mp3 or opus" in problem["message"]
    assert "BUCKET_ENDPOINT_URL" in problem["message"]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        keys = {"aws_access_key_id": "id", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        bucket = boto3.client("s3", endpoint_url=address, **keys)
        bucket.create_bucket(Bucket="speech")
        config = {"endpointUrl": address, "accessId": "id", "accessSecret": "secret", "bucketName": "speech"}
        answer = output(post(plain, job, s3Config=config))
        assert set(answer) == {"url", "bytes"}
        (stored,) = bucket.list_objects_v2(Bucket="speech")["Contents"]
        assert stored["Size"] == answer["bytes"] > 100_000
        complete = json.loads(bucket.get_object(Bucket="speech", Key=stored["Key"])["Body"].read())
        assert requests.get(answer["url"], timeout=60).json() == complete
        small = output(post(plain, {**job, "response_format": "opus"}))
    finally:
        server.stop()
    assert len(decoded(complete)) / RATE == pytest.approx(complete["duration"], abs=1e-3)
    assert small["duration"] == complete["duration"]


def test_the_official_client(plain: Platform) -> None:
    with openai.OpenAI(base_url=plain.openai_url, api_key="local", max_retries=0) as client:
        assert [model.id for model in client.models.list().data] == ["tiny-random/xtts"]
        for kind in ("mp3", "wav"):
            reply = client.audio.speech.create(
                model="tiny-random/xtts", voice="alloy", input="Bonjour.", response_format=kind,  # type: ignore[arg-type]
                extra_body={"language": "fr", "seed": 3},
            )  # fmt: skip
            answer = json.loads(reply.content)
            assert (answer["format"], answer["language"]) == (kind, "fr")
            assert decoded(answer).any()
        refused = client.audio.speech.create(model="tiny-random/xtts", voice="bob", input="Hello.")
        assert "unknown_voice" in refused.text


def test_a_stream_ends_with_the_response(streaming: Platform) -> None:
    headers = {"Authorization": "Bearer local"}
    value = {"text": "One sentence. And another.", "seed": 2, "response_format": "pcm"}

    def request(method: str, path: str, **options: Any) -> Any:
        url = f"{streaming.endpoint_url}/{path}"
        return requests.request(method, url, headers=headers, timeout=120, **options).json()

    job = request("POST", "run", json={"input": {**value, "stream": True}})
    parts: list[Any] = []
    while True:
        status = request("GET", f"stream/{job['id']}")
        parts += [item["output"] for item in status["stream"]]
        if status["status"] in ("COMPLETED", "FAILED") and not status["stream"]:
            break
    *chunks, end = parts
    (complete,) = output(post(streaming, value))
    assert alike(np.concatenate([decoded(chunk) for chunk in chunks]), decoded(complete))
    assert (end["audio"], end["duration"]) == ("", complete["duration"])
