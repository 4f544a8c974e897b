"""The tgi worker with a stand-in for TGI's server; see tests/workers/tgi/test_stand_in.py."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest
import requests

from local import Platform, Rules, WorkerFailed, running
from local.workers import WorkerProcess
from shared import jobs, reaper
from shared.engine_server import EngineFailed
from shared.errors import JobError, StartError
from shared.settings import read_settings
from shared.startup import classify
from shared.volume import ModelPath
from tools import tgi_stand_in
from tools.models import local_env
from tools.workers import load_handler

engine = pytest.mark.engine
TALK: Any = [{"role": "user", "content": "Name three rivers."}]
SECRET = "hf_" + "s" * 30
# A local worker that fails is replaced quickly.
QUICK = Rules(restart_delay=0.1)


@pytest.fixture(scope="module")
def tgi() -> ModuleType:
    return load_handler("tgi")


# ---- requests, without a server ------------------------------------------------------------------------


def native(tgi: ModuleType, **payload: Any) -> dict[str, Any]:
    """TGI's parameters for a job."""
    request = jobs.validate(tgi.GenerateRequest, {"prompt": "a", **payload})
    found: dict[str, Any] = tgi.parameters(request, payload.get("max_tokens", tgi.DEFAULT_TOKENS))
    return found


def test_the_defaults_of_the_reference(tgi: ModuleType) -> None:
    assert native(tgi) == {
        "max_new_tokens": 512, "temperature": 0.7, "top_p": 0.95, "do_sample": True, "details": True,
        "stop": [], "decoder_input_details": False, "watermark": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"temperature": 0}, {"do_sample": False}], ids=str
)
def test_greedy_has_no_sampling_field(tgi: ModuleType, settings: dict[str, Any]) -> None:
    """TGI refuses temperature 0, and draws as soon as one of them is there."""
    asked = native(tgi, top_p=0.5, top_k=5, typical_p=0.5, **settings)
    assert asked["do_sample"] is False
    assert not {"temperature", "top_p", "top_k", "typical_p"} & asked.keys()


def test_every_parameter_of_tgi_can_be_given(tgi: ModuleType) -> None:
    given: dict[str, Any] = {
        "temperature": 1.5, "top_p": 0.5, "top_k": 7, "typical_p": 0.6, "repetition_penalty": 1.2,
        "frequency_penalty": 0.3, "seed": 3, "stop": ["x"], "best_of": 2, "truncate": 9, "watermark": True,
        "decoder_input_details": True, "top_n_tokens": 2, "adapter_id": "b",
        "grammar": {"type": "regex", "value": "a+"},
    }  # fmt: skip
    asked = native(tgi, **given)
    assert asked | given == asked
    # return_full_text and max_new_tokens are this worker's affair.
    assert asked.keys() | {"return_full_text"} == tgi_stand_in.PARAMETERS.keys()
    assert {"top_p", "top_k"} & native(tgi, top_p=1, top_k=0).keys() == set()


