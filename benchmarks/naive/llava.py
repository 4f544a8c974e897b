"""What a first LLaVA handler looks like: synchronous, one job at a time, no concurrency modifier."""

from __future__ import annotations

import base64
import os
from io import BytesIO
from typing import Any

import runpod
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

NAME = os.environ["MODEL_NAME"]
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
processor = AutoProcessor.from_pretrained(NAME)
model = LlavaForConditionalGeneration.from_pretrained(NAME, dtype=dtype).to(device).eval()


def handler(job: dict[str, Any]) -> dict[str, Any]:
    wanted = job["input"]
    image = Image.open(BytesIO(base64.b64decode(wanted["image"].split(",")[-1])))
    text = {"type": "text", "text": wanted.get("prompt", "Describe this image.")}
    talk = [{"role": "user", "content": [{"type": "image"}, text]}]
    prompt = processor.apply_chat_template(talk, add_generation_prompt=True)
    inputs = processor(text=prompt, images=image, return_tensors="pt").to(device, dtype)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=wanted.get("max_tokens", 512), do_sample=False)
    return {"response": processor.decode(out[0], skip_special_tokens=True)}


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
