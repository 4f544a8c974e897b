"""The handler with the tiny model, on both engines: requests as clients send them."""

import asyncio
import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai.types.audio import TranscriptionVerbose

from tests.workers.whisper.support import (
    CECI,
    HELLO,
    MORNING,
    REVOIR,
    RecordingEngine,
    both_engines,
    encoded,
    engine_test,
    error,
    hum,
    load,
    send,
    silence,
    sound,
    written,
)
from tools.models import made
from tools.models import tiny_whisper as tiny
from workers.whisper.engine import SAMPLE_RATE

pytestmark = engine_test


async def test_the_reference_request(loaded: Any) -> None:
    answer = await send()
    assert set(answer) == {
        "text", "chunks", "language", "language_probability", "task", "duration", "segments", "words",
        "model", "revision",
    }  # fmt: skip
    assert (answer["text"], answer["chunks"], answer["words"]) == ("hello world", [], None)
    assert (answer["language"], answer["task"], answer["duration"]) == ("en", "transcribe", 3.0)
    assert answer["language_probability"] > 0.9
    assert (answer["model"], answer["revision"]) == ("tiny/whisper", None)
    (segment,) = answer["segments"]
    assert (segment["id"], segment["seek"], segment["start"], segment["end"]) == (0, 0, 0.0, 3.0)
    assert (segment["text"], segment["temperature"]) == (" hello world", 0.0)
    assert -0.2 < segment["avg_logprob"] <= 0
    assert 0 <= segment["no_speech_prob"] < 0.1
    assert segment["compression_ratio"] < 1


async def test_languages_and_tasks_are_mixed_in_one_batch(engine: RecordingEngine) -> None:
    wanted = [(said, task) for said in tiny.SAID for task in ("transcribe", "translate")]
    answers = await asyncio.gather(*(send(sound(said.hertz), task=task) for said, task in wanted))
    for (said, task), answer in zip(wanted, answers, strict=True):
        assert answer["text"] == (said.text if task == "transcribe" else said.english).strip()
        assert (answer["language"], answer["task"]) == (said.language, task)
    largest = max(engine.batches, key=len)
    assert len(largest) > 4
    assert {request.task for request in largest} == {"transcribe", "translate"}
    assert sum(map(len, engine.batches)) == len(wanted), "no window was decoded twice"


async def test_a_given_language_is_taken(loaded: Any) -> None:
    answer = await send(sound(CECI.hertz), language=" French ")
    assert answer["text"] == CECI.text.strip()
    assert (answer["language"], answer["language_probability"]) == ("fr", None)


async def test_an_answer_does_not_depend_on_its_neighbours(loaded: Any) -> None:
    """Sounds that the model does not know, so that answers differ in length; prompts of several lengths."""
    rng = np.random.default_rng(3)
    jobs = []
    for number in range(8):
        samples = sound(150 + 190 * number, 1 + number / 2)
        samples += rng.normal(0, 0.02, len(samples)).astype(np.float32)
        fields = {
            "prompt": [None, "abc", "well, hello", "hello"][number % 4],
            "task": ["transcribe", "translate"][number % 2],
            "fallback": False,
            "word_timestamps": number % 3 == 0,
        }
        jobs.append((samples, fields))
    alone = [await send(samples, **fields) for samples, fields in jobs]
    together = await asyncio.gather(*(send(samples, **fields) for samples, fields in jobs))

    def shown(answer: Any) -> Any:
        return answer["text"], [segment["tokens"] for segment in answer["segments"]], answer["words"]

    assert [shown(answer) for answer in together] == [shown(answer) for answer in alone]
    assert len({answer["text"] for answer in alone}) >= 3


@pytest.mark.parametrize(
    ("samples", "vad"),
    [(silence(5), False), (silence(70), True), (hum(20), True)],
)
async def test_silence_has_no_text(engine: RecordingEngine, samples: np.ndarray, vad: bool) -> None:
    for fields in ({}, {"language": "fr"}, {"timestamps": "word"}):
        answer = await send(samples, vad=vad, **fields)
        assert (answer["text"], answer["chunks"], answer["segments"]) == ("", [], [])
        assert answer["language"] == fields.get("language")
    assert await send(samples, vad=vad, response_format="srt") == ""
    assert await send(samples, vad=vad, response_format="vtt") == "WEBVTT\n\n"
    assert (await send(samples, vad=vad, response_format="verbose_json"))["text"] == ""
    assert engine.batches == [], "the model is not asked"


