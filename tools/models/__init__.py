"""The models that run without a hub, an account or a GPU: for `make run`, the tests and the benchmarks."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tools.models import (
    real,
    tiny_causal,
    tiny_florence2,
    tiny_llava,
    tiny_retrieval,
    tiny_whisper,
    tiny_xtts,
    vllm_cpu,
)
from tools.models.cache import made
from tools.stand_ins import tgi as tgi_stand_in

__all__ = ["LOCAL", "NOTES", "REAL", "engine_env", "local_env", "made", "minilm", "real_env"]


def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2. Raises real.Unavailable."""
    return real.folder("minilm")


def tgi_launcher(folder: Path) -> None:
    """A program that is called as TGI's launcher is, and is the stand-in for it."""
    program = folder / "text-generation-launcher"
    command = [sys.executable, tgi_stand_in.__file__]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    program.chmod(0o755)


def _served(folder: str, make: Callable[[Path], object], name: str) -> Callable[[], dict[str, str]]:
    return lambda: {"MODEL_NAME": str(made(folder, make)), "SERVED_MODEL_NAME": name}


# The variables of each worker that give it a tiny model, which the project makes itself.
LOCAL: dict[str, Callable[[], dict[str, str]]] = {
    "bge": _served("bge", tiny_retrieval.tiny_bge, "tiny-random/bge-small-en"),
    "florence2": _served("florence2", tiny_florence2.make, "tiny/Florence-2"),
    "huggingface": _served("huggingface", tiny_causal.make, "tiny-random/llama"),
    "llava": _served("llava", tiny_llava.make, "tiny/llava"),
    "vllm": _served("engines", vllm_cpu.make_model, "tiny-random/llama"),
    "sentence-transformers": _served("bge", tiny_retrieval.tiny_bge, "tiny-random/embeddings"),
    "tgi": _served("huggingface", tiny_causal.make, "stand-in/no-model"),
    "whisper": _served("whisper", tiny_whisper.make, "tiny/whisper"),
    # Nobody's weights but the project's own are loaded.
    "xtts": lambda: {**_served("xtts", tiny_xtts.make, "tiny-random/xtts")(), "COQUI_TOS_AGREED": "1"},
}

# The workers that have real weights, as tools/models/real.py names them.
REAL = {
    "bge": "e5-small",
    "huggingface": "smollm2",
    "sentence-transformers": "minilm",
    "vllm": "smollm2",
    "whisper": "whisper-base",
}

TINY = "No package carries real weights of this kind: a tiny model, made here, takes their place."
NOTES = {
    "florence2": f"{TINY} It knows a few pictures.",
    "llava": f"{TINY} It knows a few pictures and questions.",
    "tgi": "TGI runs in its image, on a GPU. Here a stand-in takes its place (tools/stand_ins/tgi.py), "
    "which has TGI's API and answers with random words.",
    "xtts": f"{TINY} It speaks in hums.",
}
"""What `make run-<worker>` prints of a worker that does not run here as it is."""


def engine_env(worker: str) -> dict[str, str]:
    """What `worker` needs to run on this machine, with whatever model: the vLLM of .venv-vllm, and a stand-in
    for TGI where there is none.
    """
    if worker == "vllm":
        return vllm_cpu.engine_env()
    if worker == "tgi" and not shutil.which("text-generation-launcher"):
        path = os.environ.get("PATH", os.defpath)
        return {"PATH": os.pathsep.join([str(made("tgi-launcher", tgi_launcher)), path])}
    return {}


def local_env(worker: str) -> dict[str, str]:
    """Environment variables with which `worker` runs on this machine: a tiny model at hand, and no hub.

    A worker without a model of the project's own takes its default model from the hub.
    """
    if worker not in LOCAL:
        return engine_env(worker)
    return {"HF_HUB_OFFLINE": "1", **engine_env(worker), **LOCAL[worker]()}


def real_env(worker: str) -> dict[str, str]:
    """The same with real weights. Raises real.Unavailable, KeyError for a worker that has none."""
    key = REAL[worker]
    if worker == "whisper" and os.environ.get("ENGINE") == "faster-whisper":
        key = "whisper-base-ctranslate2"
    model = {"MODEL_NAME": str(real.folder(key)), "SERVED_MODEL_NAME": real.MODELS[key].name}
    return {"HF_HUB_OFFLINE": "1", **engine_env(worker), **model}
