"""Over HTTP with the unmodified OpenAI client, and answers as they are recognised."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from openai import AsyncOpenAI, BadRequestError

from shared.admission import Admission
from shared.http_app import make_app
from tests import helpers
from tests.workers.whisper.support import (
    AUDIO,
    CECI,
    HELLO,
    RecordingEngine,
    encoded,
    encoded_bytes,
    engine_test,
    lecture,
    replace_engine,
    sound,
)
from workers.whisper import handler as worker
from workers.whisper.engine import DecodeRequest, DecodeResult

pytestmark = engine_test
NO_VAD = {"vad": "false"}


@asynccontextmanager
async def serving() -> AsyncIterator[str]:
    """The address of the handler's own app."""
    admission = Admission()
    admission.open(8, 8)
    app = make_app(worker.handler, admission, worker="whisper")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
    task = asyncio.create_task(server.serve())
    await helpers.until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await task


@asynccontextmanager
async def openai_client() -> AsyncIterator[AsyncOpenAI]:
    async with (
        serving() as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60) as client,
    ):
        yield client


@pytest.mark.parametrize(
    ("response_format", "media_type", "expected"),
    [
        ("text", "text/plain", "ceci est un test, déjà\n"),
        ("srt", "application/x-subrip", "1\n00:00:00,000 --> 00:00:03,000\nceci est un test, déjà\n\n"),
        ("vtt", "text/vtt", "WEBVTT\n\n00:00:00.000 --> 00:00:03.000\nceci est un test, déjà\n\n"),
        ("json", "application/json", None),
        ("verbose_json", "application/json", None),
    ],
)
async def test_file_uploads(loaded: Any, response_format: Any, media_type: str, expected: str | None) -> None:
    file = ("speech.wav", encoded_bytes(sound(CECI.hertz)))
    words = {"timestamp_granularities": ["word", "segment"]} if response_format == "verbose_json" else {}
    async with openai_client() as client:
        raw = await client.audio.transcriptions.with_raw_response.create(
            file=file, model="tiny/whisper", response_format=response_format, extra_body=NO_VAD, **words
        )
    assert raw.headers["content-type"].partition(";")[0] == media_type
    answer: Any = raw.parse()
    assert answer == expected if expected else answer.text == CECI.text.strip()
    if words:
        assert len(answer.words) == 5
        assert answer.segments[0].text == CECI.text


async def test_translations_large_files_and_errors(loaded: Any) -> None:
    large = encoded_bytes(np.zeros((96_000 * 10, 8), np.float32), "WAV", 96_000, "PCM_24")
    assert 20e6 < len(large) < 30e6
    async with openai_client() as client:
        create = client.audio.translations.create
        file = ("speech.wav", encoded_bytes(sound(CECI.hertz)))
        answer = await create(file=file, model="tiny/whisper", extra_body=NO_VAD)
        assert answer.text == CECI.english.strip()
        assert (await create(file=("large.wav", large), model="tiny/whisper")).text == ""
        with pytest.raises(BadRequestError) as caught:
            await create(file=("text.mp3", b"no audio" * 100), model="tiny/whisper")
        assert caught.value.param == "file"


@pytest.fixture
def gate(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Chunks of six seconds in batches of one; all but the first wait for this event."""
    go, engine = threading.Event(), RecordingEngine(loaded.transcriber.engine)

    def gated(requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        assert len(engine.batches) == 1 or go.wait(60)
        return engine.engine.decode(requests)

    engine.run = gated
    replace_engine(monkeypatch, loaded, engine, chunk_seconds=6.0, batch_size=1)
    return go


async def test_the_client_reads_segments_while_the_rest_is_decoded(gate: threading.Event) -> None:
    samples, marks = lecture(4, 1)
    texts = [text for _, text in marks]
    async with openai_client() as client:
        events = await client.audio.transcriptions.create(
            file=("lecture.wav", encoded_bytes(samples)), model="tiny/whisper", stream=True, extra_body=NO_VAD
        )
        first = await anext(events)
        assert (first.type, first.delta) == ("transcript.text.delta", texts[0])
        gate.set()
        rest = [event async for event in events]
    assert [event.delta.strip() for event in rest[:-1]] == texts[1:]
    assert (rest[-1].type, rest[-1].text) == ("transcript.text.done", " ".join(texts))
    assert first.delta + "".join(event.delta for event in rest[:-1]) == rest[-1].text


async def test_a_client_that_leaves_frees_the_queue(gate: threading.Event, loaded: Any) -> None:
    samples, _ = lecture(6, 1)
    payload = {"audio": encoded(samples), "vad": False, "stream": True}
    async with serving() as url, httpx.AsyncClient(timeout=60) as client:
        async with client.stream("POST", f"{url}/runsync", json={"input": payload}) as response:
            await anext(response.aiter_lines())
        engine = worker.model.transcriber.engine
        running = len(engine.batches)
        gate.set()
        payload = {"audio": AUDIO, "vad": False}
        answer = await client.post(f"{url}/runsync", json={"input": payload})
        assert answer.json()["output"]["text"] == "hello world"
    assert len(engine.batches) <= running + 2, "no chunk of the abandoned job was decoded"


@pytest.mark.parametrize("transport", ["http", "queue"])
async def test_the_workers_own_stream(loaded: Any, transport: str) -> None:
    payload = {"audio": AUDIO, "vad": False, "stream": True, "word_timestamps": True}
    if transport == "queue":  # STREAMING=true
        *segments, last = await helpers.stream(worker.handler, **payload)
    else:
        async with serving() as url, httpx.AsyncClient(timeout=60) as client:
            answer = await client.post(f"{url}/runsync", json={"input": payload})
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.text.strip().split("\n\n")
        *segments, last = (json.loads(event.removeprefix("data: ")) for event in events)
    (segment,) = segments
    assert (segment["id"], segment["text"]) == (0, HELLO.text)
    assert [word["word"] for word in segment["words"]] == HELLO.text.split()
    assert (last["text"], last["language"], last["duration"]) == (HELLO.text.strip(), "en", 3.0)
    assert (last["segments"], last["chunks"], last["words"]) == ([], [], [])
