"""HTTP mode: files on /v1/audio/speech, sent while they are synthesised, for the unmodified openai client."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import uvicorn

from serving.audio import load_audio
from shared.admission import Admission
from shared.http_app import make_app
from tests.helpers import openai as by_queue
from tests.helpers import wait_until
from tests.workers.xtts.sounds import RATE, Samples, alike, by_ffmpeg, decoded

pytestmark = pytest.mark.engine

TEXT = "One sentence. And another one, which is longer!"
LONG = "This is a sentence of some words. " * 120
MEDIA_TYPES = {
    "wav": "audio/wav", "mp3": "audio/mpeg", "opus": "audio/ogg", "flac": "audio/flac", "pcm": "audio/pcm",
}  # fmt: skip


@pytest.fixture(scope="module")
def url(worker: ModuleType) -> Iterator[str]:
    """The address of a real server in a thread."""
    admission = Admission()
    admission.open(8, 8)
    config = uvicorn.Config(make_app(worker.handler, admission, worker="xtts"), port=0, log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def samples_of(data: bytes, kind: str) -> Samples:
    if kind == "pcm":
        return (np.frombuffer(data, "<i2") / 32768).astype(np.float32)
    return load_audio(data, rate=RATE)


@pytest.mark.parametrize("kind", MEDIA_TYPES)
async def test_audio_files(worker: ModuleType, client: openai.OpenAI, kind: Any) -> None:
    reply = client.audio.speech.create(
        model="tiny-random/xtts", voice="nova", input=TEXT, response_format=kind, extra_body={"seed": 5}
    )
    assert reply.response.headers["content-type"] == MEDIA_TYPES[kind]
    complete = await by_queue(
        worker.handler, "/v1/audio/speech", voice="nova", input=TEXT, response_format=kind, seed=5
    )
    expected = decoded(complete)
    for samples in (samples_of(reply.content, kind), by_ffmpeg(reply.content, kind, RATE)):
        if kind in ("mp3", "opus"):  # MP3 has a lead and complete frames
            assert len(samples) / RATE == pytest.approx(complete["duration"], abs=0.1)
            assert np.std(samples) == pytest.approx(np.std(expected), rel=0.2)
        else:
            assert alike(samples, expected)


@pytest.mark.parametrize("kind", MEDIA_TYPES)
def test_audio_is_streamed(worker: ModuleType, client: openai.OpenAI, kind: Any) -> None:
    engine = worker.engine.synthesizer.engine
    with client.audio.speech.with_streaming_response.create(
        model="tiny-random/xtts", voice="nova", input=LONG, response_format=kind
    ) as reply:
        assert next(reply.iter_bytes())
        assert engine.running or engine.waiting
    # The client has hung up: what it no longer wants leaves the batch.
    wait_until(lambda: not engine.running and not engine.waiting, 20)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"input": "👋"}, "input", "nothing_to_say"),
        ({"voice": "bob"}, "voice", "unknown_voice"),
        ({"model": "tts-1"}, "model", "model_not_found"),
        ({"response_format": "opus", "extra_body": {"sample_rate": 44100}}, "sample_rate", "invalid_value"),
    ],
)
def test_errors_have_a_status(client: openai.OpenAI, body: dict[str, Any], param: str, code: str) -> None:
    asked: dict[str, Any] = {"model": "tiny-random/xtts", "voice": "nova", "input": "Hello.", **body}
    with pytest.raises(openai.APIStatusError) as caught:
        client.audio.speech.create(**asked)
    problem: Any = caught.value.body
    assert (problem["param"], problem["code"]) == (param, code)
    assert problem["message"].startswith(f"{param}: ")


def test_the_workers_own_stream_is_events(url: str) -> None:
    body = {"input": {"text": TEXT, "stream": True, "response_format": "pcm"}}
    reply = httpx.post(f"{url}/runsync", json=body, timeout=60)
    assert reply.headers["content-type"] == "text/event-stream"
    *chunks, end = [json.loads(event[6:]) for event in reply.text.strip().split("\n\n")]
    sounds = np.concatenate([decoded(chunk) for chunk in chunks])
    assert (end["audio"], end["duration"]) == ("", round(len(sounds) / RATE, 3))
