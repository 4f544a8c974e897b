"""What a first text handler looks like: synchronous, one job at a time, no concurrency modifier."""

from __future__ import annotations

import os
from typing import Any

import runpod
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME = os.environ["MODEL_NAME"]
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModelForCausalLM.from_pretrained(NAME, dtype=dtype).to(device).eval()


def handler(job: dict[str, Any]) -> dict[str, Any]:
    wanted = job["input"]
    prompt = wanted["prompt"]
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    temperature = wanted.get("temperature", 0.7)
    sampled = {"temperature": temperature, "top_p": 0.95, "top_k": 50} if temperature > 0 else {}
    with torch.no_grad():
        rows = model.generate(
            **inputs,
            max_new_tokens=wanted.get("max_tokens", 512),
            do_sample=temperature > 0,
            pad_token_id=tokenizer.eos_token_id,
            **sampled,
        )
    read = inputs["input_ids"].shape[1]
    return {
        "response": tokenizer.decode(rows[0, read:], skip_special_tokens=True),
        "usage": {"prompt_tokens": read, "completion_tokens": rows.shape[1] - read},
    }


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
