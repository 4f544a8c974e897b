"""What a first embeddings handler looks like: synchronous, one job at a time, no concurrency modifier."""

from __future__ import annotations

import os
from typing import Any

import runpod
import torch
from sentence_transformers import SentenceTransformer

NAME = os.environ["MODEL_NAME"]
model = SentenceTransformer(NAME, device="cuda" if torch.cuda.is_available() else "cpu")


def handler(job: dict[str, Any]) -> dict[str, Any]:
    wanted = job["input"]
    texts = wanted.get("texts") or wanted.get("text")
    if not texts:
        return {"error": "texts or text is needed"}
    vectors = model.encode(
        [texts] if isinstance(texts, str) else texts,
        batch_size=wanted.get("batch_size", 32),
        normalize_embeddings=wanted.get("normalize", True),
    )
    count, dimensions = vectors.shape
    return {"embeddings": vectors.tolist(), "model": NAME, "dimensions": dimensions, "count": count}


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
