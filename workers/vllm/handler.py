"""Text from any model that vLLM serves, through `vllm serve` as a child process.

Request:  {"input": {"messages": [{"role": "user", "content": "Name three rivers."}], "max_tokens": 200}}
          or {"input": {"prompt": "Three rivers:"}}
Response: OpenAI's object, chat.completion or text_completion, with the job's id:
          {"id": "chatcmpl-<job id>", "object": "chat.completion", "model": "Qwen/Qwen2.5-7B-Instruct",
           "choices": [{"index": 0, "message": {"role": "assistant", "content": "The Rhine, ..."},
                        "finish_reason": "stop", ...}],
           "usage": {"prompt_tokens": 24, "completion_tokens": 13, "total_tokens": 37}, ...}

With "stream": true it comes in pieces: OpenAI's server-sent events, several in one text, the usage in the
last one before `data: [DONE]`.

A request may have every other field that vLLM's own takes: tools, response_format, logprobs, n, seed, min_p,
structured_outputs, chat_template_kwargs, `model` with the name of a LoRA adapter, ...

OpenAI:   the routes of ROUTES, as {"openai_route": ..., "openai_input": ...} or through the endpoint's own
/openai/v1 address; the official worker's {"route": ..., "body": ...} is the same. Their bodies and answers
are vLLM's, untouched.

A worker that streams is a generator, so RunPod gives a plain job's answer as a list of one; with
STREAMING=false it is the object itself.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from shared import prewarm, startup
from shared.engine_server import EngineServer
from shared.errors import JobError, StartError
from shared.jobs import Request, current_job, job_handler, refuse_stream, start_config, validate
from shared.logs import log
from shared.openai_api import OpenAIRequest
from shared.settings import WorkerSettings, read_settings
from shared.streaming import relay
from shared.volume import ModelPath


@cache
def vllm() -> dict[str, Any]:
    """What the pinned vLLM takes: flags, variables and fields; see dump_flags.py."""
    kept: dict[str, Any] = json.loads(Path(__file__).with_name("engine.json").read_text())
    return kept


# ---- settings ------------------------------------------------------------------------------------------


class Settings(WorkerSettings):
    model_name: str = Field(
        "Qwen/Qwen2.5-7B-Instruct", description="Model id on the Hugging Face Hub, or a folder"
    )
    served_model_name: str | None = Field(
        None, description="Name of the model in requests and answers, or several; MODEL_NAME when unset"
    )
    openai_served_model_name_override: str | None = Field(
        None, description="Another name of SERVED_MODEL_NAME"
    )
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] = Field(  # type: ignore[assignment]
        "auto", description="auto: the model's own, float16 for float32 ones"
    )
    device: str = Field("auto", description="Not used: the build of vLLM decides")
    max_concurrency: int | None = Field(  # type: ignore[assignment]
        None, ge=1, le=1024, description="Jobs that one worker takes at a time; unset: what the cache holds"
    )
    streaming: bool = Field(
        True, description="Answer through a generator, which can stream; false: plain answers only"
    )
    vllm_extra_args: str = Field("", description="More of the command line; wins over everything else")
    vllm_config_file: str | None = Field(None, description="vLLM's YAML file; variables win over it")
    vllm_attention_backend: str | None = Field(
        None, description="Another name of ATTENTION_BACKEND, such as FLASH_ATTN"
    )
    vllm_startup_timeout: float = Field(
        1800, gt=0, description="Seconds after which an engine that is not ready is given up"
    )
    vllm_port: int | None = Field(
        None, ge=1024, le=65535, description="Port of the engine on loopback; unset or in use: a free one"
    )
    health_timeout: float = Field(
        60, ge=2, description="Seconds of silence after which the engine counts as hung"
    )
    engine_command: str = Field(
        "vllm serve {model}", pattern=r"\{model\}", description="How the engine is started"
    )

    @property
    def names(self) -> list[str]:
        given = self.openai_served_model_name_override or self.served_model_name
        return given.split() if given else [self.model_name]


# ---- the engine's command line, from the environment ---------------------------------------------------

# Older names, the reference's and the official worker's, of flags that are there.
ALIASES = {
    "TOKENIZER_NAME": "tokenizer",
    "CUSTOM_CHAT_TEMPLATE": "chat-template",
    "OPENAI_RESPONSE_ROLE": "response-role",
}
# What older versions had, and what has taken its place.
REMOVED = {
    "CUDA_GRAPH_SIZES": "CUDAGRAPH_CAPTURE_SIZES or MAX_CUDAGRAPH_CAPTURE_SIZE",
    "MAX_SEQ_LEN_TO_CAPTURE": "nothing: graphs no longer depend on the context's length",
    "MAX_CONTEXT_LEN_TO_CAPTURE": "nothing: graphs no longer depend on the context's length",
    "SWAP_SPACE": "nothing: this vLLM swaps nothing out",
    "NUM_SCHEDULER_STEPS": "nothing: scheduling is asynchronous",
    "TASK": "RUNNER and CONVERT",
    "ROPE_SCALING": "HF_OVERRIDES",
    "ROPE_THETA": "HF_OVERRIDES",
    "GUIDED_DECODING_BACKEND": "STRUCTURED_OUTPUTS_CONFIG",
    "DISABLE_LOG_REQUESTS": "ENABLE_LOG_REQUESTS (requests are not logged by default)",
    "ENABLE_LORA_BIAS": "nothing",
    "LORA_EXTRA_VOCAB_SIZE": "nothing",
    "LONG_LORA_SCALING_FACTORS": "nothing",
    "OVERRIDE_ATTENTION_DTYPE": "nothing",
    "CALCULATE_KV_SCALES": "nothing: scales come with the checkpoint",
    "SCHEDULER_DELAY_FACTOR": "nothing",
    "PREEMPTION_MODE": "nothing",
    "USE_V2_BLOCK_MANAGER": "nothing",
    "NUM_LOOKAHEAD_SLOTS": "SPECULATIVE_CONFIG",
    "SPECULATIVE_MODEL": "SPECULATIVE_CONFIG",
    "NUM_SPECULATIVE_TOKENS": "SPECULATIVE_CONFIG",
    "NGRAM_PROMPT_LOOKUP_MAX": "SPECULATIVE_CONFIG",
    "NGRAM_PROMPT_LOOKUP_MIN": "SPECULATIVE_CONFIG",
    "ENGINE_USE_RAY": "DISTRIBUTED_EXECUTOR_BACKEND",
    "WORKER_USE_RAY": "DISTRIBUTED_EXECUTOR_BACKEND",
    "DISABLE_LOGGING_REQUEST": "ENABLE_LOG_REQUESTS (requests are not logged by default)",
    "DEFAULT_BATCH_SIZE": "nothing: a stream sends what has come",
    "DEFAULT_MIN_BATCH_SIZE": "nothing: a stream sends what has come",
    "DEFAULT_BATCH_SIZE_GROWTH_FACTOR": "nothing: a stream sends what has come",
    "RAW_OPENAI_OUTPUT": "nothing: answers are always OpenAI's",
    "VLLM_USE_V1": "nothing: there is no other engine",
    "HF_HUB_ENABLE_HF_TRANSFER": "HF_XET_HIGH_PERFORMANCE",
    "TRANSFORMERS_CACHE": "HF_HOME",
}
# Not read from the environment: the worker's own, or names that mean something else there.
RESERVED = {
    "api-key", "config", "data-parallel-supervisor-port", "dtype", "grpc", "grpc-port", "headless", "host",
    "hf-token", "log-config-file", "log-level", "master-addr", "master-port", "middleware", "model", "nnodes",
    "node-rank", "port", "revision", "root-path", "served-model-name", "ssl-ca-certs", "ssl-cert-reqs",
    "ssl-certfile", "ssl-ciphers", "ssl-keyfile", "trust-remote-code", "uds", "watermark",
}  # fmt: skip
# Never the user's: the worker would not reach its engine, or the log would tell a secret. The worker's host
# and port, which come last, win over a file's.
OWN = {"api-key", "hf-token", "ssl-certfile", "ssl-keyfile", "uds"}
ZERO_IS_UNSET = {"max-model-len", "max-num-batched-tokens", "max-num-seqs"}
# Flags that may name another repository on the hub.
FETCHING = {
    "tokenizer",
    "hf-config-path",
    "lora-modules",
    "default-mm-loras",
    "speculative-config",
    "spec-model",
}
YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
# Variables that look like a misspelt flag and are somebody else's.
FOREIGN = re.compile(r"(RUNPOD|CUDA|NVIDIA|NCCL|PYTHON|PIP|TORCH|HF|LC|LD|XDG|OMP|MKL|SSH|GIT|AWS|BUCKET)_")

Flags = dict[str, list[str]]
"""Flag names without dashes, and the words that follow each: `{"enforce-eager": [], "seed": ["1"]}`."""


def variable(flag: str) -> str:
    return flag.upper().replace("-", "_")


def read_flags(settings: Settings, environ: Mapping[str, str]) -> Flags:
    """The flags that the environment gives. Raises StartError for a value that a flag cannot have."""
    kinds = vllm()["flags"]
    given = {variable(flag): flag for flag in kinds if flag not in RESERVED} | ALIASES
    flags: Flags = {}
    for name, flag in given.items():
        value = environ.get(name, "").strip()
        if value and not (flag in ZERO_IS_UNSET and value == "0"):
            flags.update(_flag(name, value, flag, kinds[flag]))
    backend = settings.vllm_attention_backend
    if backend and backend.upper() == "XFORMERS":
        log.warning("VLLM_ATTENTION_BACKEND=XFORMERS: vLLM no longer has it, and chooses by itself")
    elif backend:
        flags.setdefault("attention-backend", [backend])
    flags["served-model-name"] = settings.names
    flags["dtype"] = [settings.dtype]
    if settings.trust_remote_code:
        flags["trust-remote-code"] = []
    if settings.vllm_config_file:
        flags["config"] = [settings.vllm_config_file]
    if "lora-modules" in flags:
        flags.setdefault("enable-lora", [])
    return flags


def _flag(name: str, value: str, flag: str, kind: str) -> Flags:
    if kind in ("pair", "switch"):
        if value.lower() in YES:
            return {flag: []}
        if value.lower() in NO:
            return {f"no-{flag}": []} if kind == "pair" else {}
        raise StartError(f"{name}={value[:80]!r}: must be true or false.", code="bad_setting")
    if kind in ("int", "float"):
        try:
            (int if kind == "int" else float)(value)
        except ValueError:
            wanted = "an integer" if kind == "int" else "a number"
            raise StartError(f"{name}={value[:80]!r}: must be {wanted}.", code="bad_setting") from None
    if kind == "list":
        return {flag: _words(name, value)}
    return {flag: [value]}


def _words(name: str, value: str) -> list[str]:
    """A flag's several words: a JSON array, one JSON object, or words in a shell's form."""
    try:
        if value[0] not in "[{":
            return shlex.split(value)
        items = json.loads(value)
    except ValueError as error:
        raise StartError(f"{name}={value[:80]!r}: {error}.", code="bad_setting") from None
    items = items if isinstance(items, list) else [items]
    return [item if isinstance(item, str) else json.dumps(item) for item in items]


def advice(environ: Mapping[str, str]) -> list[str]:
    """A line for each variable that has no effect any more, or is probably misspelt."""
    own = {name.upper() for name in Settings.model_fields}
    flags = {variable(flag) for flag in vllm()["flags"] if flag not in RESERVED}
    known = own | flags | ALIASES.keys() | set(vllm()["environment"]) | {"BASE_PATH"}
    lines = []
    for name in sorted(environ):
        if name in REMOVED:
            lines.append(f"{name} has no effect any more. Instead: {REMOVED[name]}.")
        elif name not in known and not FOREIGN.match(name):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.86)
            if close and len(name) >= 6:
                lines.append(f"{name} is not a setting. Did you mean {close[0]}?")
    return lines


@dataclass
class Command:
    """The engine's command line: `engine_command`, flags, VLLM_EXTRA_ARGS."""

    head: list[str]
    flags: Flags
    extra: list[str]
    settled: set[str]
    """Names of flags that the user has given, in whatever way."""

    def default(self, flag: str, *words: str) -> bool:
        """Set `flag` where the user has not; whether that was so."""
        if flag in self.settled:
            return False
        self.flags[flag] = list(words)
        return True

    def words(self) -> list[str]:
        flags = (word for flag, values in self.flags.items() for word in (f"--{flag}", *values))
        return [*flags, *self.extra]

    def number(self, flag: str) -> int | None:
        """The value of a flag that counts something; None where the engine has its own."""
        text = " ".join(self.words()).replace("_", "-")
        found = re.findall(rf"--{flag}[ =](\d+)(?: |$)", text)
        return int(found[-1]) if found else None

    def __call__(self, port: int) -> list[str]:
        return [*self.head, *self.words(), "--host", "127.0.0.1", "--port", str(port)]