@pytest.mark.parametrize(
    ("payload", "param", "code"),
    [
        ({}, "prompt", "invalid_value"),
        ({"prompt": "a", "messages": TALK}, "prompt", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"prompt": "a", "max_new_tokens": 5}, "max_new_tokens", "unknown_field"),
        ({"prompt": "a", "temperature": -1}, "temperature", "invalid_value"),
        ({"prompt": "a", "top_p": 0}, "top_p", "invalid_value"),
        ({"prompt": "a", "top_k": -1}, "top_k", "invalid_value"),
        ({"prompt": "a", "frequency_penalty": 3}, "frequency_penalty", "invalid_value"),
        ({"prompt": "a", "seed": -1}, "seed", "invalid_value"),
        ({"prompt": "a", "stop": [""]}, "stop.0", "invalid_value"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of", "invalid_value"),
        (
            {"prompt": "a", "decoder_input_details": True, "stream": True},
            "decoder_input_details", "invalid_value",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(
    tgi: ModuleType, payload: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(JobError) as caught:
        jobs.validate(tgi.GenerateRequest, payload)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert param in caught.value.message


def chat_body(tgi: ModuleType, adapter: str | None = None, **fields: Any) -> dict[str, Any]:
    request = jobs.validate(tgi.ChatRequest, {"messages": TALK, **fields})
    body: dict[str, Any] = tgi.openai_body(request, adapter)
    return body


def test_openai_requests_are_put_as_tgi_takes_them(tgi: ModuleType) -> None:
    assert chat_body(tgi, n=1, presence_penalty=0, logit_bias={}, top_p=1, stream_options=None, tools=[]) == {
        "messages": TALK, "stop": [],
    }  # fmt: skip
    assert chat_body(tgi, stop="x", max_completion_tokens=5, max_tokens=9)["stop"] == ["x"]
    assert chat_body(tgi, max_completion_tokens=5, max_tokens=9)["max_tokens"] == 5
    assert chat_body(tgi, repetition_penalty=1.5)["presence_penalty"] == -0.5
    assert chat_body(tgi, "adapter", model="ADAPTER")["model"] == "adapter"
    assert "model" not in chat_body(tgi, model="x")
    schema = {"properties": {"a": {"type": "string"}}}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert chat_body(tgi, response_format=asked)["response_format"] == {"type": "json", "value": schema}
    assert "response_format" not in chat_body(tgi, response_format={"type": "text"})
    turn = {"role": "assistant", "content": None, "name": None, "tool_calls": [{"id": "0"}]}
    assert chat_body(tgi, messages=[turn])["messages"] == [{"role": "assistant", "tool_calls": [{"id": "0"}]}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2), ("presence_penalty", 0.5), ("logit_bias", {"5": 1}), ("functions", [{}]),
        ("chat_template_kwargs", {"a": 1}), ("response_format", {"type": "json_object"}), ("top_k", 5),
        ("min_p", 0.1), ("typical_p", 0.5),
    ],
)  # fmt: skip
def test_what_tgi_would_ignore_is_refused(tgi: ModuleType, field: str, value: Any) -> None:
    with pytest.raises(JobError) as caught:
        chat_body(tgi, **{field: value})
    assert (caught.value.param, caught.value.code) == (field, "unsupported")


@pytest.mark.parametrize(
    ("text", "param", "code"),
    [
        ("`max_new_tokens` must be strictly positive", "max_tokens", "invalid_value"),
        ("`inputs` cannot be empty", "prompt", "invalid_value"),
        ("`inputs` must have less than 9 tokens. Given: 10", "prompt", "too_long"),
        (
            "`inputs` tokens + `max_new_tokens` must be <= 20. Given: 10 `inputs` tokens and 11 "
            "`max_new_tokens`",
            "max_tokens", "too_long",
        ),
        (
            "`inputs` tokens + `max_new_tokens` must be <= 20. Given: 30 `inputs` tokens and 1 "
            "`max_new_tokens`",
            "prompt", "too_long",
        ),
        ("`top_p` must be > 0.0 and < 1.0", "top_p", "invalid_value"),
        ("grammar is not valid: Grammar must have a 'properties' field", "grammar", "invalid_value"),
        ("tokenizer error x", "prompt", "invalid_value"),
    ],
)  # fmt: skip
def test_errors_of_validation_name_the_field(tgi: ModuleType, text: str, param: str, code: str) -> None:
    problem = tgi.explain(JobError(f"Input validation error: {text}", code="validation"), "prompt")
    assert (problem.param, problem.code, problem.type) == (param, code, "invalid_request_error")
    assert problem.message.startswith(f"{param}: ")
    assert "`" not in problem.message
    assert "inputs" not in problem.message
    assert "max_new_tokens" not in problem.message


@pytest.mark.parametrize(
    ("text", "status", "param", "code"),
    [
        ("Model is overloaded", "overloaded", None, "overloaded"),
        ("Request failed during generation: Server error: CUDA", "generation", None, "generation_failed"),
        ("Incomplete generation stream", "incomplete_generation_stream", None, "incomplete"),
        ("Template error: template not found", "template_error", "messages", "no_chat_template"),
        ("Template error: syntax error: roles must alternate", 422, "messages", "bad_prompt"),
        ("Tool error: Grammar and tools are mutually exclusive", "tool_error", "tools", "invalid_value"),
        ("Number of prompts exceeds the maximum allowed batch size of 4", 422, "prompt", "invalid_value"),
        (
            "Failed to deserialize the JSON body into the target type: tools[0].function: missing field "
            "`arguments` at line 1 column 99",
            422, "tools[0].function", "invalid_value",
        ),
        ("Failed to buffer the request body: length limit exceeded", 413, "messages", "too_large"),
        ('""', 401, None, "unauthorized"),
        ("something new", "new", None, "new"),
    ],
)  # fmt: skip
def test_every_other_error_says_what_to_do(
    tgi: ModuleType, text: str, status: Any, param: str | None, code: str
) -> None:
    problem = tgi.explain(JobError(text, code=status), "messages")
    assert (problem.param, problem.code) == (param, code)
    assert problem.message.endswith((".", "new"))


def test_the_room_that_is_left(tgi: ModuleType) -> None:
    text = (
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 20. Given: {} `inputs` tokens "
        "and 9 `max_new_tokens`"
    )
    for given, left in ((10, 10), (20, 0), (30, 0)):
        error = JobError(text.format(given))
        assert tgi.room(error) == tgi.room(tgi.explain(error, "prompt")) == left
    assert tgi.room(JobError("`top_p` must be > 0.0 and < 1.0")) == 0


async def test_events_are_read_whatever_their_text_holds(tgi: ModuleType) -> None:
    """Comments, blanks after `data:` or none, and characters that Python takes for ends of lines."""

    class Client:
        async def stream(self, path: str, body: Any) -> AsyncIterator[str]:
            yield ":\n\n"
            yield 'data:{"text": "a\u2028b\x85c"}\n\n'
            yield 'data: {"text": "d"}\n\n:\n\ndata: {"text": "e"}\n\n'
            yield "data: [DONE]\n\n"

    made = tgi.Engine(Client(), "name", None, {}, 100, None)
    found = [[event["text"] for event in events] async for events in made.events("/", {}, "prompt")]
    assert found == [["a\u2028b\x85c"], ["d", "e"]]


# ---- the launcher's command line -----------------------------------------------------------------------


def settings(tgi: ModuleType, **env: str) -> Any:
    """The settings from these variables and no others."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [*os.environ]:
            if name.lower() in {*tgi_stand_in.ARGUMENTS, *tgi.Settings.model_fields}:
                patch.delenv(name)
        for name, value in env.items():
            patch.setenv(name, value)
        return read_settings(tgi.Settings)


def parsed(tgi: ModuleType, **env: str) -> dict[str, Any]:
    """What TGI's launcher makes of the command line."""
    found = settings(tgi, **{"MODEL_ID": "a/b", **env})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in tgi.launcher_env(found, offline=True).items():
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        argv = tgi.command(found, "/the/model", None, 12345)
        assert argv[0] == "text-generation-launcher"
        args = tgi_stand_in.parse(argv[1:])
        tgi_stand_in.check(args)
    return args


def test_the_defaults_of_the_command_line(tgi: ModuleType) -> None:
    defaults = {name: default for name, (_, default) in tgi_stand_in.ARGUMENTS.items()}
    args = parsed(tgi)
    assert {name: value for name, value in args.items() if value != defaults[name]} == {
        "model_id": "/the/model", "hostname": "127.0.0.1", "port": 12345, "usage_stats": "off",
        "payload_limit": 64_000_000, "graceful_termination_timeout": 10,
    }  # fmt: skip


VALUES = {
    "sharded": "false", "num_shard": "2", "quantize": "awq", "speculate": "2", "kv_cache_dtype": "fp8_e5m2",
    "max_concurrent_requests": "9", "max_best_of": "3", "max_stop_sequences": "6", "max_top_n_tokens": "7",
    "max_input_tokens": "100", "max_total_tokens": "200", "max_batch_prefill_tokens": "300",
    "max_batch_total_tokens": "400", "max_batch_size": "8", "max_waiting_tokens": "5",
    "waiting_served_ratio": "0.5", "max_client_batch_size": "11", "validation_workers": "3",
    "cuda_graphs": "1,2,4", "cuda_memory_fraction": "0.8", "rope_scaling": "linear", "rope_factor": "2.0",
    "lora_adapters": "a/b,c=/d", "tokenizer_config_path": "/t.json", "disable_custom_kernels": "true",
    "disable_grammar_support": "true", "enable_prefill_logprobs": "true", "watermark_gamma": "0.5",
    "watermark_delta": "2.0", "otlp_endpoint": "http://x", "otlp_service_name": "y", "payload_limit": "5000",
}  # fmt: skip


def test_every_setting_reaches_the_launcher(tgi: ModuleType) -> None:
    assert VALUES.keys() == set(tgi.launcher_names())
    args = parsed(tgi, **{name.upper(): value for name, value in VALUES.items()})
    for name, value in VALUES.items():
        assert str(args[name]).lower() == value.lower(), name


def test_every_argument_of_the_launcher_is_a_setting_or_left_out_on_purpose(tgi: ModuleType) -> None:
    others = {name.lower() for name in tgi._OTHER_VARIABLES}
    assert tgi_stand_in.ARGUMENTS.keys() <= {*tgi.launcher_names(), *others}
    assert not others & set(tgi.launcher_names())


def test_the_environment_cannot_mislead_the_launcher(tgi: ModuleType) -> None:
    """Empty variables, which are errors there, and names that mean something else in a container."""
    empty = {name.upper(): "" for name in tgi_stand_in.ARGUMENTS if name != "model_id"}
    assert parsed(tgi, **empty) == parsed(tgi)
    strange = {"HOSTNAME": "4f2c", "PORT": "80", "USAGE_STATS": "on", "API_KEY": "x", "MASTER_PORT": "y"}
    assert parsed(tgi, **strange) == parsed(tgi)


def test_names_of_one_setting(tgi: ModuleType) -> None:
    assert settings(tgi, MODEL_NAME="a/b").model_name == "a/b"
    assert settings(tgi, MODEL_NAME="a/b", MODEL_ID="c/d").model_name == "c/d"
    assert settings(tgi, MODEL_ID="c/d", REVISION="r").model_revision == "r"
    assert settings(tgi, MODEL_ID="c/d", HUGGING_FACE_HUB_TOKEN=SECRET).hf_token.get_secret_value() == SECRET
    for env in (
        {"MAX_INPUT_LENGTH": "9"},
        {"MAX_INPUT_TOKENS": "9"},
        {"MAX_INPUT_LENGTH": "9", "MAX_INPUT_TOKENS": "9"},
    ):
        assert parsed(tgi, **env)["max_input_tokens"] == 9
    assert parsed(tgi, DTYPE="float16", TRUST_REMOTE_CODE="1")["dtype"] == "float16"
    assert parsed(tgi, TRUST_REMOTE_CODE="1")["trust_remote_code"] is True
    assert parsed(tgi, TGI_EXTRA_ARGS="--max-best-of 5 --json-output")["max_best_of"] == 5


def test_concurrency_and_tgis_places(tgi: ModuleType) -> None:
    assert settings(tgi, MODEL_ID="a").max_concurrency == 64
    assert parsed(tgi)["max_concurrent_requests"] == 128
    assert parsed(tgi, MAX_CONCURRENCY="200")["max_concurrent_requests"] == 400
    assert settings(tgi, MODEL_ID="a", MAX_CONCURRENT_REQUESTS="9").max_concurrency == 9
    both = settings(tgi, MODEL_ID="a", MAX_CONCURRENT_REQUESTS="9", MAX_CONCURRENCY="4")
    assert (both.max_concurrency, both.max_concurrent_requests) == (4, 9)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "MODEL_ID (or MODEL_NAME) is not set. TGI would serve bigscience/bloom-560m"),
        ({"MODEL_ID": ""}, "MODEL_ID (or MODEL_NAME) is not set"),
        ({"MODEL_ID": "a", "MAX_INPUT_TOKENS": "9", "MAX_INPUT_LENGTH": "8"}, "Remove MAX_INPUT_LENGTH"),
        ({"MODEL_ID": "a", "MAX_INPUT_TOKENS": "9", "MAX_TOTAL_TOKENS": "9"}, "must be below MAX_TOTAL"),
        ({"MODEL_ID": "a", "QUANTIZE": "int3"}, "QUANTIZE='int3'"),
        ({"MODEL_ID": "a", "NUM_SHARD": "0"}, "NUM_SHARD='0'"),
        ({"TGI_URL": "localhost:80"}, "TGI_URL='localhost:80'"),
    ],
)  # fmt: skip
def test_wrong_settings_stop_the_start_with_a_reason(tgi: ModuleType, env: dict[str, str], said: str) -> None:
    with pytest.raises(StartError) as caught:
        settings(tgi, **env)
    assert said in caught.value.message
    assert caught.value.code == "bad_setting"


