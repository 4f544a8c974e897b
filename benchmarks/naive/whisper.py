"""What a first Whisper handler looks like: synchronous, one job at a time, transformers' pipeline."""

from __future__ import annotations

import base64
import io
import os
from typing import Any

import runpod
import soundfile
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

NAME = os.environ["MODEL_NAME"]
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
processor = AutoProcessor.from_pretrained(NAME)
model = AutoModelForSpeechSeq2Seq.from_pretrained(NAME, dtype=dtype)
recognise = pipeline(
    "automatic-speech-recognition",
    model=model,
    device=device,
    tokenizer=processor.tokenizer,
    feature_extractor=processor.feature_extractor,
)


def handler(job: dict[str, Any]) -> dict[str, Any]:
    wanted = job["input"]
    # The pipeline itself would call ffmpeg.
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(wanted["audio"])), dtype="float32")
    options: dict[str, Any] = {"task": wanted.get("task", "transcribe")}
    if beams := os.environ.get("BEAMS"):  # else the pipeline's own: five, in transformers 5
        options["num_beams"] = int(beams)
    if language := wanted.get("language"):
        options["language"] = language
    result = recognise(
        {"raw": samples, "sampling_rate": rate},
        return_timestamps=wanted.get("timestamps", False),
        generate_kwargs=options,
    )
    return {"text": result["text"], "chunks": result.get("chunks", [])}


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
