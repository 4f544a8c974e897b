"""The speech of a request: pauses, formats, rates, seeds, chunks."""

from __future__ import annotations

import asyncio
import base64
import itertools
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soxr

from tests.helpers import error, longest_stall, send, stream
from tests.workers.xtts.sounds import RATE, alike, by_ffmpeg, decoded, wav
from tools.models.tiny_xtts import SPEAKERS
from workers.xtts import speech
from workers.xtts.speech import PAUSES_S, encode

engine = pytest.mark.engine


@engine
@pytest.mark.parametrize("rate", [None, 8000])
@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "opus", "pcm"])
async def test_formats_and_rates(say: Any, kind: str, rate: int | None) -> None:
    options = {} if rate is None else {"sample_rate": rate}
    answer = await say("Hello world.", seed=4, response_format=kind, **options)
    assert answer["format"] == kind
    assert answer["sample_rate"] == (rate or RATE)
    plain = decoded(await say("Hello world.", seed=4, response_format="pcm"))
    assert answer["duration"] == pytest.approx(len(plain) / RATE, abs=2e-3)
    data = base64.b64decode(answer["audio"])
    for samples in (decoded(answer), by_ffmpeg(data, kind, answer["sample_rate"])):
        assert np.isfinite(samples).all()
        # MP3 has a lead and complete frames, of 72 ms at 8 kHz.
        assert len(samples) / answer["sample_rate"] == pytest.approx(
            answer["duration"], abs=0.3 if kind == "mp3" else 0.03
        )
        assert 0.3 < np.sqrt(np.mean(samples**2)) / np.sqrt(np.mean(plain**2)) < 1.3
    if kind in ("wav", "flac") and rate is None:
        assert np.abs(decoded(answer) - plain).max() < 1e-4


def test_nothing_is_clipped() -> None:
    """Resampling a full-scale square wave overshoots; the answer is then scaled down."""
    loud = np.sign(np.sin(np.arange(24000) * 0.05)).astype(np.float32)
    audio, seconds = encode([loud[:7000], loud[7000:]], RATE, 48000, "wav")
    resampled = soxr.resample(loud, RATE, 48000)
    assert seconds == 1
    assert np.abs(resampled).max() > 1.05
    samples = decoded({"audio": audio, "format": "wav", "sample_rate": 48000})
    assert np.abs(samples - resampled / np.abs(resampled).max()).max() < 1e-3


@engine
async def test_pauses_lie_between_the_segments(say: Any) -> None:
    """And are not the library's 10,000 samples after every sentence."""
    one = await say("Hello.", temperature=0)
    two = await say("Hello. Hello.", temperature=0)
    paragraphs = await say("Hello.\nHello.", temperature=0)
    fast = await say("Hello. Hello.", temperature=0, speed=2.0)
    assert two["duration"] == pytest.approx(2 * one["duration"] + PAUSES_S["sentence"], abs=2e-3)
    assert paragraphs["duration"] == pytest.approx(2 * one["duration"] + PAUSES_S["paragraph"], abs=2e-3)
    assert fast["duration"] < two["duration"] - PAUSES_S["sentence"] / 2 + 1e-3
    assert sorted(PAUSES_S.values(), reverse=True) == list(PAUSES_S.values())
    single, samples = decoded(one), decoded(two)
    assert alike(samples[: len(single)], single)
    assert alike(samples[-len(single) :], single)
    assert not samples[len(single) : -len(single)].any()


@engine
async def test_an_answer_says_what_was_used(say: Any) -> None:
    answer = await say("Bonjour.", language="fr", speaker=SPEAKERS[1])
    assert set(answer) == {
        "audio", "format", "sample_rate", "duration", "seconds", "finish_reason", "language", "speaker",
        "model", "revision",
    }  # fmt: skip
    assert (answer["language"], answer["speaker"]) == ("fr", SPEAKERS[1])
    assert answer["model"] == "tiny-random/xtts"
    assert answer["seconds"] > 0
    reasons = {(await say(seed=seed))["finish_reason"] for seed in range(8)}
    assert reasons == {"stop", "length"}