@pytest.mark.parametrize(
    "extra", ["--port 5", "-p 5", "-p5", "-p=5", "--graceful-termination-timeout=5", "--model-id=x", "'"]
)
def test_extra_arguments_are_not_the_workers_own(tgi: ModuleType, extra: str) -> None:
    with pytest.raises(StartError, match="TGI_EXTRA_ARGS"):
        parsed(tgi, TGI_EXTRA_ARGS=extra)


def test_adapters_by_name(tgi: ModuleType) -> None:
    found = settings(tgi, MODEL_ID="a", LORA_ADAPTERS="x/y, z=/folder,q@main")
    assert tgi.adapters(found) == ["x/y", "z", "q"]


@pytest.mark.parametrize(
    ("code", "adapters", "argv", "online"),
    [
        (None, None, ["--model-id", "/the/model"], False),
        (None, "x=/folder", ["--model-id", "/the/model"], False),
        (None, "x/y", ["--model-id", "/the/model"], True),
        ("no_weights", None, ["--model-id", "a/b", "--revision", "r"], True),
        ("gated", None, None, False),
    ],
)
def test_who_fetches_the_model(
    tgi: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    code: str | None, adapters: str | None, argv: list[str] | None, online: bool,
) -> None:  # fmt: skip
    """This worker, and TGI what this worker does not know: other formats, and adapters by their id."""
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

    monkeypatch.setattr(tgi.prewarm, "resolve", resolve)
    monkeypatch.setattr(tgi, "EngineServer", Server)
    env = {"MODEL_ID": "a/b", "REVISION": "r", **({"LORA_ADAPTERS": adapters} if adapters else {})}
    if argv is None:
        with pytest.raises(StartError, match="no"):
            tgi.start(settings(tgi, **env))
        return
    _, commit = tgi.start(settings(tgi, **env))
    ((command, changed),) = started
    assert command[1 : len(argv) + 1] == argv
    assert ("--revision" in command) == ("--revision" in argv)
    assert ("HF_HUB_OFFLINE" in changed) == online
    assert commit == (None if code else "c0ffee")


