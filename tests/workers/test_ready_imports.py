"""What a ready worker has imported: each package costs seconds of every start, which are billed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tools.models import local_env
from tools.workers import ROOT

# Packages of a ready worker beyond those of `import transformers.modeling_utils`, which all of these need.
# A worker's own libraries are here, and none that it can do without: no sentence_transformers, sklearn, peft,
# bitsandbytes, networkx or joblib.
READY: dict[str, set[str]] = {
    "bge": set(),
    "florence2": set(),
    "huggingface": set(),
    "llava": set(),
    "sentence-transformers": set(),
    "whisper": {"av", "ctranslate2", "faster_whisper", "onnxruntime"},
}
# What `shared` imports, and what transformers' tokenizers and feature extractors do where it is installed.
SHARED = {
    "annotated_types", "pydantic", "pydantic_core", "pydantic_settings", "dotenv", "typing_inspection",
    "sentencepiece", "soundfile", "soxr", "tokenizers", "torchaudio",
}  # fmt: skip
LIST = """
import json, sys
packages = {name.partition(".")[0] for name, module in sys.modules.items()
            if "site-packages" in (getattr(module, "__file__", None) or "")}
print(json.dumps(sorted(name for name in packages if not name.startswith("_"))))
"""


def imported_by(code: str, **env: str) -> set[str]:
    """The top-level packages that a new process has imported after `code`."""
    command = [sys.executable, "-c", code + LIST]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def floor() -> set[str]:
    return imported_by("import transformers.modeling_utils\n") | SHARED


@pytest.mark.engine
@pytest.mark.parametrize("worker", READY)
def test_a_ready_worker_has_imported_what_it_uses(worker: str, floor: set[str]) -> None:
    code = f"from tools.workers import load_handler\nload_handler({worker!r}).prepare()\n"
    assert imported_by(code, **local_env(worker)) - floor <= READY[worker]
