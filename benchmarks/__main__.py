"""`python -m benchmarks [NAME ...]`: all benchmarks, or those named."""

from __future__ import annotations

import importlib
import sys

NAMES = (
    "embeddings",
    "florence2",
    "huggingface",
    "images",
    "llava",
    "lora",
    "retrieval",
    "tgi",
    "vllm",
    "vllm_http",
    "whisper",
    "xtts",
)


def main() -> None:
    chosen = sys.argv[1:] or NAMES
    if unknown := set(chosen) - set(NAMES):
        sys.exit(f"No such benchmark: {', '.join(sorted(unknown))}. There are: {', '.join(NAMES)}.")
    for name in chosen:
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