@engine
async def test_a_seed_gives_the_same_speech_whatever_runs_beside(say: Any) -> None:
    text = "One sentence. And another one, which is longer."
    alone = decoded(await say(text, seed=7))
    beside = [decoded(answer) for answer in await asyncio.gather(*(say(text, seed=n) for n in range(10)))]
    assert alike(beside[7], alone)
    unseeded = [decoded(await say(text)) for _ in range(3)]
    for one, other in itertools.combinations([*beside, *unseeded], 2):
        assert not alike(one, other)


@engine
async def test_sampling_params_are_the_requests_own(say: Any) -> None:
    steady = decoded(await say(temperature=0))
    for same in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}):
        assert alike(decoded(await say(**same)), steady)
    weak, strong = [
        [decoded(await say(seed=seed, repetition_penalty=penalty)) for seed in range(3)]
        for penalty in (1, 20)
    ]
    assert not all(map(alike, weak, strong))


@engine
async def test_speed(say: Any) -> None:
    normal, fast, slow = [(await say(seed=1, speed=speed))["duration"] for speed in (1.0, 2.0, 0.5)]
    assert fast == pytest.approx(normal / 2, rel=0.1)
    assert slow == pytest.approx(normal * 2, rel=0.1)


@engine
async def test_a_result_over_the_limit(worker: ModuleType, say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.handler, "max_result_bytes", 25_000)
    text = "A sentence. " * 6
    for kind in ("wav", "flac"):
        problem = await error(worker.handler, text=text, response_format=kind, seed=1)
        assert problem["code"] == "result_too_large"
        assert "mp3 or opus" in problem["message"]
    assert (await say(text, response_format="opus", seed=1))["duration"] > 1
    monkeypatch.setattr(worker.handler, "max_result_bytes", 1_000)
    for kind in ("mp3", "opus"):
        problem = await error(worker.handler, text=text, response_format=kind, seed=1)
        assert problem["code"] == "result_too_large"
        assert "mp3" not in problem["message"], "it is as small as it gets"


@engine
async def test_the_event_loop_goes_on_beside_a_large_request(worker: ModuleType) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 30 * 44100).astype(np.float32)
    request = {"text": "A sentence of words. " * 80, "speaker_wav": wav(noise, 44100), "sample_rate": 48000}
    with longest_stall() as stall:
        answer = await send(worker.handler, **request)
    assert len(answer["audio"]) > 5_000_000
    assert stall[0] < 0.1


# ---- streamed ------------------------------------------------------------------------------------------


@engine
@pytest.mark.parametrize(
    ("kind", "rate"), [("pcm", None), ("wav", None), ("mp3", None), ("pcm", 8000), ("pcm", 48000)]
)
async def test_streamed_chunks(worker: ModuleType, say: Any, kind: str, rate: int | None) -> None:
    request: dict[str, Any] = {
        "text": "One sentence. And another one, which is longer!\nA third.",
        "seed": 11, "response_format": kind, "sample_rate": rate,
    }  # fmt: skip
    *chunks, end = await stream(worker.handler, **request, stream=True)
    assert [chunk["index"] for chunk in chunks] == list(range(len(chunks)))
    assert len(chunks) >= (3 if rate is None else 2), "the resampler holds samples back"
    sounds = [decoded(chunk) for chunk in chunks]  # each is a file of its own
    complete = await say(**request)
    assert end["audio"] == ""
    assert {**end, "seconds": 0, "audio": 0} == {**complete, "seconds": 0, "audio": 0}
    if kind != "mp3":
        assert alike(np.concatenate(sounds), decoded(complete))


@engine
async def test_the_longest_chunk(worker: ModuleType, say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "MAX_CHUNK_S", 0.1)
    request = {"text": "Hello world.", "seed": 1, "response_format": "pcm"}
    *chunks, _ = await stream(worker.handler, **request, stream=True)
    parts = [decoded(chunk) for chunk in chunks]
    assert max(len(part) for part in parts) == RATE // 10
    assert alike(np.concatenate(parts), decoded(await say(**request)))
