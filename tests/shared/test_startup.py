"""Settings, logs, startup and prewarm: what a worker does before its first job."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, SecretStr

from shared import prewarm, startup
from shared.errors import StartError
from shared.logs import log, redact
from shared.settings import WorkerSettings, read_settings

TOKEN = "hf_" + "x" * 30


class Settings(WorkerSettings):
    model_name: str = "some/model"
    mode: Literal["fast", "small"] = "fast"
    pin: SecretStr | None = Field(None, max_length=4)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields:
        monkeypatch.delenv(field.upper(), raising=False)
    for name in ("RUNPOD_ENDPOINT_ID", "RUNPOD_LOG_LEVEL", "RUNPOD_DEBUG_LEVEL"):
        monkeypatch.delenv(name, raising=False)


# ---- settings ------------------------------------------------------------------------------------------


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields:
        monkeypatch.setenv(field.upper(), "")
    assert read_settings(Settings) == Settings.model_construct(**Settings().model_dump())
    assert read_settings(Settings).model_name == "some/model"


def test_space_around_a_value_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"MODEL_NAME": "  ", "MODE": "small ", "PREWARM": " false", "HF_TOKEN": f"{TOKEN}\n"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = read_settings(Settings)
    assert (settings.model_name, settings.mode, settings.prewarm) == ("some/model", "small", False)
    assert settings.hf_token is not None
    assert settings.hf_token.get_secret_value() == TOKEN


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("MAX_CONCURRENCY", "many", "integer"),
        ("MAX_CONCURRENCY", "0", "greater than or equal to 1"),
        ("MODE", "slow", "'fast' or 'small'"),
        ("DTYPE", "int3", "'float16'"),
        ("PREWARM", "perhaps", "boolean"),
        ("DEVICE", "tpu", "auto|cpu|cuda"),
    ],
)
def test_a_wrong_value_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, allowed: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(StartError) as caught:
        read_settings(Settings)
    assert caught.value.code == "bad_setting"
    assert caught.value.message.startswith(f"{variable}={value!r}: ")
    assert allowed in caught.value.message
    assert "\n" not in caught.value.message


def test_a_missing_value_is_named() -> None:
    with pytest.raises(StartError, match="MODEL_NAME is not set"):
        read_settings(WorkerSettings)


def test_a_secret_is_in_no_repr_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert TOKEN not in repr(read_settings(Settings))
    monkeypatch.setenv("PIN", "123456")
    with pytest.raises(StartError) as caught:
        read_settings(Settings)
    assert "123456" not in caught.value.message
    assert caught.value.message.startswith("PIN: ")


# ---- logs ----------------------------------------------------------------------------------------------


def test_secrets_are_redacted_even_in_tracebacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "topsecretvalue")
    try:
        raise ValueError(f"{TOKEN} https://user:pass@host/path topsecretvalue")
    except ValueError:
        log.exception("failed")
    out = capsys.readouterr().out
    assert "ValueError" in out
    assert "https://***@host/path" in out
    for secret in (TOKEN, "user:pass", "topsecretvalue"):
        assert secret not in out


def test_redact_leaves_the_rest() -> None:
    assert redact("phase=load seconds=1.0") == "phase=load seconds=1.0"


def test_lines_are_not_printed_twice(capsys: pytest.CaptureFixture[str]) -> None:
    """The SDK gives the root logger a handler of its own."""
    again = logging.StreamHandler()
    logging.getLogger().addHandler(again)
    try:
        log.info("only once")
    finally:
        logging.getLogger().removeHandler(again)
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("only once") == 1


# ---- prewarm -------------------------------------------------------------------------------------------


def test_a_phase_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with prewarm.phase("load") as phase:
        phase.bytes = 7
    assert re.fullmatch(r"INFO   \| phase=load seconds=\d+\.\d{3} bytes=7\n", capsys.readouterr().out)
    with pytest.raises(KeyError), prewarm.phase("load"):
        raise KeyError
    assert "phase=load" not in capsys.readouterr().out, "a phase that failed did not end"


def test_ready_counts_from_the_start_of_the_process(capsys: pytest.CaptureFixture[str]) -> None:
    prewarm.log_ready()
    seconds = float(capsys.readouterr().out.split("seconds=")[1])
    assert 0.05 < seconds < 86400


def test_prewarm_sends_jobs_and_stops_at_an_error() -> None:
    seen = []

    async def handler(job: dict[str, Any]) -> dict[str, Any]:
        seen.append(job["input"])
        return {"error": "broken"} if job["input"] == {"n": 2} else {"ok": True}

    prewarm.run(handler, [{"n": 1}])
    with pytest.raises(StartError, match="broken"):
        prewarm.run(handler, [{"n": 2}, {"n": 3}])
    assert seen == [{"n": 1}, {"n": 2}]


def test_prewarm_reads_a_stream_to_its_end() -> None:
    seen = []

    async def handler(job: dict[str, Any]) -> AsyncIterator[Any]:
        yield "a"
        seen.append(job)
        yield {"error": "late"}

    with pytest.raises(StartError, match="late"):
        prewarm.run(handler, [{}])
    assert len(seen) == 1


# ---- startup -------------------------------------------------------------------------------------------


def failing(error: Exception) -> Any:
    def prepare() -> dict[str, Any]:
        raise error

    return prepare


@pytest.mark.parametrize(
    ("error", "code", "says"),
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
            ImportError(
                "This modeling file requires the following packages that were not found in your environment: "
                "einops. Run `pip install einops`"
            ),
            "missing_package",
            "requirements.in",
        ),
    ],
)  # fmt: skip
async def test_a_permanent_cause_is_answered_to_every_job(
    error: Exception, code: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = startup.run(failing(error), worker="w")
    for _ in range(2):
        answer = json.loads((await config["handler"]({"id": "1", "input": {}}))["error"])
        assert (answer["code"], answer["type"]) == (code, "server_error")
        assert says in answer["message"]
    assert config["concurrency_modifier"](1) > 1
    assert f"code={code}" in capsys.readouterr().out


def test_any_other_failure_exits_so_that_the_worker_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        startup.run(failing(ConnectionError("hub is down")), worker="w")
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


LOADING = """
import time
from shared import startup
def prepare():
    print("loading", flush=True)
    time.sleep(600)
startup.run(prepare, worker="w")
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
    config = {"handler": print}
    assert startup.run(lambda: config, worker="w") is config
    out = capsys.readouterr().out
    assert re.search(
        r"versions worker=w python=\S+ runpod=\S+ torch=\S+ transformers=\S+ cuda=\S+ model=", out
    )
    assert "phase=ready" in out
    assert os.environ["RUNPOD_LOG_LEVEL"] == "INFO"