async def test_clips(loaded: Any) -> None:
    tones = [sound(HELLO.hertz), silence(2), sound(CECI.hertz), silence(2), sound(REVOIR.hertz)]
    samples = np.concatenate(tones)
    answer = await send(samples, clip_start=5.0, clip_end=8.5, timestamps=True)
    assert answer["text"] == CECI.text.strip()
    assert answer["chunks"][0]["timestamp"] == [5.0, 8.0]
    assert answer["segments"][0]["seek"] == 500
    assert answer["duration"] == pytest.approx(13.0)
    assert (await send(samples, clip_start=10.0))["text"] == REVOIR.text.strip()
    assert (await send(samples, clip_end=3.0))["text"] == HELLO.text.strip()
    assert (await send(samples, clip_end=9999))["duration"] == pytest.approx(13.0)
    problem = await error(samples, clip_start=13.0)
    assert (problem["param"], problem["code"]) == ("clip_start", "invalid_value")
    assert "13 seconds" in problem["message"]


async def test_words(loaded: Any) -> None:
    samples = np.concatenate([silence(1), sound(CECI.hertz)])
    answer = await send(samples, word_timestamps=True, clip_start=1.0)
    words = answer["words"]
    assert [word["word"] for word in words] == ["ceci", "est", "un", "test,", "déjà"]
    starts = [word["start"] for word in words]
    assert starts == sorted(starts)
    assert all(1.0 <= word["start"] <= word["end"] <= 4.0 for word in words)
    assert answer["chunks"] == []
    chunks = (await send(samples, timestamps="word", clip_start=1.0))["chunks"]
    assert [(chunk["text"], *chunk["timestamp"]) for chunk in chunks] == [
        (word["word"], word["start"], word["end"]) for word in words
    ]


async def test_every_response_format(loaded: Any) -> None:
    samples = np.concatenate([silence(1), sound(CECI.hertz)])
    formats = ("text", "srt", "vtt", "verbose_json")
    text, srt, vtt, verbose = [
        await send(samples, response_format=name, clip_start=1.0, word_timestamps=name == "verbose_json")
        for name in formats
    ]
    assert text == "ceci est un test, déjà\n"
    assert srt == "1\n00:00:01,000 --> 00:00:04,000\nceci est un test, déjà\n\n"
    assert vtt == "WEBVTT\n\n00:00:01.000 --> 00:00:04.000\nceci est un test, déjà\n\n"
    read = TranscriptionVerbose.model_validate(verbose, strict=True)
    assert (read.language, read.duration, read.text) == ("french", 4.0, "ceci est un test, déjà")
    assert set(verbose) == {"task", "language", "duration", "text", "segments", "words", "usage"}
    assert read.segments is not None
    assert read.segments[0].model_dump() == verbose["segments"][0]
    translated = await send(samples, response_format="verbose_json", task="translate")
    assert (translated["language"], translated["text"]) == ("english", CECI.english.strip())


async def test_sampling_and_beams(loaded: Any) -> None:
    sampled = await asyncio.gather(*(send(sound(said.hertz), temperature=0.1) for said in tiny.SAID))
    assert [answer["text"] for answer in sampled] == [said.text.strip() for said in tiny.SAID]
    assert sampled[0]["segments"][0]["temperature"] == 0.1
    beams = await asyncio.gather(*(send(beam_size=3, word_timestamps=True) for _ in range(3)))
    assert [answer["text"] for answer in beams] == ["hello world"] * 3
    assert all(len(answer["words"]) == 2 for answer in beams)


# ---- audio files ---------------------------------------------------------------------------------------


