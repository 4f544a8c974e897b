"""What a first XTTS handler looks like: synchronous, one job at a time, the recording in a file."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import runpod
import soundfile
import torch
import TTS.tts.models.xtts as library
from TTS.api import TTS


def load_audio(path: str, rate: int) -> Any:
    """The library's own goes through torchcodec and FFmpeg's libraries, which need not be there."""
    import soxr

    samples, found = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(soxr.resample(samples.mean(axis=1), found, rate))[None].clip(-1, 1)


library.load_audio = load_audio
MODEL = Path(os.environ["MODEL_NAME"])
tts = TTS(model_path=str(MODEL), config_path=str(MODEL / "config.json"), progress_bar=False)


def handler(job: dict[str, Any]) -> dict[str, Any]:
    wanted = job["input"]
    path = "/tmp/reference.wav"
    Path(path).write_bytes(base64.b64decode(wanted["speaker_wav"]))
    wav = tts.tts(text=wanted["text"], speaker_wav=path, language=wanted.get("language", "en"))
    buffer = io.BytesIO()
    soundfile.write(buffer, wav, 24000, format="WAV")
    audio = base64.b64encode(buffer.getvalue()).decode()
    return {"audio": audio, "format": "wav", "sample_rate": 24000}


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
