"""Recordings to send, and the samples of answers."""

from __future__ import annotations

import base64
import io
import subprocess
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

Samples = NDArray[np.float32]
RATE = 24000


def recording(seconds: float = 3.0, *, pitch: float = 180.0, rate: int = 22050) -> Samples:
    """Something like a voice: a hum with overtones that swells and sinks."""
    t = np.arange(int(seconds * rate)) / rate
    hum = sum(np.sin(2 * np.pi * pitch * k * t) / k for k in range(1, 8))
    return (0.2 * hum * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))).astype(np.float32)


def wav(samples: Samples, rate: int = 22050, **options: Any) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **{"format": "WAV", **options})
    return base64.b64encode(buffer.getvalue()).decode()


def decoded(answer: dict[str, Any]) -> Samples:
    """The samples of an answer or a chunk, by libsndfile."""
    data = base64.b64decode(answer["audio"], validate=True)
    if answer["format"] == "pcm":
        return (np.frombuffer(data, "<i2") / 32768).astype(np.float32)
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert samples.ndim == 1
    assert rate == answer["sample_rate"]
    assert np.isfinite(samples).all()
    return samples  # type: ignore[no-any-return]


def by_ffmpeg(data: bytes, kind: str, rate: int) -> Samples:
    """The samples of a file, by ffmpeg, from a pipe."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "fatal"]
    if kind == "pcm":
        command += ["-f", "s16le", "-ar", str(rate), "-ac", "1"]
    command += ["-i", "pipe:0", "-f", "f32le", "-ac", "1", "-ar", str(rate), "pipe:1"]
    done = subprocess.run(command, input=data, capture_output=True, check=True)
    assert not done.stderr
    return np.frombuffer(done.stdout, "<f4")


def alike(one: Samples, other: Samples) -> bool:
    """The same but for the last bits: batches may round otherwise than a lone run."""
    return one.shape == other.shape and bool(np.abs(one - other).max() < 1e-3)
