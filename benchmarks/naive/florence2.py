"""What a first Florence-2 handler looks like: synchronous, one job at a time, no concurrency modifier."""

from __future__ import annotations

import base64
import io
import os
from typing import Any

import runpod
import torch
from PIL import Image
from transformers import AutoProcessor, Florence2ForConditionalGeneration

NAME = os.environ["MODEL_NAME"]
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
processor = AutoProcessor.from_pretrained(NAME)
model = Florence2ForConditionalGeneration.from_pretrained(NAME, dtype=dtype).to(device).eval()


def handler(job: dict[str, Any]) -> dict[str, Any]:
    wanted = job["input"]
    image = Image.open(io.BytesIO(base64.b64decode(wanted["image"].split(",")[-1])))
    task = wanted.get("task", "OCR")
    prompt = f"<{task}>"
    inputs = processor(text=prompt, images=image, return_tensors="pt").to(device, dtype)
    with torch.no_grad():
        rows = model.generate(
            input_ids=inputs["input_ids"],
            pixel_values=inputs["pixel_values"],
            max_new_tokens=wanted.get("max_tokens", 1024),
            num_beams=3,
        )
    raw = processor.batch_decode(rows, skip_special_tokens=True)[0]
    parsed = processor.post_process_generation(raw, task=prompt, image_size=image.size)
    return {"task": task, "raw_output": raw, "parsed": parsed}


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
