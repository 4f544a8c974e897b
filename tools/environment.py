"""Makes the development environment: `python3 tools/environment.py .venv`. The Makefile calls it.

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
NETWORK = ("No matching distribution", "Could not find a version", "Connection", "timed out", "Max retries")
SECONDS_BETWEEN_LINES = 10.0


def say(text: str) -> None:
    print(text, flush=True)


def stop(text: str) -> None:
    raise SystemExit("Missing: " + text)


def wanted() -> str:
    """What the environment is made from, as one hash."""
    parts = [LOCK.read_bytes(), TORCH.read_bytes(), os.environ.get("TORCH_INDEX", "").encode()]
    parts.append(platform.python_version().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def check_python() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 (this file runs on whatever Python is found)
        stop(f"Python 3.11 or newer; this is {platform.python_version()}. Name one: make PYTHON=python3.12")
    try:
        import ensurepip  # noqa: F401 (Debian ships venv without it)
        import venv  # noqa: F401
    except ImportError:
        major, minor = sys.version_info[:2]
        stop(f"Python's venv module; on Debian and Ubuntu: apt-get install python{major}.{minor}-venv")


def install(python: Path, title: str, *arguments: str, total: int = 0) -> None:
    """One run of pip, shown as a line now and then instead of pip's own hundreds."""
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
    if pip.returncode:
        say("\n".join(errors[-12:]))
        if any(word in line for word in NETWORK for line in errors):
            stop("a package index that answers and has the package above; is the network up?")
        raise SystemExit("pip could not install the above.")
    say(f"  done in {time.monotonic() - started:.0f} s")


def main(folder: Path) -> None:
    check_python()
    stamp = folder / ".made"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if stamp.exists() and stamp.read_text() == wanted() and python.exists():
        stamp.touch()
        return
    stamp.unlink(missing_ok=True)
    say(f"Making {folder.name}/ with Python {platform.python_version()}: once, some minutes.")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    total = len(re.findall(r"^\S+==", LOCK.read_text(), re.MULTILINE))
    install(
        python,
        f"1/2 {total} packages of {LOCK.name}, checked against their hashes",
        *("--require-hashes", "--no-deps", "--requirement", str(LOCK)),
        total=total,
    )
    index = os.environ.get("TORCH_INDEX", "")
    size = "several GB with CUDA; TORCH_INDEX=https://download.pytorch.org/whl/cpu is smaller"
    install(
        python,
        "2/2 torch" + (f" ({size})" if sys.platform == "linux" and not index else ""),
        *(("--index-url", index) if index else ()),
        *("--requirement", str(TORCH)),
    )
    stamp.write_text(wanted())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