@pytest.mark.parametrize("there", [True, False])
def test_what_tgi_fetches_is_kept_on_the_volume(
    tgi: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """The image's HF_HOME would be fetched to anew at each cold start."""
    for name in ("HF_MODULES_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("RUNPOD_VOLUME_PATH", str(tmp_path if there else tmp_path / "nothing"))
    kept = str(tmp_path / "huggingface-cache") if there else "/data"
    for home, found in (("/data", kept), ("/mine", "/mine")):
        monkeypatch.setenv("HF_HOME", home)
        tgi.use_volume_for_tgi()
        assert os.environ["HF_HOME"] == found


def test_a_template_in_a_file_of_its_own_is_handed_to_tgi(tgi: ModuleType, tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"eos_token": "x"}')
    assert tgi.tokenizer_config(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    made = tgi.tokenizer_config(tmp_path)
    assert json.loads(Path(made).read_text()) == {"eos_token": "x", "chat_template": "{{ messages }}"}
    config.write_text('{"chat_template": "mine"}')
    assert tgi.tokenizer_config(tmp_path) is None


# ---- the worker in this process ------------------------------------------------------------------------


# An engine's sessions end with the loop of the test that uses it, and must be there until then.
KEPT: list[Any] = []


@contextmanager
def prepared(**env: str) -> Iterator[ModuleType]:
    """The handler's module as `prepare()` leaves it, for a while."""
    module = load_handler("tgi")
    before = getattr(module, "engine", None)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**local_env("tgi"), **env}.items():
            patch.setenv(name, value)
        # In a thread of its own: the test's loop runs already.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(module.prepare).result()
    mine = module.engine
    KEPT.append(mine)
    try:
        yield module
    finally:
        if hasattr(mine.client, "stop"):
            mine.client.stop()
        module.engine = before


@pytest.fixture(scope="module")
def worker() -> Iterator[ModuleType]:
    with prepared(TGI_STAND_IN_KEEP_ALIVE="0.05") as module:
        yield module


async def parts(worker: ModuleType, **payload: Any) -> list[Any]:
    return [piece async for piece in worker.handler({"id": "job-1", "input": payload})]


async def send(worker: ModuleType, **payload: Any) -> Any:
    (answer,) = await parts(worker, **payload)
    assert "error" not in answer, answer
    return answer


async def error(worker: ModuleType, **payload: Any) -> Any:
    *_, answer = await parts(worker, **payload)
    return json.loads(answer["error"])


async def chat(worker: ModuleType, route: str = "/v1/chat/completions", **body: Any) -> Any:
    return await send(worker, openai_route=route, openai_input=body)


def events(chunks: list[str]) -> list[Any]:
    """The events of a stream, which must end in [DONE]."""
    *found, done = "".join(chunks).strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in found]


async def direct(worker: ModuleType, path: str, **body: Any) -> Any:
    """TGI's own answer."""
    return await worker.engine.client.request("POST", path, body)


def through(route: str, **body: Any) -> dict[str, Any]:
    """The input of a job that came through an OpenAI route."""
    return {"openai_route": route, "openai_input": body}


def running_there(worker: ModuleType) -> int:
    """Requests that TGI is working on."""
    found = re.search(r"^tgi_batch_current_size (\d+)$", worker.engine.client.get("/metrics")[1], re.M)
    assert found is not None
    return int(found[1])


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it did not come true in time"
        time.sleep(0.01)


@engine
async def test_an_answer_is_tgis(worker: ModuleType) -> None:
    asked = {"prompt": "The river", "max_tokens": 30, "seed": 7}
    parameters = {"max_new_tokens": 30, "temperature": 0.7, "top_p": 0.95, "do_sample": True, "seed": 7}
    theirs = await direct(worker, "/generate", inputs="The river", parameters={**parameters, "details": True})
    answer = await send(worker, **asked)
    assert answer["response"] == theirs["generated_text"].rstrip("\ufffd")
    assert (answer["model"], answer["revision"]) == ("stand-in/no-model", None)
    made = theirs["details"]["generated_tokens"]
    assert answer["details"].keys() == {"finish_reason", "generated_tokens", "seed"}
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": made, "total_tokens": 2 + made}
    greedy = [await send(worker, **asked | {"temperature": 0}) for _ in range(2)]
    assert greedy[0] == greedy[1] != answer
    assert greedy[0]["details"]["seed"] is None


@engine
@pytest.mark.parametrize(
    "settings", [{}, {"details": True, "top_n_tokens": 2}, {"return_full_text": True}], ids=str
)
async def test_a_stream_is_the_plain_answer_in_pieces(worker: ModuleType, settings: dict[str, Any]) -> None:
    for number in range(6):
        asked = {"prompt": f"river {number}", "max_tokens": 40, "seed": 4, **settings}
        plain = await send(worker, **asked)
        *pieces, end = await parts(worker, **asked, stream=True)
        assert "".join(piece["response"] for piece in pieces) == plain["response"]
        assert end == {**plain, "response": ""}
        if settings.get("details"):
            assert len(plain["details"]["tokens"]) == plain["usage"]["completion_tokens"]
            assert [len(top) for top in plain["details"]["top_tokens"]] == [2] * len(
                plain["details"]["tokens"]
            )
        if settings.get("return_full_text"):
            assert plain["response"].startswith(f"river {number} ")


@engine
async def test_tokens_stream_as_they_are_made(worker: ModuleType) -> None:
    asked = {"prompt": "[[slow 50]] go", "max_tokens": 2000, "temperature": 0, "stream": True}
    stream = worker.handler({"id": "job-1", "input": asked})
    for _ in range(3):
        assert (await anext(stream))["response"]
        assert await asyncio.to_thread(running_there, worker) == 1
    await stream.aclose()
    await asyncio.to_thread(until, lambda: running_there(worker) == 0)


@engine
async def test_a_stream_that_stops_before_its_end_is_no_answer(worker: ModuleType) -> None:
    *pieces, told, end = await parts(worker, prompt="[[stop 3]]", stream=True)
    assert pieces
    assert told["detail"]["code"] == json.loads(end["error"])["code"] == "engine_unreachable"


@engine
async def test_messages_are_what_tgis_own_chat_makes_of_them(worker: ModuleType) -> None:
    """With all of TGI's parameters beside, which its chat route does not have."""
    body = {"messages": TALK, "max_tokens": 20, "temperature": 0}
    theirs = await direct(worker, "/v1/chat/completions", **body)
    answer = await send(worker, **body)
    assert answer["response"] == theirs["choices"][0]["message"]["content"].rstrip("\ufffd")
    assert answer["usage"] == theirs["usage"]
    assert (await send(worker, **body, repetition_penalty=1.3))["response"] != answer["response"]


@engine
async def test_the_token_before_every_text_comes_once(tmp_path: Path) -> None:
    """The template writes it, and TGI would write it again before the text that the template gave."""
    from tests.workers.tgi.test_stand_in import with_bos

    source = Path(local_env("tgi")["MODEL_NAME"])
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    with prepared(MODEL_NAME=str(with_bos(source, tmp_path))) as module:
        body = {"messages": TALK, "max_tokens": 20, "temperature": 0}
        theirs = await direct(module, "/v1/chat/completions", **body)
        answer = await send(module, **body)
        assert answer["usage"] == theirs["usage"]
        assert answer["response"] == theirs["choices"][0]["message"]["content"].rstrip("\ufffd")
        tokens = await direct(module, "/tokenize", inputs="river")
        assert (await send(module, prompt="river", max_tokens=2))["usage"]["prompt_tokens"] == len(tokens)


@engine
async def test_a_text_ends_before_its_stop_text(worker: ModuleType) -> None:
    """Everywhere, though TGI gives the stop text away."""
    asked = {"max_tokens": 60, "temperature": 0}
    whole = (await send(worker, prompt="The sea", **asked))["response"]
    said = (await send(worker, messages=TALK, **asked))["response"]
    for text, field, route in (
        (whole, {"prompt": "The sea"}, "/v1/completions"),
        (said, {"messages": TALK}, "/v1/chat/completions"),
    ):
        stop = text.split()[3]
        cut = text[: text.index(stop)]
        answer = await send(worker, **field, **asked, stop=[stop, "never said"])
        assert (answer["response"], answer["finish_reason"]) == (cut, "stop")
        *pieces, end = await parts(worker, **field, **asked, stop=stop, stream=True)
        assert "".join(piece["response"] for piece in pieces) == cut
        assert end == {**answer, "response": ""}
        plain = (await chat(worker, route, **field, **asked, stop=stop))["choices"][0]
        assert plain["finish_reason"] == "stop"
        assert (plain.get("text") or plain["message"]["content"]) == cut
        body = {**field, **asked, "stop": stop, "stream": True}
        streamed = [
            event["choices"][0]
            for event in events(await parts(worker, openai_route=route, openai_input=body))
        ]
        pieces = [it["text"] if "text" in it else it["delta"].get("content") or "" for it in streamed]
        assert "".join(pieces) == cut
        assert [it["finish_reason"] for it in streamed] == [None] * (len(streamed) - 1) + ["stop"]


@engine
async def test_the_mark_of_the_end_is_not_given_away(worker: ModuleType) -> None:
    """TGI's stream of completions has it as text."""
    for number in range(30):
        body: dict[str, Any] = {"prompt": f"number {number}", "max_tokens": 500, "temperature": 0}
        plain = (await chat(worker, "/v1/completions", **body))["choices"][0]
        if plain["finish_reason"] == "stop":
            break
    body["stream"] = True
    streamed = events(await parts(worker, openai_route="/v1/completions", openai_input=body))
    assert "".join(event["choices"][0]["text"] for event in streamed) == plain["text"]
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


@engine
async def test_a_long_prompt_gets_the_room_that_is_left(worker: ModuleType) -> None:
    """512 tokens are the worker's own choice; a number that the client gives is the client's."""
    prompt = " river" * 1900
    *_, end = await parts(worker, prompt=prompt, temperature=0, stream=True)
    answer = await send(worker, prompt=prompt, temperature=0)
    assert answer["usage"] == end["usage"]
    assert answer["usage"]["total_tokens"] <= 2048
    problem = await error(worker, prompt=prompt, max_tokens=512)
    assert (problem["param"], problem["code"]) == ("max_tokens", "too_long")
    assert "2048" in problem["message"]
    assert "1900" in problem["message"]


@engine
async def test_messages_of_a_client_with_nulls_in_them(worker: ModuleType) -> None:
    talk = [{"role": "user", "content": "Hi", "name": None, "tool_calls": None}]
    answer = await send(worker, messages=talk, max_tokens=2, temperature=0)
    same = await chat(worker, messages=talk, max_tokens=2, temperature=0)
    assert answer["response"] == same["choices"][0]["message"]["content"]


@engine
@pytest.mark.parametrize(
    ("payload", "param", "code"),
    [
        ({"prompt": " river" * 2100}, "prompt", "too_long"),
        ({"messages": [{"role": "user", "content": " river" * 2100}]}, "messages", "too_long"),
        ({"prompt": "a", "max_tokens": 2048}, "max_tokens", "too_long"),
        ({"prompt": "a", "best_of": 3}, "best_of", "invalid_value"),
        ({"prompt": "a", "best_of": 2, "temperature": 0}, "best_of", "invalid_value"),
        ({"prompt": "a", "top_n_tokens": 9}, "top_n_tokens", "invalid_value"),
        ({"prompt": "a", "truncate": 5000}, "truncate", "invalid_value"),
        ({"prompt": "a", "stop": list("abcde")}, "stop", "invalid_value"),
        ({"prompt": "a", "typical_p": 0.99999999999}, "typical_p", "invalid_value"),
        ({"prompt": "a", "grammar": {"type": "json", "value": {}}}, "grammar", "invalid_value"),
        ({"prompt": "a", "adapter_id": "x"}, "adapter_id", "model_not_found"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "invalid_value"),
        ({"prompt": "[[fail 3]]"}, None, "generation_failed"),
        (through("/v1/chat/completions", messages=TALK, model="x"), "model", "model_not_found"),
        (through("/v1/completions", prompt=list("abcde")), "prompt", "invalid_value"),
        (through("/v1/completions", prompt="[[fail 2]]"), None, "generation_failed"),
        (through("/v1/embeddings", input="a"), "openai_route", "unknown_route"),
        (through("/generate", inputs="a"), "openai_route", "unknown_route"),
        (through("/v1/../generate", inputs="a"), "openai_route", "unknown_route"),
    ],
)  # fmt: skip
async def test_errors_are_told_and_the_worker_goes_on(
    worker: ModuleType, payload: dict[str, Any], param: str | None, code: str
) -> None:
    body = payload.get("openai_input")
    streamed = {**payload, "openai_input": {**body, "stream": True}} if body else {**payload, "stream": True}
    for asked in (payload, streamed) if payload.get("best_of") is None else (payload,):
        problem = await error(worker, **asked)
        assert (problem["param"], problem["code"]) == (param, code), problem
    assert (await send(worker, prompt="a", max_tokens=1))["finish_reason"] == "length"
    assert running_there(worker) == 0


@engine
async def test_an_error_within_a_stream_comes_after_what_was_made(worker: ModuleType) -> None:
    *pieces, told, end = await parts(worker, prompt="[[slow 30]] [[fail 9]]", max_tokens=20, stream=True)
    assert [set(piece) for piece in pieces] == [{"response"}] * len(pieces)
    assert pieces
    assert told["event"] == "error"
    assert told["detail"]["code"] == json.loads(end["error"])["code"] == "generation_failed"
    body = {"prompt": "[[slow 30]] [[fail 9]]", "stream": True}
    *chunks, end = await parts(worker, openai_route="/v1/completions", openai_input=body)
    *made, last = events(chunks)
    assert made
    assert last["error"]["code"] == json.loads(end["error"])["code"] == "generation_failed"


@engine
@pytest.mark.parametrize(
    "payload",
    [
        {"prompt": "[[slow 3600000]]"},
        {"prompt": "[[slow 500]]", "stream": True, "max_tokens": 2000},
        {"prompt": "[[slow 3600000]]", "best_of": 2},
        {"openai_route": "/v1/completions", "openai_input": {"prompt": ["[[slow 3600000]]"] * 2}},
        {"openai_route": "/v1/completions", "openai_input": {"prompt": "[[slow 3600000]]", "stream": True}},
    ],
    ids=str,
)  # fmt: skip
async def test_a_cancelled_job_gives_its_places_up(worker: ModuleType, payload: dict[str, Any]) -> None:
    several = payload.get("best_of") or isinstance(payload.get("openai_input", {}).get("prompt"), list)
    job = asyncio.create_task(parts(worker, **payload))
    await asyncio.to_thread(until, lambda: running_there(worker) == (2 if several else 1))
    job.cancel()
    with suppress(asyncio.CancelledError):
        await job
    await asyncio.to_thread(until, lambda: running_there(worker) == 0)  # by itself it would take far longer


@engine
async def test_jobs_wait_for_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """TGI refuses at once what is too much."""
    with prepared(MAX_CONCURRENT_REQUESTS="2", MAX_CONCURRENCY="8") as module:
        asked = [{"prompt": f"[[slow 5]] {n}", "max_tokens": 9, "stream": n % 2 == 1} for n in range(8)]
        answers = await asyncio.gather(*(parts(module, **it) for it in asked))
        assert [answer[-1]["finish_reason"] in ("length", "stop") for answer in answers] == [True] * 8
        monkeypatch.setattr(module, "PATIENCE_S", 0.3)
        slow = [asyncio.create_task(parts(module, prompt="[[slow 3600000]]")) for _ in range(2)]
        await asyncio.to_thread(until, lambda: running_there(module) == 2)
        for stream in (True, False):
            problem = await error(module, prompt="a", stream=stream)
            assert (problem["code"], problem["type"]) == ("overloaded", "server_error")
            assert "MAX_CONCURRENT_REQUESTS" in problem["message"]
        for task in slow:
            task.cancel()
        await asyncio.wait(slow)


@engine
async def test_what_is_larger_than_tgi_takes(tgi: ModuleType) -> None:
    with prepared(PAYLOAD_LIMIT="3000") as module:
        problem = await error(module, prompt="a" * 3000)
        assert (problem["param"], problem["code"]) == ("prompt", "too_large")
        assert "PAYLOAD_LIMIT" in problem["message"]


@engine
async def test_adapters_are_served_by_name(tmp_path: Path) -> None:
    with prepared(LORA_ADAPTERS=f"my/Adapter={tmp_path}") as module:
        listed = await chat(module, "/v1/models")
        assert [it["id"] for it in listed["data"]] == ["stand-in/no-model", "my/Adapter"]
        body = {"messages": TALK, "max_tokens": 2}
        assert (await chat(module, model="MY/adapter", **body))["model"] == "my/Adapter"
        for name in ("stand-in/no-model", "tgi", None):
            assert (await chat(module, model=name, **body))["model"] == "stand-in/no-model"
        assert (await send(module, prompt="a", adapter_id="my/Adapter"))["finish_reason"]


@engine
async def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    for file in Path(local_env("tgi")["MODEL_NAME"]).iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    with prepared(MODEL_NAME=str(tmp_path)) as module:
        for payload in (
            {"messages": TALK},
            {"openai_route": "/v1/chat/completions", "openai_input": {"messages": TALK, "stream": True}},
        ):
            problem = await error(module, **payload)
            assert (problem["param"], problem["code"]) == ("messages", "no_chat_template")
        assert (await send(module, prompt="The river", max_tokens=1))["finish_reason"] == "length"


# ---- a server elsewhere --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    from tests.workers.tgi.test_stand_in import serving

    with serving(Path(local_env("tgi")["MODEL_NAME"]), "--api-key", SECRET) as url:
        yield url


@engine
async def test_a_server_elsewhere(elsewhere: str) -> None:
    with prepared(TGI_URL=f"{elsewhere}/", API_KEY=SECRET, MODEL_NAME="", SERVED_MODEL_NAME="") as module:
        asked: dict[str, Any] = {"prompt": "The river", "max_tokens": 3, "temperature": 0}
        answer = await send(module, **asked)
        assert answer["usage"]["completion_tokens"] == 3
        assert answer["model"].endswith("/huggingface")  # as /info says
        chunks = await parts(module, **asked, stream=True)
        assert chunks[-1]["usage"] == answer["usage"]


@engine
def test_a_server_elsewhere_that_wants_a_key(elsewhere: str) -> None:
    with pytest.raises(StartError, match="API_KEY"), prepared(TGI_URL=elsewhere):
        pass


@engine
def test_a_server_elsewhere_that_does_not_answer(capsys: pytest.CaptureFixture[str]) -> None:
    from tests.workers.tgi.test_stand_in import free_port

    url = f"http://user:password@127.0.0.1:{free_port()}"
    with (
        pytest.raises(EngineFailed, match="does not answer") as caught,
        prepared(TGI_URL=url, TGI_STARTUP_TIMEOUT="0.5"),
    ):
        pass
    assert classify(caught.value) is None  # it may be loading: a worker that is replaced tries again
    out = capsys.readouterr().out
    assert "the server does not answer. Check the address" in out
    assert "password" not in f"{caught.value}{out}"


@engine
async def test_a_server_elsewhere_that_goes_away() -> None:
    from tests.workers.tgi.test_stand_in import serving

    with serving(Path(local_env("tgi")["MODEL_NAME"])) as url, prepared(TGI_URL=url) as module:
        problem = await error(module, prompt="[[die 2]]")
        assert (problem["code"], problem["type"]) == ("engine_unreachable", "server_error")
        problem = await error(module, prompt="[[die 2]]", stream=True)
        assert problem["code"] == "engine_unreachable"


# ---- under the local platform, with the unmodified SDK and the official client --------------------------


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volume")


@pytest.fixture(scope="module")
def platform(volume: Path) -> Iterator[Platform]:
    """As in TGI's image, on an endpoint with a volume."""
    env = {"HF_TOKEN": SECRET, "API_KEY": SECRET, "HF_HOME": "/data", "RUNPOD_VOLUME_PATH": str(volume)}
    with running("tgi", env={**local_env("tgi"), **env}) as platform:
        yield platform


@pytest.fixture(scope="module")
def client(platform: Platform) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=platform.openai_url, api_key="local", max_retries=0) as client:
        yield client


