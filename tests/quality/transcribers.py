"""Whisper base by this worker and by its peers: recordings in, segments and words with their times out."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.helpers import send
from tests.quality.speech import RATE, Recording
from tools.models import real
from workers.whisper import handler as worker


@dataclass(frozen=True)
class Timed:
    """start, end: seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Recognised:
    segments: list[Timed] = field(default_factory=list)
    words: list[Timed] = field(default_factory=list)


Transcribe = Callable[[Recording], Awaitable[Recognised]]


@contextmanager
def ours(engine: str, *, vad: bool) -> Iterator[Transcribe]:
    """The worker, greedy, with its defaults."""
    folder = real.folder("whisper-base" if engine == "transformers" else "whisper-base-ctranslate2")
    env = {"MODEL_NAME": str(folder), "ENGINE": engine, "HF_HUB_OFFLINE": "1", "PREWARM": "false"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        worker.prepare()

    async def transcribe(recording: Recording) -> Recognised:
        audio = base64.b64encode(recording.wav()).decode()
        job = {"audio": audio, "word_timestamps": True, "vad": vad, "language": recording.language}
        answer = await send(worker.handler, **job)
        assert "error" not in answer, answer
        words = [Timed(word["word"], word["start"], word["end"]) for word in answer["words"]]
        return Recognised([Timed(s["text"], s["start"], s["end"]) for s in answer["segments"]], words)

    yield transcribe
    del worker.model


@contextmanager
def faster_whisper(*, vad: bool) -> Iterator[Transcribe]:
    """faster-whisper alone, with its defaults but for the number of beams."""
    from faster_whisper import WhisperModel

    model = WhisperModel(str(real.folder("whisper-base-ctranslate2")), device="cpu", compute_type="float32")

    async def transcribe(recording: Recording) -> Recognised:
        generator, _ = model.transcribe(
            recording.samples, language=recording.language, beam_size=1, word_timestamps=True, vad_filter=vad
        )
        segments = list(generator)
        words = [Timed(w.word, w.start, w.end) for s in segments for w in s.words or []]
        return Recognised([Timed(s.text, s.start, s.end) for s in segments], words)

    yield transcribe


@contextmanager
def pipeline() -> Iterator[Transcribe]:
    """transformers' pipeline, once for segments and once for words. It has no voice activity detection."""
    import torch
    from transformers import pipeline as make_pipeline

    model = str(real.folder("whisper-base"))
    pipe = make_pipeline("automatic-speech-recognition", model=model, dtype=torch.float32, device="cpu")

    def chunks(recording: Recording, kind: bool | str) -> list[Timed]:
        settings = {"language": recording.language, "task": "transcribe", "num_beams": 1}
        raw: Any = {"raw": recording.samples.copy(), "sampling_rate": RATE}
        answer = pipe(raw, return_timestamps=kind, generate_kwargs=settings)
        length = len(recording.samples) / RATE
        # It leaves the end out where the model has made none.
        return [Timed(c["text"], c["timestamp"][0], c["timestamp"][1] or length) for c in answer["chunks"]]

    async def transcribe(recording: Recording) -> Recognised:
        return Recognised(chunks(recording, True), chunks(recording, "word"))

    yield transcribe