def files() -> dict[str, str]:
    stereo = np.stack([tiny.tone(CECI.hertz, 3.0, 44_100)] * 2, axis=1)
    high = tiny.tone(CECI.hertz, 3.0, 48_000)
    mp3 = encoded(stereo, "MP3", 44_100)
    return {
        "wav 8 bit": encoded(sound(CECI.hertz), "WAV", SAMPLE_RATE, "PCM_U8"),
        "wav 24 bit stereo": encoded(stereo, "WAV", 44_100, "PCM_24"),
        "wav 32 bit": encoded(sound(CECI.hertz), "WAV", SAMPLE_RATE, "PCM_32"),
        "wav float": encoded(stereo, "WAV", 44_100, "FLOAT"),
        "flac": encoded(stereo, "FLAC", 44_100),
        "mp3": mp3,
        "ogg": encoded(stereo, "OGG", 44_100),
        "opus": encoded(high, "OGG", 48_000, "OPUS"),
        "m4a": written(tiny.tone(CECI.hertz, 3.0, 44_100), "ipod", "aac", 44_100),
        "mp4": written(high, "mp4", "aac", 48_000),
        "webm": written(high, "webm", "libopus", 48_000),
        "data: URI": f"data:audio/mpeg;base64,{mp3}",
    }


async def test_every_file_format_is_transcribed(loaded: Any) -> None:
    audio = files()
    answers = await asyncio.gather(*map(send, audio.values()))
    texts = {name: answer.get("text") for name, answer in zip(audio, answers, strict=True)}
    assert texts == dict.fromkeys(audio, CECI.text.strip())


@pytest.mark.parametrize(
    ("audio", "code"),
    [
        ("", "empty"),
        (encoded(silence(0)), "bad_audio"),
        (base64.b64encode(b"ID3 this is a text, renamed to .mp3 " * 50).decode(), "bad_audio"),
        ("not base64!", "bad_base64"),
        (base64.b64encode(bytes(2000)).decode(), "bad_audio"),
        ("ftp://example.com/a.mp3", "bad_url"),
        ("http://127.0.0.1:9/a.mp3", "download_failed"),
    ],
)
async def test_what_is_not_audio_is_refused(loaded: Any, audio: str, code: str) -> None:
    problem = await error(audio)
    assert (problem["param"], problem["code"]) == ("audio", code)
    assert "hello" in (await send())["text"], "the worker goes on"


async def test_a_truncated_mp4_is_refused_and_a_truncated_wav_transcribed_to_its_end(loaded: Any) -> None:
    data = base64.b64decode(written(tiny.tone(CECI.hertz, 3.0, 44_100), "ipod", "aac", 44_100))
    problem = await error(base64.b64encode(data[: len(data) // 2]).decode())
    assert (problem["param"], problem["code"]) == ("audio", "bad_audio")
    data = base64.b64decode(encoded(sound(CECI.hertz, 6)))
    answer = await send(base64.b64encode(data[: len(data) // 2]).decode())
    assert answer["text"] == CECI.text.strip()
    assert answer["duration"] == pytest.approx(3, abs=0.1)


# ---- other models --------------------------------------------------------------------------------------


@both_engines
async def test_english_only_models(engine: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    load(engine, made("whisper-en", tiny.make_english), monkeypatch, cache)
    for fields in ({}, {"language": "English"}):
        answer = await send(sound(MORNING.hertz), **fields)
        assert (answer["text"], answer["language"]) == (MORNING.text.strip(), "en")
        assert answer["language_probability"] is None
    assert (await error(task="translate"))["param"] == "task"
    assert (await error(language="fr"))["param"] == "language"
    verbose = await send(response_format="verbose_json", word_timestamps=True)
    assert verbose["language"] == "english"
    assert len(verbose["words"]) == 2


@both_engines
async def test_models_without_timestamps(engine: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    load(engine, made("whisper", tiny.make), monkeypatch, cache, model_timestamps=False)
    answer = await send(sound(CECI.hertz, 4), timestamps=True)
    assert answer["text"] == CECI.text.strip()
    assert [chunk["timestamp"] for chunk in answer["chunks"]] == [[0.0, 4.0]]
    assert len((await send(sound(CECI.hertz, 4), word_timestamps=True))["words"]) == 5


@both_engines
async def test_a_distilled_model(engine: str, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    model = load(engine, made("whisper-distilled", tiny.make_distilled), monkeypatch, cache)
    assert model.transcriber.log_mel(sound(440)).shape == (128, 3000)
    for said in tiny.SAID:
        answer = await send(sound(said.hertz), word_timestamps=True)
        assert (answer["text"], answer["language"]) == (said.text.strip(), said.language)
        assert [word["word"] for word in answer["words"]] == said.text.split()