def runsync(platform: Platform, payload: dict[str, Any]) -> Any:
    headers = {"Authorization": "Bearer local"}
    url = f"{platform.endpoint_url}/runsync"
    return requests.post(url, json={"input": payload}, headers=headers, timeout=90).json()


@engine
def test_openai_client(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "stand-in/no-model"
    asked: dict[str, Any] = {"model": model.id, "messages": TALK, "max_tokens": 20, "seed": 3, "top_p": 1}
    plain = client.chat.completions.create(**asked)
    assert plain.id.startswith("chatcmpl-")
    assert plain.model == model.id
    (choice,) = plain.choices
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].usage == plain.usage
    assert {chunk.id[:9] for chunk in chunks} == {"chatcmpl-"}
    said = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(it.delta.content or "" for it in said) == (choice.message.content or "").rstrip("\ufffd")
    assert [it.finish_reason for it in said] == [None] * (len(said) - 1) + [choice.finish_reason]


@engine
def test_openai_completions_of_several_prompts(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "stand-in/no-model", "prompt": ["The river", "the sea"], "max_tokens": 9, "temperature": 0,
    }  # fmt: skip
    plain = client.completions.create(**asked)
    texts = {it.index: it.text.rstrip("\ufffd") for it in plain.choices}
    streamed = dict.fromkeys(texts, "")
    usage = None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts
    assert usage == plain.usage


