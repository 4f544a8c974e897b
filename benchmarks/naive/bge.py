"""What a first handler for BGE looks like: one job at a time, the mean, an instruction everywhere."""

from __future__ import annotations

import os
from typing import Any

import runpod
import torch
from transformers import AutoModel, AutoTokenizer

NAME = os.environ["MODEL_NAME"]
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(NAME)
model = AutoModel.from_pretrained(NAME).to(device).eval()


def handler(job: dict[str, Any]) -> dict[str, Any]:
    wanted = job["input"]
    instruction = wanted.get("instruction", "Represent this sentence for retrieval: ")
    texts = [instruction + text for text in wanted.get("texts", [])]
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt").to(device)
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).float()
    rows = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    rows = torch.nn.functional.normalize(rows, dim=1)
    return {"embeddings": rows.cpu().numpy().tolist(), "model": NAME}


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
