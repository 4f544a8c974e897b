"""`make setup`: what it says when something is missing, and when it does nothing."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tools import environment
from tools.workers import worker_names


def test_set_up_names_the_python_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit, match=r"^Missing: Python 3\.11 or newer"):
        environment.check_python()


def test_set_up_without_a_package_index_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    command = (*environment.pip(Path(sys.executable)), "--target", tmp_path, "--no-deps")
    with pytest.raises(SystemExit, match=r"^Missing: a package index"):
        environment.install("packages", *command, "-r", environment.LOCK)


def test_a_fresh_environment_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").touch()
    (tmp_path / ".made").write_text(environment.fingerprint("a==1", "torch==2"))
    monkeypatch.setattr(environment, "install", lambda *_, **__: pytest.fail("installed again"))
    assert environment.make(tmp_path, "a==1", "torch==2", title="packages", steps=1) is None
    monkeypatch.setenv("TORCH_INDEX", "https://example.com")
    assert (tmp_path / ".made").read_text() != environment.fingerprint("a==1", "torch==2")


@pytest.mark.parametrize("worker", worker_names())
def test_a_workers_environment_has_its_lock_without_cuda(worker: str) -> None:
    packages, torch = environment.run_packages(worker)
    pins = dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", packages, re.MULTILINE))
    lock = environment.entries(environment.ROOT / "workers" / worker / "requirements.txt")
    missing = {name for name in lock if name not in pins}
    assert missing <= {"nvidia-cublas-cu12", *environment.BESIDE_TORCH}
    assert set(environment.EXTRAS) <= set(pins)
    assert packages.count("==") - packages.count(" == ") <= packages.count(" --hash=sha256:")
    assert torch.startswith("torch==") == (worker != "vllm")
    assert ("torchvision==" in torch, "torchaudio==" in torch) == (worker == "llava", worker == "xtts")


@pytest.mark.parametrize("loads", [True, False])
def test_libraries_of_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: bool) -> None:
    """A package that, like torchaudio, loads its library where there is one."""
    package = tmp_path / "torchaudio"
    (package / "lib").mkdir(parents=True)
    library = package / "lib" / "_torchaudio.abi3.so"
    library.touch()
    load = "" if loads else f"import os\nif os.path.exists({str(library)!r}): raise OSError('no libcudart')\n"
    (package / "__init__.py").write_text(load)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    environment.drop_what_does_not_load(Path(sys.executable))
    assert library.exists() == loads
    assert [pin.split("==")[0] for pin in environment.audio()] == ["torchaudio", "torchcodec"]