@engine
def test_openai_tools_schemas_and_logprobs(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    asked: Any = {"model": "stand-in/no-model", "messages": TALK, "max_tokens": 5, "temperature": 0}
    plain = client.chat.completions.create(**asked, tools=[tool], tool_choice="required").choices[0]
    assert plain.finish_reason in ("tool_calls", "length")
    assert plain.message.tool_calls is not None
    assert plain.message.tool_calls[0].function.name == "add"  # type: ignore[union-attr]
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert client.chat.completions.create(**asked, response_format=form).choices[0].message.content
    told = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert [len(it.top_logprobs) for it in told.content] == [3] * 5


@engine
def test_openai_client_sees_errors(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "stand-in/no-model", "messages": TALK}
    for wrong, code in (
        ({"model": "gpt-4o"}, "model_not_found"),
        ({"n": 2}, "unsupported"),
        ({"max_tokens": 5000}, "too_long"),
        ({"top_logprobs": 9, "logprobs": True}, "invalid_value"),
    ):
        answer = client.chat.completions.with_raw_response.create(**{**asked, **wrong})
        assert code in answer.text


@engine
def test_many_clients_at_once(platform: Platform) -> None:
    def ask(number: int) -> Any:
        body = runsync(platform, {"prompt": "The river", "max_tokens": 30, "seed": number % 8})
        assert body["status"] == "COMPLETED", body
        return body["output"][0]["response"]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(32)))
    assert answers == answers[:8] * 4
    assert len(set(answers)) > 4


