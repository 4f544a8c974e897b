"""Sounds, an engine that records what it is asked, and ways to ask the handler."""

import base64
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile

from tests import helpers
from tools.models import tiny_whisper as tiny
from workers.whisper import handler as worker
from workers.whisper.engine import SAMPLE_RATE, DecodeRequest, DecodeResult
from workers.whisper.schemas import Settings
from workers.whisper.transcriber import Transcriber

ENGINES = ("transformers", "faster-whisper")
HELLO, MORNING, CECI, REVOIR = tiny.SAID
engine_test = pytest.mark.engine
both_engines = pytest.mark.parametrize("engine", ENGINES)


def sound(hertz: float, seconds: float = 3.0) -> np.ndarray:
    return tiny.tone(hertz, seconds)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * SAMPLE_RATE), np.float32)


def hum(seconds: float) -> np.ndarray:
    wave = np.sin(2 * np.pi * 50 * np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE)
    return (0.01 * wave).astype(np.float32)


def encoded_bytes(
    samples: np.ndarray, format: str = "WAV", rate: int = SAMPLE_RATE, subtype: str | None = None
) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def encoded(samples: np.ndarray, *options: Any) -> str:
    """In base64."""
    return base64.b64encode(encoded_bytes(samples, *options)).decode()


def written(
    samples: np.ndarray, container: str, codec: str, rate: int, bit_rate: int = 128_000, repeat: int = 1
) -> str:
    """A stereo file that PyAV writes, `repeat` times, in base64."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.bit_rate = bit_rate
        stream.codec_context.layout = "stereo"
        frame = av.AudioFrame.from_ndarray(np.stack([samples] * 2), format="fltp", layout="stereo")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    return base64.b64encode(repeat * buffer.getvalue()).decode()


AUDIO = encoded(sound(HELLO.hertz))


def voice(seconds: float, seed: int) -> np.ndarray:
    """Something like a voice: a falling hum of 90 to 190 Hz with formants that change four times a second."""
    rng = np.random.default_rng(seed)
    count = int(seconds * SAMPLE_RATE)
    time = np.arange(count) / SAMPLE_RATE
    pitch = 130 + 40 * np.sin(2 * np.pi * 0.7 * time) - 8 * time
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    vowels = [(730, 1090, 2440), (270, 2290, 3010), (530, 1840, 2480), (570, 840, 2410), (300, 870, 2240)]
    formants = np.repeat(rng.integers(0, 5, int(seconds * 4) + 1), SAMPLE_RATE // 4)[:count]
    table = np.array(vowels)[formants]
    wave = np.zeros(count)
    for harmonic in range(1, 30):
        gain = sum(1 / (1 + ((harmonic * pitch - table[:, n]) / 90) ** 2) / (n + 1) for n in range(3))
        wave += gain * np.sin(harmonic * phase)
    syllables = np.clip(np.sin(2 * np.pi * 4 * time), 0, 1) ** 0.5
    wave = wave * syllables + rng.normal(0, 0.002, count)
    return (0.3 * wave / np.abs(wave).max()).astype(np.float32)


def faded(samples: np.ndarray) -> np.ndarray:
    """Without a click at either end."""
    time = np.arange(len(samples)) / SAMPLE_RATE
    edge = np.clip(np.minimum(time, len(samples) / SAMPLE_RATE - time) / 0.02, 0, 1)
    return (samples * edge).astype(np.float32)


def lecture(tones: int, seed: int) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """English tones of 2.5 to 3.5 s with pauses of about 2 s; when each starts, and its text.

    A chunk of six seconds then has a pause in its last third, and room for no further tone.
    """
    rng = np.random.default_rng(seed)
    samples, marks = silence(0.15), []
    for _ in range(tones):
        said = (HELLO, MORNING)[int(rng.integers(2))]
        marks.append((len(samples) / SAMPLE_RATE, said.text.strip()))
        pause, length = rng.uniform(1.9, 2.3), rng.uniform(2.5, 3.5)
        samples = np.concatenate([samples, sound(said.hertz, length), silence(pause)])
    return samples, marks


async def send(audio: Any = AUDIO, **payload: Any) -> Any:
    """The tones are no speech to silero's model, so `vad` is off unless a test asks for it."""
    audio = encoded(audio) if isinstance(audio, np.ndarray) else audio
    return await helpers.send(worker.handler, **{"audio": audio, "vad": False, **payload})


async def error(*audio: Any, **payload: Any) -> dict[str, Any]:
    return helpers.error_of(await send(*audio, **payload))


def load(engine: str, model: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, **settings: Any) -> Any:
    """The handler's Model, which the handler uses from now on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("RUNPOD_VOLUME_PATH", str(cache / "none"))
    loaded = worker.load(Settings(model_name=str(model), engine=engine, **settings))
    monkeypatch.setattr(worker, "model", loaded, raising=False)
    return loaded


def decode_request(transcriber: Transcriber, samples: np.ndarray, **fields: Any) -> DecodeRequest:
    values = {"language": "en", "task": "transcribe", "prompt": [], "temperature": 0.0, "beam_size": 1}
    values |= {"word_timestamps": True, **fields}
    return DecodeRequest(transcriber.log_mel(samples), len(samples) / SAMPLE_RATE, **values)


class RecordingEngine:
    """An engine around another one.

    submitted: requests in the order in which they joined the queue. batches: those that have run or run.
    run: what decodes a batch; tests put their own here.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.run: Callable[[Sequence[DecodeRequest]], list[DecodeResult]] = engine.decode
        self.submitted: list[DecodeRequest] = []
        self.batches: list[list[DecodeRequest]] = []

    def key(self, request: DecodeRequest) -> Any:
        self.submitted.append(request)
        return self.engine.key(request)

    def decode(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        self.batches.append(list(requests))
        return self.run(requests)

    @property
    def waiting(self) -> list[DecodeRequest]:
        running = {id(request) for batch in list(self.batches) for request in batch}
        return [request for request in list(self.submitted) if id(request) not in running]


def result(tokens: list[int], **fields: Any) -> DecodeResult:
    values = {"language": "en", "language_probability": 0.9, "avg_logprob": -0.1, "no_speech_prob": 0.0}
    return DecodeResult(tokens, **{**values, **fields})


def replace_engine(monkeypatch: pytest.MonkeyPatch, model: Any, engine: Any, **options: Any) -> Transcriber:
    """Let the handler use `engine` in the place of the model's."""
    old = model.transcriber
    new = Transcriber(
        engine,
        old.tokenizer,
        old.feature_extractor,
        **{"batch_size": old.batch_size, "chunk_seconds": old.chunk_seconds, **options},
    )
    monkeypatch.setattr(worker, "model", dataclasses.replace(model, transcriber=new), raising=False)
    return new