def build_command(settings: Settings, model: ModelPath, environ: Mapping[str, str]) -> Command:
    flags = read_flags(settings, environ)
    try:
        extra = shlex.split(settings.vllm_extra_args)
    except ValueError as error:
        raise StartError(f"VLLM_EXTRA_ARGS: {error}.", code="bad_setting") from None
    named = {spelt_out(word[2:].partition("=")[0]) for word in extra if word.startswith("--")}
    if taken := named & (OWN | {"host", "port", "model", "config"}):
        hint = "Set VLLM_CONFIG_FILE" if "config" in taken else "Leave it out"
        raise StartError(f"VLLM_EXTRA_ARGS: --{min(taken)} is the worker's own. {hint}.", code="bad_setting")
    if settings.vllm_config_file:
        given = config_flags(settings.vllm_config_file)
        if taken := given & OWN:
            raise StartError(
                f"VLLM_CONFIG_FILE: {min(taken)} is the worker's own. Leave it out.", code="bad_setting"
            )
        named |= given
    settled = {name.removeprefix("no-") for name in named | flags.keys()}
    head = [word.replace("{model}", str(model.path)) for word in shlex.split(settings.engine_command)]
    command = Command(head, flags, extra, settled)
    command.default("disable-uvicorn-access-log")
    share = gpus_of_a_stage(command, count_gpus(environ))
    if share and (gpus := usable_gpus(model.path, share)) > 1:
        command.default("tensor-parallel-size", str(gpus))
    return command