@engine
def test_no_secret_is_told(platform: Platform) -> None:
    """TGI's launcher logs its arguments, and the worker the launcher's command line."""
    runsync(platform, {"prompt": "[[fail 1]]"})
    (worker,) = platform.workers
    log = "\n".join(worker.lines)
    assert "text-generation-launcher --model-id" in log
    assert SECRET not in log


def launcher_of(worker: WorkerProcess) -> int:
    """The process id of the launcher that a worker has started."""
    # -ww: the line is cut at 80 columns otherwise, and a path may be longer.
    listed = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    for line in listed.splitlines():
        pid, parent, *words = line.split()
        if parent == str(worker.pid) and "tgi_stand_in.py" in " ".join(words):
            return int(pid)
    raise AssertionError(listed)


@engine
def test_the_launcher_fetches_to_the_volume(platform: Platform, volume: Path) -> None:
    given = Path(f"/proc/{launcher_of(platform.workers[0])}/environ").read_text().split("\0")
    assert f"HF_HOME={volume / 'huggingface-cache'}" in given


@engine
def test_a_worker_whose_tgi_dies_is_replaced() -> None:
    """In the middle of answers: all are told, and the next job is answered by another process."""
    with running("tgi", env=local_env("tgi"), rules=QUICK) as platform:
        first = platform.workers[0]
        session = launcher_of(first)
        with ThreadPoolExecutor(2) as pool:
            beside = pool.submit(runsync, platform, {"prompt": "[[slow 3600000]]", "stream": True})
            until(lambda: platform.call(health(platform))["jobs"]["inProgress"] == 1)
            bad = runsync(platform, {"prompt": "[[die 3]]"})
            for answer in (bad, beside.result()):
                assert answer["status"] == "FAILED", answer
                assert json.loads(answer["error"])["code"] == "engine_died"
        good = runsync(platform, {"prompt": "The river", "max_tokens": 5})
        assert good["status"] == "COMPLETED", good
        assert first not in platform.workers
        assert reaper.members(session) == []
        # Between jobs: nobody asks, and it is replaced all the same.
        second = platform.workers[0]
        os.kill(launcher_of(second), signal.SIGKILL)
        until(lambda: second not in platform.workers)
        good = runsync(platform, {"prompt": "The river", "max_tokens": 5})
        assert good["status"] == "COMPLETED", good


