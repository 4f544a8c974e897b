"""vLLM on this machine's CPU: the environment .venv-vllm, and how workers/vllm starts an engine from it."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

from tools import environment
from tools.models import tiny_causal
from tools.workers import ROOT

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
# This wheel's own command line does not start: it looks for a package that is called vllm.
MODULE = "vllm.entrypoints.launchers.api_server.entry"


def missing() -> str | None:
    """Why there is no vLLM to run here; None where there is."""
    if reason := environment.no_vllm():
        return reason
    return None if PYTHON.exists() else "no .venv-vllm: make test-vllm makes it"


def engine_env() -> dict[str, str]:
    """Environment variables for workers/vllm with the engine of .venv-vllm: small, and quick to start."""
    return {
        "ENGINE_COMMAND": f"{PYTHON} -m {MODULE} --model {{model}}",
        "ENFORCE_EAGER": "true",
        "DTYPE": "float32",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def make_model(folder: Path) -> None:
    """tiny_causal.make_for_engines, in .venv-vllm where this process has no torch."""
    if importlib.util.find_spec("torch"):
        tiny_causal.make_for_engines(folder)
        return
    code = f"from tools.models.tiny_causal import *; make_for_engines(Path({str(folder)!r}))"
    subprocess.run([PYTHON, "-c", code], cwd=ROOT, check=True)
