"""Every lock is pinned, hashed and what its requirements compile to. Those that ask PyPI: make test-locks."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import locks
from tools.workers import ROOT

# Each lock with the function that compiles it.
COMPILE = {
    locks.TORCH_LOCK: locks.lock_torch,
    locks.DEV_LOCK: locks.lock_dev,
    locks.VLLM_LOCK: locks.lock_vllm,
    **{folder / "requirements.txt": partial(locks.lock_worker, folder) for folder in locks.lock_folders()},
}
IN_IMAGES = [path for path in COMPILE if path not in (locks.DEV_LOCK, locks.VLLM_LOCK)]

each_lock = pytest.mark.parametrize("path", COMPILE, ids=str)
each_folder = pytest.mark.parametrize("folder", locks.lock_folders(), ids=str)


def pins(path: Path) -> dict[str, str]:
    return {str(canonicalize_name(name)): version for name, version in locks.pins(ROOT / path).items()}


def requirements(path: Path) -> list[Requirement]:
    """The lines of a requirements.in, `-r` followed."""
    result = []
    for line in path.read_text().splitlines():
        text = line.split("#")[0].strip()
        if text.startswith("-r "):
            result += requirements((path.parent / text[3:]).resolve())
        elif text and not text.startswith("-"):
            result.append(Requirement(text))
    return result


@each_folder
def test_lock_satisfies_its_requirements(folder: Path) -> None:
    locked = pins(folder / "requirements.txt")
    if locks.uses_torch(ROOT / folder / "requirements.in"):
        locked |= pins(locks.TORCH_LOCK)
    for requirement in requirements(ROOT / folder / "requirements.in"):
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{requirement}: run make lock"
        assert requirement.specifier.contains(locked[name]), f"{requirement}, locked at {locked[name]}"


@each_folder
def test_lock_repeats_nothing_of_torch_and_agrees_with_development(folder: Path) -> None:
    own, torch, development = map(pins, (folder / "requirements.txt", locks.TORCH_LOCK, locks.DEV_LOCK))
    # Of CUDA's packages, and those that need its torch, development has none.
    shared = {
        name: version
        for name, version in own.items()
        if name not in locks.BESIDE_TORCH and not locks.CUDA_ONLY.fullmatch(name)
    }
    assert shared.items() <= development.items()
    if locks.uses_torch(ROOT / folder / "requirements.in"):
        assert not own.keys() & torch.keys()
    # What torch needs beside CUDA is in the development lock, at the same versions.
    plain = {name: version for name, version in torch.items() if not locks.CUDA_ONLY.fullmatch(name)}
    assert plain.items() <= development.items()


@each_lock
def test_lock_is_pinned_hashed_and_names_no_source(path: Path) -> None:
    text = (ROOT / path).read_text()
    for entry in re.split(r"\n(?=[A-Za-z0-9])", text)[1:]:
        assert re.match(r"[A-Za-z0-9._-]+==\S+", entry), entry.splitlines()[0]
        assert "--hash=sha256:" in entry, entry.splitlines()[0]
    assert not re.search(r"https?://|file:|--(extra-)?index-url|--find-links", text)


# ---- those that ask PyPI -------------------------------------------------------------------------------


def packages(path: Path) -> list[str]:
    """A lock without hashes (a release may gain wheels) and without comments."""
    return [line for line in path.read_text().splitlines() if re.match(r"[A-Za-z0-9]", line)]


@pytest.mark.network
@each_lock
def test_lock_is_what_its_requirements_compile_to(path: Path, tmp_path: Path) -> None:
    """Compiles again, holding on to the versions that are locked."""
    again = tmp_path / "lock.txt"
    again.write_text((ROOT / path).read_text())
    COMPILE[path](output=again)
    assert packages(again) == packages(ROOT / path), "run make lock"


@pytest.mark.network
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("path", IN_IMAGES, ids=str)
def test_image_finds_a_wheel_of_every_package(path: Path, python: str, tmp_path: Path) -> None:
    """Images build nothing from source: that would run unpinned code, and need a compiler.

    Except what locks.FROM_SOURCE names; see tests/house/test_images.py.
    """
    entries = re.split(r"\n(?=[A-Za-z0-9])", (ROOT / path).read_text())
    wheels = tmp_path / "lock.txt"
    wheels.write_text("\n".join(entry for entry in entries if entry.split("==")[0] not in locks.FROM_SOURCE))
    command = ["pip", "install", "--dry-run", "--quiet", "--target", str(tmp_path), "--no-deps"]
    command += ["--require-hashes", "--only-binary", ":all:", "--requirement", str(wheels)]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
    uv = Path(sys.executable).parent / "uv"
    done = subprocess.run([uv, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
