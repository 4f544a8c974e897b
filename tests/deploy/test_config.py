"""deploy.toml: the nine that there are, held to the worker's Settings and to the images' CUDA; wrong ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy.config import Config, ConfigError, load_config
from shared.settings import HttpSettings, read_settings
from tools import bake
from tools.workers import ROOT, load_module, worker_names

each_worker = pytest.mark.parametrize("name", worker_names())


@each_worker
def test_every_worker_has_one_whose_variables_are_settings_of_the_worker(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(name)
    settings = load_module(name, "schemas").Settings
    known = {field.upper() for model in (settings, HttpSettings) for field in model.model_fields}
    assert config.env.keys() | config.secrets.keys() | set(config.required) <= known
    for variable in {*known, "MODEL_ID"}:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in {**dict.fromkeys(config.required, "1"), **config.env}.items():
        monkeypatch.setenv(variable, value)
    limit = read_settings(settings).max_concurrency or 64  # vllm finds its own at the start
    assert config.request_count <= limit, "a worker would be full before another is added"


@each_worker
def test_cuda_floor_is_that_of_the_image(name: str) -> None:
    cuda = dict(re.findall(r'^  (\w+) += \{ image = .* cuda = "(.*?)" \}$', bake_text(), re.MULTILINE))
    assert load_config(name).cuda == cuda[bake.table()[name]["base"]]


def bake_text() -> str:
    return (ROOT / "docker-bake.hcl").read_text()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('cuda = "13.0"', "pools: Field required"),
        ('pools = []\ncuda = "13.0"', "pools = []: List should have at least 1 item"),
        ('pools = ["A"]\ncuda = "13"', "cuda = '13': String should match"),
        ('pools = ["A"]\ncuda = "13.0"\ngpus = 2', "gpus = 2: Extra inputs are not permitted"),
        ('pools = ["A"]\ncuda = "13.0"\nworkers_min = 4', "workers_min, 4, is above workers_max, 3"),
        (
            'pools = ["A"]\ncuda = "13.0"\n[env]\nX = "1"\n[secrets]\nX = "x"',
            "X is both in [env] and in [secrets]",
        ),
        ("pools = [", "Invalid value"),
        (None, "There is no /"),
    ],
)
def test_wrong_one_is_named_in_one_line(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "deploy.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_config("bge", path)
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_key_is_documented() -> None:
    assert all(field.description for field in Config.model_fields.values())
