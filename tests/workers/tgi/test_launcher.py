"""Settings, and the launcher's command line and environment; without a server."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared import startup
from shared.errors import StartError
from shared.settings import read_settings
from shared.volume import ModelPath
from tools.stand_ins import tgi as stand_in

launcher = importlib.import_module("workers.tgi.launcher")
schemas = importlib.import_module("workers.tgi.schemas")
SECRET = "hf_" + "s" * 30
NAMES = {"MODEL_NAME", "MODEL_REVISION", "HUGGING_FACE_HUB_TOKEN"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name in NAMES or name.lower() in {*stand_in.ARGUMENTS, *schemas.Settings.model_fields}:
            monkeypatch.delenv(name)


def settings(**env: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        return read_settings(schemas.Settings)


def parsed(**env: str) -> argparse.Namespace:
    """What TGI's launcher makes of the command line and the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MODEL_ID": "a/b", **env}.items():
            patch.setenv(name, value)
        worker_settings = read_settings(schemas.Settings)
        for name, value in launcher.environment(worker_settings, offline=True).items():
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        program, *argv = launcher.command(worker_settings, "/the/model", None, 12345)
        assert program == "text-generation-launcher"
        return stand_in.parse(argv)


def test_the_defaults_of_the_command_line() -> None:
    changed = {name: value for name, value in vars(parsed()).items() if value != stand_in.ARGUMENTS.get(name)}
    assert changed == {
        "model_id": "/the/model", "hostname": "127.0.0.1", "port": 12345, "usage_stats": "off",
        "payload_limit": 64_000_000, "graceful_termination_timeout": 10, "trust_remote_code": False,
    }  # fmt: skip


def test_the_environment_cannot_mislead_tgi() -> None:
    """Empty variables, which are errors there, and names that mean something else in a container."""
    empty = {name.upper(): "" for name in stand_in.ARGUMENTS if name != "model_id"}
    others = {"HOSTNAME": "4f2c", "PORT": "80", "USAGE_STATS": "on", "API_KEY": "x", "DTYPE": "auto"}
    assert parsed(**empty) == parsed(**others) == parsed()


def test_names_of_one_setting() -> None:
    assert settings(MODEL_NAME="a/b").model_name == "a/b"
    assert settings(MODEL_NAME="a/b", MODEL_ID="c/d").model_name == "c/d"
    assert settings(MODEL_ID="c/d", REVISION="r").model_revision == "r"
    assert settings(MODEL_ID="c/d", HUGGING_FACE_HUB_TOKEN=SECRET).hf_token.get_secret_value() == SECRET
    assert parsed(DTYPE="float16", TRUST_REMOTE_CODE="1").dtype == "float16"
    assert parsed(TRUST_REMOTE_CODE="1").trust_remote_code is True
    assert parsed(TGI_EXTRA_ARGS="--max-best-of 5").max_best_of == 5


def test_concurrency() -> None:
    assert settings(MODEL_ID="a").max_concurrency == 64
    assert parsed().max_concurrent_requests == 128
    assert parsed(MAX_CONCURRENCY="200").max_concurrent_requests == 400
    assert settings(MODEL_ID="a", MAX_CONCURRENT_REQUESTS=" 9 ").max_concurrency == 9
    both = settings(MODEL_ID="a", MAX_CONCURRENT_REQUESTS="9", MAX_CONCURRENCY="4")
    assert (both.max_concurrency, both.max_concurrent_requests) == (4, 9)


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({}, "MODEL_ID is not set"),
        ({"MODEL_ID": ""}, "MODEL_ID is not set"),
        ({"MODEL_ID": "a", "DTYPE": "int3"}, "DTYPE='int3'"),
        ({"MODEL_ID": "a", "MAX_CONCURRENT_REQUESTS": "0"}, "MAX_CONCURRENT_REQUESTS='0'"),
    ],
)
def test_a_wrong_setting_is_named(env: dict[str, str], text: str) -> None:
    with pytest.raises(StartError, match=text) as caught:
        settings(**env)
    assert caught.value.code == "bad_setting"


@pytest.mark.parametrize(
    "extra", ["--port 5", "-p 5", "-p5", "-p=5", "--graceful-termination-timeout=5", "--model-id=x", "'"]
)
def test_extra_arguments_that_the_worker_sets_are_refused(extra: str) -> None:
    with pytest.raises(StartError, match="TGI_EXTRA_ARGS"):
        parsed(TGI_EXTRA_ARGS=extra)


def test_names_of_adapters() -> None:
    assert settings(MODEL_ID="a", LORA_ADAPTERS="x/y, z=/folder,q@main").adapter_names == ["x/y", "z", "q"]


@pytest.mark.parametrize(
    ("code", "adapters", "argv", "online"),
    [
        (None, None, ["--model-id", "/the/model"], False),
        (None, "x=/folder", ["--model-id", "/the/model"], False),
        (None, "x/y", ["--model-id", "/the/model"], True),
        ("no_weights", None, ["--model-id", "a/b"], True),
        ("gated", None, None, False),
    ],
)
def test_who_downloads_the_model(
    monkeypatch: pytest.MonkeyPatch, code: str | None, adapters: str | None, argv: list[str] | None,
    online: bool,
) -> None:  # fmt: skip
    """This worker; TGI for other formats, and for adapters by their id."""
    started = []

    def resolve(*_: Any) -> ModelPath:
        if code:
            raise StartError("no", code=code)
        return ModelPath(Path("/the/model"), "a/b", "c0ffee", "volume", 1)

    class Server:
        def __init__(self, name: str, command: Callable[[int], list[str]], **options: Any) -> None:
            started.append((command(5), options["env"]))

        def start(self) -> None:
            pass

    monkeypatch.setattr(startup, "resolve", resolve)
    monkeypatch.setattr(launcher, "EngineServer", Server)
    env = {"MODEL_ID": "a/b", "REVISION": "r", **({"LORA_ADAPTERS": adapters} if adapters else {})}
    if argv is None:
        with pytest.raises(StartError, match="no"):
            launcher.start(settings(**env), lambda _: None)
        return
    _, commit = launcher.start(settings(**env), lambda _: None)
    ((command, changed),) = started
    assert command[1 : len(argv) + 1] == argv
    assert ("--revision" in command) == (code is not None)
    assert ("HF_HUB_OFFLINE" in changed) == online
    assert commit == (None if code else "c0ffee")


@pytest.mark.parametrize("there", [True, False])
def test_tgis_downloads_go_to_the_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """In the image's HF_HOME they would be lost at the end of the worker."""
    for name in ("HF_MODULES_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("RUNPOD_VOLUME_PATH", str(tmp_path if there else tmp_path / "nothing"))
    expected = str(tmp_path / "huggingface-cache") if there else "/data"
    for home, after in (("/data", expected), ("/mine", "/mine")):
        monkeypatch.setenv("HF_HOME", home)
        launcher.use_volume_for_tgi()
        assert os.environ["HF_HOME"] == after


def test_a_chat_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"eos_token": "x"}')
    assert launcher.tokenizer_config(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    new = json.loads(Path(launcher.tokenizer_config(tmp_path)).read_text())
    assert new == {"eos_token": "x", "chat_template": "{{ messages }}"}
    config.write_text('{"chat_template": "mine"}')
    assert launcher.tokenizer_config(tmp_path) is None