def spelt_out(flag: str) -> str:
    """The flag that vLLM takes this one for: with underscores, or only its beginning."""
    flag, kinds = flag.replace("_", "-"), vllm()["flags"]
    begun = [name for name in kinds if name.startswith(flag)]
    return begun[0] if flag not in kinds and len(begun) == 1 else flag


def config_flags(file: str) -> set[str]:
    """The flags that vLLM's YAML file gives. Raises StartError for one that it could not read."""
    try:
        content = yaml.safe_load(Path(file).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise StartError(f"VLLM_CONFIG_FILE: {told}.", code="bad_setting") from None
    if not isinstance(content, dict):
        raise StartError("VLLM_CONFIG_FILE: it holds no flags, as in `seed: 1`.", code="bad_setting")
    return {spelt_out(str(key)) for key in content}


def count_gpus(environ: Mapping[str, str]) -> int:
    """The GPUs that a CUDA process would see, without being one: a context takes memory from the engine."""
    if (visible := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


DIVIDING = {"pipeline-parallel-size", "data-parallel-size", "prefill-context-parallel-size"}
PLACING = re.compile(r"pipeline-parallel|data-parallel|prefill-context|device-ids|nnodes")


def gpus_of_a_stage(command: Command, found: int) -> int | None:
    """What the user's stages and copies of the model leave each; None where this cannot be told from here."""
    if any(re.match(r"-(pp|dp|pcp)", word) for word in command.extra):
        return None
    for flag in filter(PLACING.match, command.settled):
        if flag not in DIVIDING or not (parts := command.number(flag)):
            return None
        found //= parts
    return found


def usable_gpus(model: Path, found: int) -> int:
    """The most of `found` GPUs over which the model's attention heads divide evenly."""
    try:
        config = json.loads((model / "config.json").read_text())
        heads = int((config.get("text_config") or config)["num_attention_heads"])
    except (OSError, ValueError, KeyError, TypeError):
        return found
    return max((count for count in range(1, found + 1) if heads % count == 0), default=found)


# ---- requests ------------------------------------------------------------------------------------------


class GenerateRequest(Request):
    """The worker's own input. Fields beyond these are those of vLLM's chat and completion requests."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())

    messages: list[dict[str, Any]] | None = Field(
        None, min_length=1, description="A conversation in OpenAI's form, for models with a chat template"
    )
    prompt: str | list[str] | list[int] | list[list[int]] | None = Field(
        None, min_length=1, description="A text to go on from, instead of `messages`; token ids, or several"
    )
    model: str | None = Field(None, description="A served name or a LoRA adapter's; unset: the model")
    max_tokens: int | None = Field(
        None, ge=1, description="Most tokens of the answer; unset: 512, or what there is room for"
    )
    temperature: float = Field(0.7, ge=0, le=2, description="0: always the likeliest token")
    top_p: float = Field(0.95, gt=0, le=1, description="Draw from the likeliest tokens with this sum")
    top_k: int = Field(-1, ge=-1, description="Draw from this many of the likeliest; -1 and 0: from all")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Above 0: less of what the answer has")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="The same, by how often it has it")
    stop: str | list[str] | None = Field(None, description="A text or several before which the answer ends")
    stream: bool = Field(False, description="Send the answer in pieces as it is made")

    @model_validator(mode="before")
    @classmethod
    def _flatten(cls, data: Any) -> Any:
        """The official worker's form has the sampling in an object of its own."""
        if isinstance(data, dict) and isinstance(data.get("sampling_params"), dict):
            data = {**data, **data["sampling_params"]}
            del data["sampling_params"]
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> GenerateRequest:
        if (self.messages is None) == (self.prompt is None):
            given = "neither of them is there" if self.prompt is None else "both are there"
            raise _wrong("prompt", "invalid_value", f"give either messages or prompt; {given}.")
        chat, completion = vllm()["fields"]["chat"], vllm()["fields"]["completion"]
        known, other = (completion, chat) if self.messages is None else (chat, completion)
        for name in self.model_extra or {}:
            if name not in known:
                raise _wrong(name, "unknown_field", _unknown(name, known, other, self.messages is None))
        return self


def _wrong(param: str, code: str, message: str) -> JobError:
    return JobError(f"{param}: {message}", param=param, code=code)


def _unknown(name: str, known: list[str], other: list[str], prompt: bool) -> str:
    if name in other:
        return f"goes with {'messages' if prompt else 'prompt'} only."
    if name.startswith("guided_"):
        return f'this vLLM has it as "structured_outputs": {{"{name.removeprefix("guided_")}": ...}}.'
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown field.{hint} The README says where the allowed ones are listed."


class Call(OpenAIRequest):
    """The body of an OpenAI route: what vLLM takes there."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())
    method: ClassVar[str] = "POST"
    path: ClassVar[str]

    stream: bool | None = Field(None, description="Send the answer in pieces")

    def body(self) -> dict[str, Any] | None:
        return None if self.method == "GET" else self.model_dump(exclude_unset=True)


def _route(path: str, method: str = "POST") -> type[Call]:
    made = create_model(f"Call {method} {path}", __base__=Call)
    made.method, made.path = method, path
    return made


# What a job may reach of the engine, and how: its path is never made from a job's text.
ROUTES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": _route("/v1/chat/completions"),
    "/v1/completions": _route("/v1/completions"),
    "/v1/embeddings": _route("/v1/embeddings"),
    "/v1/models": _route("/v1/models", "GET"),
    "/v1/responses": _route("/v1/responses"),
    "/v1/messages": _route("/v1/messages"),
    "/v1/messages/count_tokens": _route("/v1/messages/count_tokens"),
    "/v1/rerank": _route("/v1/rerank"),
    "/v1/score": _route("/v1/score"),
    # vLLM has these without /v1, where an OpenAI client cannot ask for them.
    "/v1/tokenize": _route("/tokenize"),
    "/v1/detokenize": _route("/detokenize"),
    "/tokenize": _route("/tokenize"),
    "/detokenize": _route("/detokenize"),
    "/rerank": _route("/rerank"),
    "/score": _route("/score"),
}


class RouteRequest(Request):
    """The official worker's form of one of ROUTES."""

    route: str = Field(description="One of these routes")
    body: dict[str, Any] | None = Field(None, description="What vLLM takes there")
    method: str | None = Field(None, description="The route's own, which needs not be said")

    @property
    def call(self) -> Call:
        """Raises JobError for a route that is not served, and for another method than its own."""
        path = self.route.partition("?")[0].rstrip("/")
        found = ROUTES.get(path)
        if found is None:
            served = ", ".join(ROUTES)
            raise _wrong("route", "unknown_route", f"{self.route[:60]!r} is not served here. Use {served}.")
        assert issubclass(found, Call)
        if self.method and self.method.upper() != found.method:
            raise _wrong("method", "invalid_value", f"{path} is asked with {found.method}.")
        made = validate(found, self.body or {})
        assert isinstance(made, Call)
        return made


DEFAULT_TOKENS = 512
default_tokens = DEFAULT_TOKENS
"""What `prepare` makes of it: vLLM refuses more than the model's length, and itself counts the prompt."""


def shorter_default(models: str) -> int:
    """DEFAULT_TOKENS, or the model's length where that is less. models: the engine's answer at /v1/models."""
    return min([DEFAULT_TOKENS, *map(int, re.findall(r'"max_model_len": ?(\d+)', models))])


def native_body(request: GenerateRequest) -> dict[str, Any]:
    """vLLM's own request for the worker's."""
    body: dict[str, Any] = request.model_dump(exclude_none=True)
    if request.max_tokens is None and "max_completion_tokens" not in body:
        body["max_tokens"] = default_tokens
    if request.stream:
        body["stream_options"] = {"include_usage": True, **(body.get("stream_options") or {})}
    return body


# ---- load ----------------------------------------------------------------------------------------------

# What a start that found too little memory is tried again with, save for what the user has set.
SMALLER = {
    "max-model-len": ["auto"],
    "max-num-seqs": ["64"],
    "max-num-batched-tokens": ["2048"],
    "enforce-eager": [],
}

DEFAULT_SEQS = 256  # vLLM's own max_num_seqs; on GPUs of 70 GiB and more it is 1024

engine: EngineServer


def load(settings: Settings) -> tuple[EngineServer, Command]:
    """Start the engine. Raises StartError, EngineFailed."""
    for line in advice(os.environ):
        log.warning(line)
    hub = os.environ.get("HF_HUB_OFFLINE")
    model = prewarm.resolve(settings, settings.model_name)
    command = build_command(settings, model, os.environ)
    env = engine_env(command, online=not hub)

    def start() -> EngineServer:
        server = EngineServer(
            "vllm", command, port=settings.vllm_port, env=env,
            start_timeout=settings.vllm_startup_timeout, hang_timeout=settings.health_timeout,
        )  # fmt: skip
        server.start()
        return server

    with prewarm.phase("load"):
        try:
            return start(), command
        except StartError as error:
            if error.code != "out_of_memory":
                raise
            lowered = [flag for flag, words in SMALLER.items() if command.default(flag, *words)]
            if "less than desired" in error.message and command.default("gpu-memory-utilization", "0.8"):
                lowered.append("gpu-memory-utilization")
            if not lowered:
                raise
            log.warning("%s Trying once more with smaller settings: %s", error.message, ", ".join(lowered))
            return start(), command


def engine_env(command: Command, *, online: bool) -> dict[str, str | None]:
    """What the engine's environment has beyond this process's, and what it does not have."""
    wrapper = {name.upper() for name in Settings.model_fields if name.startswith("vllm_")}
    env: dict[str, str | None] = dict.fromkeys([*wrapper, *(n for n in REMOVED if n.startswith("VLLM_"))])
    env["VLLM_API_KEY"] = None  # the engine listens on loopback alone, and its worker has no key
    env["VLLM_NO_USAGE_STATS"] = os.environ.get("VLLM_NO_USAGE_STATS", "1")
    if "VLLM_CACHE_ROOT" in os.environ:  # on the volume: worth to keep what this start measures
        env["VLLM_ENABLE_STARTUP_PLAN"] = os.environ.get("VLLM_ENABLE_STARTUP_PLAN", "1")
        env["FLASHINFER_WORKSPACE_BASE"] = os.environ.get(
            "FLASHINFER_WORKSPACE_BASE", str(Path(os.environ["VLLM_CACHE_ROOT"]).with_name("flashinfer"))
        )
    # The model is at hand; its code, an adapter or a draft model may have to be fetched.
    if online and command.settled & (FETCHING | {"trust-remote-code"}):
        env |= {"HF_HUB_OFFLINE": None, "TRANSFORMERS_OFFLINE": None}
    return env


def jobs_at_a_time(metrics: str, most: int) -> int:
    """How many jobs keep the engine busy: four times as many as its cache holds at full length, at least 8.

    Requests are seldom of full length, and those that do not fit wait in the engine's own queue. A number
    far above what it can run would keep jobs from the endpoint's other workers.
    """
    held = [float(found) for found in re.findall(r'kv_cache_max_concurrency="([\d.]+)"', metrics)]
    return min(most, max(8, int(4 * sum(held)))) if held else min(most, 64)


# ---- handle --------------------------------------------------------------------------------------------


Asked = GenerateRequest | RouteRequest | Call


@job_handler(GenerateRequest, RouteRequest, routes=ROUTES)
async def handler(request: Asked) -> AsyncIterator[dict[str, Any] | str]:
    if isinstance(request, RouteRequest):
        request = request.call
    if request.stream:
        async for events in relay(stream(request)):
            yield events
    else:
        yield await answer(request)


@job_handler(GenerateRequest, RouteRequest, routes=ROUTES)
async def plain_handler(request: Asked) -> dict[str, Any]:
    """The handler where STREAMING is false."""
    if isinstance(request, RouteRequest):
        request = request.call
    refuse_stream(request)
    return await answer(request)


def call(request: GenerateRequest | Call) -> tuple[str, str, dict[str, Any] | None]:
    """Method, path and body of the engine's request."""
    if isinstance(request, Call):
        return request.method, request.path, request.body()
    path = "/v1/completions" if request.messages is None else "/v1/chat/completions"
    return "POST", path, native_body(request)


def named() -> dict[str, str]:
    """vLLM makes its answer's id from this header."""
    return {"X-Request-Id": str(current_job.get()["id"])}


async def answer(request: GenerateRequest | Call) -> dict[str, Any]:
    method, path, body = call(request)
    try:
        found: dict[str, Any] = await engine.request(method, path, body, headers=named())
    except JobError as error:
        raise explain(error, path) from None
    return found


async def stream(request: GenerateRequest | Call) -> AsyncIterator[str]:
    _, path, body = call(request)
    try:
        async with aclosing(engine.stream(path, body, headers=named())) as parts:
            async for events in parts:
                yield events
    except JobError as error:
        raise explain(error, path) from None


def explain(error: JobError, path: str) -> JobError:
    if error.code == 404 and error.message == "Not Found":
        return _wrong(
            "openai_route", "unknown_route", f"the model does not serve {path}: it is of another kind."
        )
    return error


# ---- start ---------------------------------------------------------------------------------------------


def prewarm_inputs(served: str) -> list[dict[str, Any]]:
    """Small requests that the model can answer; `served` is the engine's list of its routes."""
    if '"/v1/completions"' in served:
        return [{"prompt": "Hello", "max_tokens": 4, "temperature": 0}]
    for route, body in (("/v1/embeddings", {"input": "Hello"}), ("/score", {"text_1": "a", "text_2": "b"})):
        if f'"{route}"' in served:
            return [{"openai_route": route, "openai_input": body}]
    return []


def prepare() -> dict[str, Any]:
    global engine, default_tokens
    settings = read_settings(Settings)
    engine, command = load(settings)
    default_tokens = shorter_default(engine.get("/v1/models")[1])
    most = settings.max_concurrency or jobs_at_a_time(
        engine.get("/metrics")[1], command.number("max-num-seqs") or DEFAULT_SEQS
    )
    log.info("concurrency=%d", most)
    serving = handler if settings.streaming else plain_handler
    if settings.prewarm:
        prewarm.run(serving, prewarm_inputs(engine.get("/openapi.json")[1]))
    return start_config(serving, settings.model_copy(update={"max_concurrency": most}))


def main() -> None:
    if base := os.environ.get("BASE_PATH"):  # the official worker's name
        os.environ.setdefault("RUNPOD_VOLUME_PATH", base)
    config = startup.run(prepare, worker="vllm")
    import runpod

    runpod.serverless.start(config)


if __name__ == "__main__":
    main()
