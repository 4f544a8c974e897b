"""The start of a worker: phases, causes of failure, signals."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared import startup
from shared.errors import StartError
from shared.jobs import Job, job_handler
from shared.settings import WorkerSettings


@pytest.fixture(autouse=True)
def no_log_level(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RUNPOD_LOG_LEVEL", "RUNPOD_DEBUG_LEVEL"):
        monkeypatch.delenv(name, raising=False)


def test_a_phase_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with startup.phase("load") as phase:
        phase.bytes = 7
    assert re.fullmatch(r"INFO   \| phase=load seconds=\d+\.\d{3} bytes=7\n", capsys.readouterr().out)
    with pytest.raises(KeyError), startup.phase("load"):
        raise KeyError
    assert "phase=load" not in capsys.readouterr().out, "a phase that failed did not end"


def test_ready_counts_from_the_start_of_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    startup.log_ready()
    seconds = float(capsys.readouterr().out.split("seconds=")[1])
    assert 0.05 < seconds < 86400


@job_handler()
async def no_handler(request: Any, job: Job) -> None:
    """Of a worker that does not start."""


def failing(error: Exception) -> Any:
    def prepare() -> dict[str, Any]:
        raise error

    return prepare


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (StartError("No such model.", code="model_not_found"), "model_not_found", "No such model."),
        (OSError(errno.ENOSPC, "No space left on device"), "no_space", "larger container disk"),
        (MemoryError(), "out_of_memory", "larger GPU"),
        (
            ValueError("model type `x` but Transformers does not recognize this architecture"),
            "unsupported_architecture",
            "newer image",
        ),
        (ValueError("Please pass `trust_remote_code=True`"), "needs_remote_code", "TRUST_REMOTE_CODE"),
        (
            ImportError("packages that were not found in your environment: einops. Run `pip install einops`"),
            "missing_package",
            "requirements.in",
        ),
    ],
)
async def test_a_permanent_cause_is_answered_to_every_job(
    error: Exception, code: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = startup.run(no_handler, failing(error), worker="w")
    for _ in range(2):
        answer = json.loads((await config["handler"]({"id": "1", "input": {}}))["error"])
        assert (answer["code"], answer["type"]) == (code, "server_error")
        assert text in answer["message"]
    assert config["concurrency_modifier"](1) > 1
    assert f"code={code}" in capsys.readouterr().out


def test_any_other_failure_exits_so_that_the_worker_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        startup.run(no_handler, failing(ConnectionError("hub is down")), worker="w")
    assert caught.value.code == 1
    assert "hub is down" in capsys.readouterr().out


@pytest.mark.parametrize(("line", "cuda"), [("'13.0'", "13.0"), ("None", None)])
def test_the_cuda_of_torch_is_known_without_importing_it(line: str, cuda: str | None, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise RuntimeError('imported')")
    version = (
        f"from typing import Optional\n__version__ = '2.13.0'\ncuda: Optional[str] = {line}\nhip = '7.0'\n"
    )
    (tmp_path / "torch/version.py").write_text(version)
    code = "from shared.startup import cuda_version; print(cuda_version())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(cuda)


def test_without_torch_the_base_image_names_its_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_VERSION", "12.9.1")
    assert startup.cuda_version() == "12.9.1"


def test_resolve_logs_its_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(8))
    model = startup.resolve(WorkerSettings(model_name="m"), str(tmp_path))
    assert Path(model.path) == tmp_path
    assert "phase=resolve seconds=" in capsys.readouterr().out


LOADING = """
import time
from shared import startup
def prepare():
    print("loading", flush=True)
    time.sleep(600)
startup.run(None, prepare, worker="w")
"""


def test_sigterm_ends_a_start() -> None:
    """By itself: a container's first process does not end at a signal that it leaves alone."""
    command = [sys.executable, "-c", LOADING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "loading\n":
            assert process.poll() is None
        process.terminate()
        assert process.wait(60) == 143


def test_a_good_start_returns_the_configuration_and_logs_it(capsys: pytest.CaptureFixture[str]) -> None:
    settings = WorkerSettings(model_name="m", max_concurrency=7)
    config = startup.run(no_handler, lambda: settings, worker="w")
    assert config["handler"] == no_handler.__call__
    assert config["concurrency_modifier"](1) == 7
    out = capsys.readouterr().out
    assert re.search(
        r"versions worker=w python=\S+ runpod=\S+ torch=\S+ transformers=\S+ cuda=\S+ model=", out
    )
    assert "phase=ready" in out
    assert os.environ["RUNPOD_LOG_LEVEL"] == "INFO"