async def health(platform: Platform) -> Any:
    import aiohttp

    headers = {"Authorization": "Bearer local"}
    url = f"{platform.endpoint_url}/health"
    async with aiohttp.ClientSession(headers=headers) as session, session.get(url) as response:
        return await response.json()


@engine
def test_a_worker_whose_tgi_hangs_is_replaced() -> None:
    env = {**local_env("tgi"), "HEALTH_TIMEOUT": "8"}
    with running("tgi", env=env, rules=QUICK) as platform:
        first = platform.workers[0]
        bad = runsync(platform, {"prompt": "[[hang 2]]"})
        assert bad["status"] == "FAILED", bad
        assert json.loads(bad["error"])["code"] == "engine_died"
        good = runsync(platform, {"prompt": "The river", "max_tokens": 5})
        assert good["status"] == "COMPLETED", good
        assert first not in platform.workers


@engine
def test_told_to_end_a_worker_finishes_its_jobs() -> None:
    with running("tgi", env=local_env("tgi"), rules=QUICK) as platform:
        (worker,) = platform.workers
        session = launcher_of(worker)
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(
                runsync, platform, {"prompt": "[[slow 300]] go", "max_tokens": 15, "temperature": 0}
            )
            until(lambda: job.done() or platform.call(health(platform))["jobs"]["inProgress"] == 1)
            worker.terminate()
            assert job.result()["status"] == "COMPLETED"
        until(lambda: worker.returncode is not None)
        assert worker.returncode == 0
        assert reaper.members(session) == []


@engine
@pytest.mark.parametrize(
    ("env", "code", "said"),
    [
        ({"TGI_STAND_IN_START": "oom"}, "out_of_memory", "CUDA out of memory"),
        ({"MODEL_NAME": ""}, "bad_setting", "MODEL_ID"),
        ({"TGI_EXTRA_ARGS": "--max-model-len 9"}, "bad_setting", "--max-model-len"),
        ({"MAX_BATCH_TOTAL_TOKENS": "9", "MAX_TOTAL_TOKENS": "10"}, "bad_setting", "max_total_tokens"),
    ],
    ids=["memory", "model", "argument", "validation"],
)  # fmt: skip
def test_what_cannot_be_mended_is_told_to_every_job(env: dict[str, str], code: str, said: str) -> None:
    with running("tgi", env={**local_env("tgi"), **env}) as platform:
        answer = runsync(platform, {"prompt": "a"})
        assert answer["status"] == "FAILED", answer
        problem = json.loads(answer["error"])
        assert problem["code"] == code, problem
        assert said in problem["message"]


@engine
def test_a_start_that_may_go_well_another_time_is_given_up() -> None:
    env = {**local_env("tgi"), "TGI_STAND_IN_START": "crash"}
    with pytest.raises(WorkerFailed, match="tgi ended with status 1"), running("tgi", env=env):
        pass


@engine
def test_a_plain_worker_gives_the_object_itself() -> None:
    with running("tgi", env={**local_env("tgi"), "STREAMING": "false"}) as platform:
        answer = runsync(platform, {"prompt": "The river", "max_tokens": 1})
        assert answer["output"]["finish_reason"] == "length"
        assert "STREAMING=false" in runsync(platform, {"prompt": "The river", "stream": True})["error"]


@engine
def test_make_run_says_that_it_is_not_tgi() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.start", "run", "tgi"],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stand-in" in done.stderr
    assert "stand-in/no-model" in done.stdout
