"""How many GPUs the engine can spread a model over."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path


def count_gpus(environ: Mapping[str, str]) -> int:
    """The GPUs that a CUDA process would see, without being one: a context takes memory from the engine."""
    if (visible := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    try:
        output = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in output.stdout.splitlines())


def usable_gpus(model: Path, count: int) -> int:
    """The most of `count` GPUs over which the model's attention heads divide evenly."""
    try:
        config = json.loads((model / "config.json").read_text())
        heads = int((config.get("text_config") or config)["num_attention_heads"])
    except (OSError, ValueError, KeyError, TypeError):
        return count
    return max((gpus for gpus in range(1, count + 1) if heads % gpus == 0), default=count)
