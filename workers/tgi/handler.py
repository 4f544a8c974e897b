"""Text from the models of Hugging Face's Text Generation Inference (TGI), which runs as a child process.

Request:  {"input": {"messages": [{"role": "user", "content": "Name three rivers."}], "max_tokens": 200}}
          or {"input": {"prompt": "Three rivers:"}}
Response: {"response": "The Rhine, the Nile and the Volga.", "finish_reason": "stop",
           "details": {"finish_reason": "eos_token", "generated_tokens": 13, "seed": null},
           "usage": {"prompt_tokens": 24, "completion_tokens": 13, "total_tokens": 37},
           "model": "meta-llama/Llama-3.1-8B-Instruct", "revision": "0e9e39f..."}

With "stream": true the answer comes in pieces, {"response": "The"}, ..., and ends with the object above,
whose `response` is then empty.

OpenAI:   /v1/chat/completions and /v1/completions, streamed and plain, and /v1/models, as {"openai_route":
          ..., "openai_input": ...} or through the endpoint's own /openai/v1 address.

A worker that streams is a generator, so RunPod gives a plain job's answer as a list of one; with
STREAMING=false it is the object itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import shlex
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from shared import openai_api, prewarm, startup
from shared.engine_server import EngineClient, EngineFailed, EngineServer
from shared.errors import JobError, StartError
from shared.generation import StopStrings
from shared.jobs import Request, current_job, job_handler, refuse_stream, start_config
from shared.logs import log, redact
from shared.openai_api import ModelList, ModelsRequest, OpenAIRequest, StreamOptions, Usage
from shared.settings import WorkerSettings, read_settings
from shared.streaming import STREAM_LIMIT, relay
from shared.volume import use_volume

DEFAULT_TOKENS = 512
PATIENCE_S = 20.0  # for a server whose places are all taken
GRACE_S = 10  # for a server that is told to end; by then its jobs are done

# ---- settings ------------------------------------------------------------------------------------------

Count = Annotated[int | None, Field(ge=1)]


class Launcher(WorkerSettings):
    """The settings that text-generation-launcher has too. One that is unset has TGI's own default."""

    sharded: bool | None = Field(None, description="false: one GPU; unset: all that there are")
    num_shard: Count = Field(None, description="GPUs to spread the model over; unset: all")
    quantize: (
        Literal[
            "awq", "compressed-tensors", "eetq", "exl2", "gptq", "marlin", "bitsandbytes", "bitsandbytes-nf4",
            "bitsandbytes-fp4", "fp8",
        ]
        | None
    ) = Field(None, description="Only for models that are not quantized yet")  # fmt: skip
    speculate: int | None = Field(None, ge=0, description="Tokens to guess ahead: Medusa heads or n-grams")
    kv_cache_dtype: Literal["fp8_e4m3fn", "fp8_e5m2"] | None = Field(None, description="Of the cache")
    max_concurrent_requests: Count = Field(
        None,
        description="Requests that TGI takes at a time; unset: twice MAX_CONCURRENCY, at least 128",
    )
    max_best_of: Count = Field(None, description="Most `best_of`; TGI's default is 2")
    max_stop_sequences: Count = Field(None, description="Most texts in `stop`; TGI's default is 4")
    max_top_n_tokens: int | None = Field(None, ge=0, description="Most `top_n_tokens`; TGI's default is 5")
    max_input_tokens: Count = Field(None, description="Most tokens of a prompt; unset: MAX_TOTAL_TOKENS - 1")
    max_total_tokens: Count = Field(
        None, description="Most tokens of a prompt and its answer; unset: what the model and the memory hold"
    )
    max_batch_prefill_tokens: Count = Field(None, description="Most prompt tokens that are read in one step")
    max_batch_total_tokens: Count = Field(
        None, description="Most tokens of all requests together; unset: what the memory holds"
    )
    max_batch_size: Count = Field(None, description="Most requests that are answered at the same time")
    max_waiting_tokens: int | None = Field(None, ge=0, description="Tokens after which newcomers go first")
    waiting_served_ratio: float | None = Field(
        None, ge=0, description="Of waiting to running, to the same end"
    )
    max_client_batch_size: Count = Field(None, description="Most prompts of a completion; TGI's default is 4")
    validation_workers: Count = Field(None, description="Threads that tokenize")
    cuda_graphs: str | None = Field(
        None, pattern=r"^\d+(,\d+)*$", description="DecodeBatch sizes to record graphs for, as in 1,2,4; 0: none"
    )
    cuda_memory_fraction: float | None = Field(None, gt=0, le=1, description="Share of the GPU's memory")
    rope_scaling: Literal["linear", "dynamic"] | None = Field(None, description="For longer prompts")
    rope_factor: float | None = Field(None, gt=0, description="Goes with ROPE_SCALING")
    lora_adapters: str | None = Field(
        None, description="Adapters by id, or as id=folder, separated by commas; requests name one as `model`"
    )
    tokenizer_config_path: str | None = Field(
        None, description="A tokenizer_config.json with a chat template"
    )
    disable_custom_kernels: bool = Field(False, description="For GPUs that they do not run on")
    disable_grammar_support: bool = Field(False, description="No `grammar`, no tools")
    enable_prefill_logprobs: bool = Field(
        False, description="Let `decoder_input_details` tell the prompt's log probabilities; takes memory"
    )
    watermark_gamma: float | None = Field(None, gt=0, lt=1, description="Of `watermark`")
    watermark_delta: float | None = Field(None, gt=0, description="Of `watermark`")
    otlp_endpoint: str | None = Field(None, description="Where TGI sends its traces")
    otlp_service_name: str | None = Field(None, description="Its name there")
    payload_limit: int = Field(
        64_000_000, ge=1000, description="Largest request in bytes; TGI's own default is 2 MB"
    )


class Settings(Launcher):
    model_name: str | None = Field(  # type: ignore[assignment]
        None, description="Model id on the Hugging Face Hub, or a folder; required without TGI_URL"
    )
    model_id: str | None = Field(None, description="TGI's name of MODEL_NAME; wins where both are set")
    revision: str | None = Field(None, description="TGI's name of MODEL_REVISION")
    hugging_face_hub_token: SecretStr | None = Field(None, description="Older name of HF_TOKEN")
    max_input_length: Count = Field(None, description="Older name of MAX_INPUT_TOKENS")
    dtype: Literal["auto", "bfloat16", "float16"] = Field("auto", description="auto: TGI's choice")
    device: str = Field("auto", description="Not used: TGI takes the GPUs that CUDA_VISIBLE_DEVICES leaves")
    streaming: bool = Field(
        True, description="Answer through a generator, which can stream; false: plain answers only"
    )
    tgi_url: str | None = Field(
        None,
        pattern=r"^https?://[^/\s]",
        description="A TGI that runs elsewhere, in place of one in this worker",
    )
    api_key: SecretStr | None = Field(None, description="Its key, if it wants one")
    tgi_extra_args: str = Field("", description="More of the launcher's command line, as in a shell")
    tgi_startup_timeout: float = Field(
        1800, gt=0, description="Seconds until TGI must be ready, then the worker is replaced"
    )
    health_timeout: float = Field(
        60, ge=2, description="Seconds of silence after which TGI counts as hung, and the worker is replaced"
    )

    @model_validator(mode="after")
    def _agrees(self) -> Settings:
        """One name for what has several. A StartError passes through pydantic as it is."""
        if not (self.model_id or self.model_name or self.tgi_url):
            raise StartError(
                "MODEL_ID (or MODEL_NAME) is not set. TGI would serve bigscience/bloom-560m instead, so name "
                "the model to serve.",
                code="bad_setting",
            )
        if self.max_input_length and self.max_input_tokens not in (None, self.max_input_length):
            raise StartError(
                f"MAX_INPUT_TOKENS={self.max_input_tokens} and MAX_INPUT_LENGTH={self.max_input_length} are "
                "two names of one setting. Remove MAX_INPUT_LENGTH.",
                code="bad_setting",
            )
        one: dict[str, Any] = {
            "model_name": self.model_id or self.model_name,
            "model_revision": self.revision or self.model_revision,
            "hf_token": self.hf_token or self.hugging_face_hub_token,
            "max_input_tokens": self.max_input_tokens or self.max_input_length,
        }
        asked = self.max_concurrent_requests
        if asked and "max_concurrency" not in self.model_fields_set:
            one["max_concurrency"] = min(asked, 1024)
        most = one["max_input_tokens"]
        if most and self.max_total_tokens and most >= self.max_total_tokens:
            raise StartError(
                f"MAX_INPUT_TOKENS={most} must be below MAX_TOTAL_TOKENS={self.max_total_tokens}, which has "
                "to hold the answer too.",
                code="bad_setting",
            )
        for name, value in one.items():
            object.__setattr__(self, name, value)
        return self


# Variables of the launcher that are not settings here: it gets all it needs on its command line, where an
# empty variable is no error, and where RunPod's HOSTNAME, or a PORT for something else, cannot mislead it.
_OTHER_VARIABLES = (
    "MODEL_ID", "REVISION", "DTYPE", "TRUST_REMOTE_CODE", "MAX_INPUT_LENGTH", "HOSTNAME", "PORT",
    "PROMETHEUS_PORT", "SHARD_UDS_PATH", "MASTER_ADDR", "MASTER_PORT", "JSON_OUTPUT", "CORS_ALLOW_ORIGIN",
    "API_KEY", "NGROK", "NGROK_AUTHTOKEN", "NGROK_EDGE", "USAGE_STATS", "GRACEFUL_TERMINATION_TIMEOUT",
    "HUGGINGFACE_HUB_CACHE", "WEIGHTS_CACHE_OVERRIDE", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN",
)  # fmt: skip
_OWN_FLAGS = {
    "--model-id", "--hostname", "--port", "-p", "--usage-stats", "--max-input-length",
    "--graceful-termination-timeout",
}  # fmt: skip


def launcher_names() -> list[str]:
    """The settings that go to the launcher under their own names."""
    return [name for name in Launcher.model_fields if name not in WorkerSettings.model_fields]


def command(settings: Settings, model: str, revision: str | None, port: int) -> list[str]:
    """The launcher's command line. Raises StartError for a TGI_EXTRA_ARGS that cannot be."""
    argv = ["text-generation-launcher", "--model-id", model]
    if revision:
        argv += ["--revision", revision]
    if settings.dtype != "auto":
        argv += ["--dtype", settings.dtype]
    if settings.trust_remote_code:
        argv.append("--trust-remote-code")
    values = {name: getattr(settings, name) for name in launcher_names()}
    values["max_concurrent_requests"] = settings.max_concurrent_requests or max(
        128, 2 * settings.max_concurrency
    )
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        switch = Launcher.model_fields[name].annotation is bool
        if switch and value:
            argv.append(flag)
        elif not switch and value is not None:
            argv += [flag, str(value).lower() if isinstance(value, bool) else str(value)]
    try:
        extra = shlex.split(settings.tgi_extra_args)
    except ValueError as error:
        raise StartError(f"TGI_EXTRA_ARGS: {error}.", code="bad_setting") from None
    # -p5 is -p 5
    words = {word.partition("=")[0] if word.startswith("--") else word[:2] for word in extra}
    if taken := _OWN_FLAGS & words:
        raise StartError(
            f"TGI_EXTRA_ARGS: {min(taken)} is the worker's own. Leave it out.", code="bad_setting"
        )
    loopback = ["--hostname", "127.0.0.1", "--port", str(port), "--usage-stats", "off"]
    return [*argv, *extra, *loopback, "--graceful-termination-timeout", str(GRACE_S)]


def launcher_env(settings: Settings, *, offline: bool) -> dict[str, str | None]:
    """What differs from this process's environment; None removes a variable."""
    env: dict[str, str | None] = dict.fromkeys([*_OTHER_VARIABLES, *map(str.upper, launcher_names())])
    if settings.hf_token:
        env["HF_TOKEN"] = settings.hf_token.get_secret_value()
    if not offline:
        env |= {"HF_HUB_OFFLINE": None, "TRANSFORMERS_OFFLINE": None}
    return env


# ---- requests and responses ----------------------------------------------------------------------------


def _as_stops(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=200)]],
    BeforeValidator(_as_stops),
    Field(max_length=64),
]
Messages = Annotated[list[dict[str, Any]], Field(min_length=1)]
Tokens = Annotated[int, Field(ge=1, le=1_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class GenerateRequest(Request):
    messages: Messages | None = Field(None, description="A conversation, for models with a chat template")
    prompt: str | None = Field(None, min_length=1, description="A text to go on from, instead of `messages`")
    max_tokens: Tokens | None = Field(
        None, description="Most tokens of the answer; unset: 512, or what there is room for"
    )
    temperature: float = Field(0.7, ge=0, le=100, description="0: always the likeliest token")
    top_p: float = Field(0.95, gt=0, le=1, description="Draw from the likeliest tokens with this sum")
    top_k: int = Field(0, ge=0, le=1_000_000, description="Draw from this many of the likeliest; 0: from all")
    typical_p: float | None = Field(
        None, gt=0, le=1, description="Draw from the typical tokens with this sum"
    )
    do_sample: bool | None = Field(None, description="false: always the likeliest token")
    repetition_penalty: float | None = Field(
        None, gt=0, le=10, description="Above 1: less of what the text has already"
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="Above 0: less of what the text has often"
    )
    seed: Seed | None = Field(None, description="The same seed gives the same draws; unset: others each time")
    stop: Stop = Field(default=[], description="A text, or several, before which the answer ends")
    best_of: int | None = Field(None, ge=1, le=64, description="Make so many and answer with the likeliest")
    truncate: int | None = Field(None, ge=1, description="Read only so many of the prompt's last tokens")
    return_full_text: bool = Field(False, description="Put the prompt before the answer")
    details: bool = Field(False, description="Tell each token and its log probability in `details`")
    decoder_input_details: bool = Field(False, description="And those of the prompt; not with `stream`")
    top_n_tokens: int | None = Field(None, ge=0, description="And so many of the likeliest beside each")
    grammar: dict[str, Any] | None = Field(
        None, description='What the answer must fit: {"type": "json", "value": a JSON schema} or "regex"'
    )
    adapter_id: str | None = Field(None, description="One of LORA_ADAPTERS")
    watermark: bool = Field(False, description="Mark the text as a machine's")
    stream: bool = Field(False, description="Send the answer in pieces as it is made")

    @model_validator(mode="after")
    def _fits_together(self) -> GenerateRequest:
        if (self.messages is None) == (self.prompt is None):
            given = "neither of them is there" if self.prompt is None else "both are there"
            raise _wrong("prompt", "invalid_value", f"give either messages or prompt; {given}.")
        together = {"best_of": (self.best_of or 1) > 1, "decoder_input_details": self.decoder_input_details}
        for name, asked in together.items():
            if self.stream and asked:
                raise _wrong(name, "invalid_value", "does not go with stream.")
        return self

    @property
    def detailed(self) -> bool:
        return self.details or self.decoder_input_details or bool(self.top_n_tokens)


class GenerateResponse(BaseModel):
    response: str = Field(description="The answer, without the prompt")
    finish_reason: Literal["stop", "length"] = Field(
        description="`stop`: it was at its end or a stop text; `length`: at `max_tokens`"
    )
    details: dict[str, Any] = Field(
        description="TGI's finish_reason, generated_tokens, seed; if asked prefill, tokens, top_tokens"
    )
    usage: Usage
    model: str = Field(description="The model, as MODEL_NAME gives it")
    revision: str | None = Field(description="Its commit, where known")


class OpenAIBody(OpenAIRequest):
    """What both routes have; other fields reach TGI as they are."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())

    model: str | None = Field(None, description="The served model's name, or one of LORA_ADAPTERS")
    max_tokens: Tokens | None = Field(
        None, description="Most tokens of the answer; unset: as many as there is room for"
    )
    temperature: float | None = Field(None, ge=0, description="0: always the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1, description="Draw from the likeliest tokens of this sum")
    seed: Seed | None = Field(None, description="The same seed gives the same draws")
    stop: Stop = Field(default=[], description="A text, or several, before which the answer ends")
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="Above 0: less of what is there often"
    )
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="Above 1: less of what is there")
    stream: bool | None = Field(None, description="Send the answer in pieces")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`")

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(OpenAIBody):
    """The body of POST /v1/chat/completions: what TGI takes there."""

    messages: Messages = Field(
        description="The conversation so far; images as `image_url`, for models that see"
    )
    max_completion_tokens: Tokens | None = Field(None, description="Newer name of `max_tokens`")
    logprobs: bool | None = Field(None, description="Tell each token's log probability")
    top_logprobs: int | None = Field(None, ge=0, description="And those of the likeliest beside it")
    tools: list[dict[str, Any]] | None = Field(None, description="Tools that the model may call")
    tool_choice: str | dict[str, Any] | None = Field(None, description="`auto`, `none`, `required` or a tool")
    response_format: dict[str, Any] | None = Field(
        None, description="`json_schema`, which the answer will fit"
    )


class CompletionRequest(OpenAIBody):
    """The body of POST /v1/completions: what TGI takes there."""

    prompt: Annotated[list[str], BeforeValidator(_as_stops), Field(min_length=1)] = Field(
        description="A text, or up to MAX_CLIENT_BATCH_SIZE"
    )


OpenAICall = ChatRequest | CompletionRequest
Asked = GenerateRequest | ChatRequest | CompletionRequest | ModelsRequest
Answer = GenerateResponse | ModelList | dict[str, Any]
ROUTES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/models": ModelsRequest,
}


def _wrong(param: str, code: str, message: str) -> JobError:
    return JobError(f"{param}: {message}", param=param, code=code)


def parameters(request: GenerateRequest, max_tokens: int) -> dict[str, Any]:
    """TGI's `parameters`. Greedy is what has no sampling field at all: temperature 0 is an error there."""
    asked: dict[str, Any] = {
        "max_new_tokens": max_tokens,
        "details": True,
        "stop": request.stop,
        **request.model_dump(
            include={
                "repetition_penalty", "frequency_penalty", "seed", "best_of", "truncate",
                "decoder_input_details", "top_n_tokens", "grammar", "adapter_id", "watermark",
            },
            exclude_none=True,
        ),
    }  # fmt: skip
    asked["do_sample"] = request.temperature > 0 and request.do_sample is not False
    if asked["do_sample"]:
        asked["temperature"] = request.temperature
        for name, neutral in (("top_p", 1), ("top_k", 0), ("typical_p", 1)):
            if (value := getattr(request, name)) not in (None, neutral):
                asked[name] = value
    return asked


def openai_body(request: OpenAICall, adapter: str | None) -> dict[str, Any]:
    """What TGI takes of an OpenAI request, in the form in which it takes it.

    TGI has no null for several fields, no top_p of 1, no `stop` that is one text, JSON schemas under a name
    of its own, and makes a repetition penalty of presence_penalty by adding 2.
    """
    openai_api.refuse_unserved(
        request, n=1, presence_penalty=0, logit_bias={}, functions=[], modalities=["text"], audio=None,
        logprobs=0, suffix="", echo=False, best_of=1, chat_template_kwargs={}, top_k=0, min_p=0, typical_p=1,
    )  # fmt: skip
    body = request.model_dump(exclude_none=True, exclude={"model", "max_completion_tokens"})
    for name in ("n", "presence_penalty", "logit_bias", "suffix"):  # whose neutral values TGI may misread
        body.pop(name, None)
    if adapter:
        body["model"] = adapter
    if body.get("top_p") == 1:
        del body["top_p"]
    if isinstance(request, ChatRequest):
        if request.max_completion_tokens:
            body["max_tokens"] = request.max_completion_tokens
        if "repetition_penalty" in body:
            body["presence_penalty"] = body.pop("repetition_penalty") - 2
        body["messages"] = turns(request.messages)
        body |= _grammar(body.pop("response_format", {"type": "text"}))
        if not body.get("tools"):
            body.pop("tools", None)
    return body


def turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without nulls: clients send what they have got, and TGI has no null there."""
    return [{name: value for name, value in turn.items() if value is not None} for turn in messages]


def _grammar(asked: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's response_format as TGI's."""
    if asked.get("type") == "text":
        return {}
    if isinstance(schema := asked.get("json_schema"), dict):
        return {"response_format": {"type": "json", "value": schema.get("schema")}}
    if "value" not in asked:
        raise _wrong(
            "response_format", "unsupported", "TGI needs a schema. Use the type json_schema, with one."
        )
    return {"response_format": asked}


# ---- TGI's errors --------------------------------------------------------------------------------------

_TOO_LONG = re.compile(r"must be <= (\d+)\. Given: (\d+) \S+ tokens and")
_JSON_PATH = re.compile(r"into the target type: ([\w.\[\]]+): (.*?)( at line \d+ column \d+)?$", re.DOTALL)


def is_overloaded(error: JobError) -> bool:
    return error.message.startswith("Model is overloaded")


def room(error: JobError) -> int:
    """The tokens that there are for an answer, where it is refused as too long for its prompt; else 0."""
    found = _TOO_LONG.search(error.message)
    return max(0, int(found[1]) - int(found[2])) if found else 0


def explain(error: JobError, prompt: str) -> JobError:
    """TGI's error as this worker's: the field by the name that it has here, and what to do.

    prompt: the field that the text came from. By its text, since a stream has no status and OpenAI's routes
    give every error the same.
    """
    text = error.message
    names = {"inputs": prompt, "max_new_tokens": "max_tokens"}
    if error.code in (401, 403):
        message = "TGI refuses the worker's key. Set API_KEY."
        return JobError(message, code="unauthorized", type="server_error")
    if error.code == 413:
        message = f"{prompt}: the request is larger than TGI takes. Shorten it, or raise PAYLOAD_LIMIT."
        return JobError(message, param=prompt, code="too_large")
    if is_overloaded(error):
        message = "All of TGI's places are taken. Send the job again, or raise MAX_CONCURRENT_REQUESTS."
        return JobError(message, code="overloaded", type="server_error")
    if text.startswith("Request failed during generation"):
        cause = text.rpartition(": ")[2][:300]
        message = f"The model failed on this job ({cause}). Send it again, perhaps shorter."
        return JobError(message, code="generation_failed", type="server_error")
    if text.startswith("Incomplete generation"):
        message = "The answer broke off. Send the job again."
        return JobError(message, code="incomplete", type="server_error")
    if text.startswith("Template error"):
        if "template not found" in text:
            message = "the model has no chat template. Send prompt, or serve a model that is made for chat."
            return _wrong("messages", "no_chat_template", message)
        cause = text.removeprefix("Template error: ")[:300].rstrip(".")
        return _wrong("messages", "bad_prompt", f"the model's chat template refuses them: {cause}.")
    if text.startswith("Tool error: "):
        return _wrong("tools", "invalid_value", f"{text.removeprefix('Tool error: ')[:300].rstrip('.')}.")
    if text.startswith("Number of prompts exceeds"):
        return _wrong("prompt", "invalid_value", f"{text}. Send fewer, or raise MAX_CLIENT_BATCH_SIZE.")
    if found := _JSON_PATH.search(text):
        return _wrong(found[1], "invalid_value", f"{found[2][:300].rstrip('.')}.")
    if text.startswith("Input validation error: "):
        text = text.removeprefix("Input validation error: ")
        named = re.findall(r"`(\w+)`", text)
        param = names.get(named[0], named[0]) if named else "grammar" if "grammar" in text else prompt
        too_long = _TOO_LONG.search(text) or text.startswith("`inputs` must have less")
        if room(error):
            param = "max_tokens"
        said = re.sub(r"`(\w+)`", lambda match: names.get(match[1], match[1]), text)[:400].rstrip(".")
        return _wrong(param, "too_long" if too_long else "invalid_value", f"{said}.")
    return error


# ---- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """TGI and what is known of it.

    served: the adapter that each name in a request stands for, None for the model itself. bos: the token that
    TGI puts before every prompt.
    """

    client: EngineClient
    name: str
    revision: str | None
    served: dict[str, str | None]
    max_total_tokens: int
    bos: int | None

    async def call(self, path: str, body: Any, prompt: str) -> tuple[Any, Mapping[str, str]]:
        """The answer to a POST and its headers. Raises JobError in this worker's words."""
        begun = time.monotonic()
        while True:
            try:
                return await self.client.call("POST", path, body)
            except JobError as error:
                await _wait_or_raise(error, begun, prompt)

    async def events(self, path: str, body: Any, prompt: str) -> AsyncGenerator[list[dict[str, Any]]]:
        """The events of a stream, those at a time that have come, without `[DONE]` and comments.

        Raises JobError in this worker's words.
        """
        begun, silent = time.monotonic(), True
        while True:
            try:
                async with aclosing(self.client.stream(path, body)) as parts:
                    async for events in parts:
                        lines = events.split("\n")  # not splitlines(): a text may hold U+2028
                        data = [line[5:].strip(" ") for line in lines if line.startswith("data:")]
                        if made := [json.loads(it) for it in data if it and it != "[DONE]"]:
                            silent = False
                            yield made
                return
            except JobError as error:
                await _wait_or_raise(error, begun if silent else float("-inf"), prompt)

    async def read(self, request: GenerateRequest) -> tuple[str, str]:
        """The text to go on from, and the field that it came from."""
        if request.messages is None:
            return request.prompt or "", "prompt"
        asked, _ = await self.call("/chat_tokenize", {"messages": turns(request.messages)}, "messages")
        text: str = asked["templated_text"]
        first = next(iter(asked["tokenize_response"]), None)
        if first and first["id"] == self.bos:
            # TGI puts it before every text, and the template has put it there already.
            text = text.removeprefix(first["text"])
        return text, "messages"

    def adapter(self, asked: str | None, param: str = "model") -> str | None:
        """The adapter of a name. Raises JobError for one that is not served: TGI would take the model."""
        if asked is None:
            return None
        if asked.casefold() not in self.served:
            names = ", ".join(dict.fromkeys([self.name, *filter(None, self.served.values())]))
            raise _wrong(param, "model_not_found", f"{asked!r} is not served here. Use {names}.")
        return self.served[asked.casefold()]

    def check_length(self, max_tokens: int | None) -> None:
        """TGI itself looks at the first 1024 tokens only, and cuts the answer where the room ends."""
        if max_tokens is not None and max_tokens >= self.max_total_tokens:
            raise _wrong(
                "max_tokens", "too_long",
                f"a prompt and its answer have at most {self.max_total_tokens} tokens, got {max_tokens}.",
            )  # fmt: skip


async def _wait_or_raise(error: JobError, begun: float, prompt: str) -> None:
    """A place becomes free as soon as an answer ends: wait for it, but not for ever."""
    if not is_overloaded(error) or time.monotonic() - begun > PATIENCE_S:
        raise explain(error, prompt) from None
    await asyncio.sleep(random.uniform(0.05, 0.15))  # noqa: S311


def adapters(settings: Settings) -> list[str]:
    """The names of LORA_ADAPTERS: `name`, `name@revision` or `name=folder`."""
    given = (settings.lora_adapters or "").split(",")
    return [re.split("[=@]", adapter.strip())[0] for adapter in given if adapter.strip()]


def load(settings: Settings) -> Engine:
    if settings.tgi_url:
        client, revision = connect(settings, settings.tgi_url), None
    else:
        client, revision = start(settings)
    try:
        info, bos = asyncio.run(_ask(client))
    except JobError as error:
        if settings.tgi_url is None or error.code == "engine_unreachable":
            raise
        told = explain(error, "prompt")
        raise StartError(f"TGI_URL={redact(settings.tgi_url)}: {told.message}", code=str(told.code)) from None
    name = settings.served_model_name or settings.model_name or info["model_id"]
    served: dict[str, str | None] = {adapter.casefold(): adapter for adapter in adapters(settings)}
    for own in filter(None, (name, settings.model_name, info["model_id"], "tgi")):
        served[own.casefold()] = None
    log.info("tgi %s: %s", info["version"], {key: info[key] for key in info if key.startswith("max_")})
    return Engine(client, name, revision or info.get("model_sha"), served, info["max_total_tokens"], bos)


async def _ask(client: EngineClient) -> tuple[dict[str, Any], int | None]:
    info = await client.request("GET", "/info")
    tokens = await client.request("POST", "/tokenize", {"inputs": "a"})
    added = tokens and tokens[0]["start"] == tokens[0]["stop"]
    return info, tokens[0]["id"] if added else None


def connect(settings: Settings, url: str) -> EngineClient:
    """A TGI elsewhere, once it is well: it may be loading. Raises EngineFailed after tgi_startup_timeout."""
    key = {"Authorization": f"Bearer {settings.api_key.get_secret_value()}"} if settings.api_key else {}
    client = EngineClient(url, headers=key)
    with prewarm.phase("connect"):
        begun, warned = time.monotonic(), float("-inf")
        while (status := client.get("/health")[0]) != 200:
            now = time.monotonic()
            said = f"answers /health with {status}" if status else "does not answer"
            told = f"TGI_URL={redact(url)}: the server {said}. Check the address, and that it runs."
            if now - begun > settings.tgi_startup_timeout:
                raise EngineFailed(told)
            if now - warned > 30:
                warned = now
                log.warning(told)
            time.sleep(0.5)
    return client


def start(settings: Settings) -> tuple[EngineClient, str | None]:
    """TGI as a child process, and the model's commit."""
    name = settings.model_name
    assert name is not None
    model, revision, commit = name, settings.model_revision, None
    fetches = any("=" not in adapter for adapter in (settings.lora_adapters or "=").split(","))
    try:
        found = prewarm.resolve(settings, name)
        model, revision, commit = str(found.path), None, found.revision
        if template := tokenizer_config(found.path):
            settings = settings.model_copy(
                update={"tokenizer_config_path": settings.tokenizer_config_path or template}
            )
    except StartError as error:
        if error.code not in ("no_weights", "incomplete") or Path(name).is_dir():
            raise
        log.warning("%s Left to TGI: it knows other formats.", error.message)
        fetches = True
    server = EngineServer(
        "tgi",
        lambda port: command(settings, model, revision, port),
        env=launcher_env(settings, offline=not fetches),
        start_timeout=settings.tgi_startup_timeout,
        hang_timeout=settings.health_timeout,
        grace=GRACE_S,
    )
    with prewarm.phase("load"):
        server.start()
    return server, commit


def tokenizer_config(model: Path) -> str | None:
    """A tokenizer_config.json with the template of chat_template.jinja, which TGI does not read; or None."""
    template, config = model / "chat_template.jinja", model / "tokenizer_config.json"
    if not template.is_file() or not config.is_file():
        return None
    content = json.loads(config.read_text())
    if content.get("chat_template"):
        return None
    path = Path(tempfile.mkdtemp(prefix="tgi-")) / config.name
    path.write_text(json.dumps({**content, "chat_template": template.read_text()}))
    return str(path)


engine: Engine


# ---- handle --------------------------------------------------------------------------------------------


@job_handler(GenerateRequest, routes=ROUTES)
async def handler(request: Asked) -> AsyncIterator[Answer | str]:
    if isinstance(request, ModelsRequest) or not request.stream:
        yield await answer(request, engine)
    elif isinstance(request, GenerateRequest):
        async for part in stream(request, engine):
            yield part
    else:
        async for events in relay(stream_openai(request, engine)):
            yield events


@job_handler(GenerateRequest, routes=ROUTES)
async def plain_handler(request: Asked) -> Answer:
    """The handler where STREAMING is false."""
    refuse_stream(request)
    return await answer(request, engine)


async def answer(request: Asked, engine: Engine) -> Answer:
    if isinstance(request, ModelsRequest):
        return openai_api.model_list(engine.name, *filter(None, engine.served.values()))
    if isinstance(request, GenerateRequest):
        return await generate(request, engine)
    path, body, head = prepare_openai(request, engine)
    made, _ = await engine.call(path, body, _text_field(request))
    for choice in made["choices"]:
        holder, key = _text_of(choice)
        holder[key], cut = ended(holder.get(key), request.stop)
        mend(choice, cut=cut, calling="tool_calls" in holder)
    return {**made, **head}


def ended(text: str | None, stops: list[str]) -> tuple[str | None, bool]:
    """The text before the first stop text, where TGI has it too, and whether there was one.

    Without the character of which `max_tokens` has left a part only: a stream does not have it either.
    """
    if text is None:
        return None, False
    stop = StopStrings(stops)
    before, cut = stop.feed(text)
    return (before, True) if cut else (text.rstrip("\ufffd"), False)


async def generate(request: GenerateRequest, engine: Engine) -> GenerateResponse:
    inputs, field = await engine.read(request)
    body = _generate_body(request, inputs, engine)
    try:
        made, headers = await engine.call("/generate", body, field)
    except JobError as error:
        body = _shorter(request, body, error)
        made, headers = await engine.call("/generate", body, field)
    details = made["details"]
    text, cut = ended(made["generated_text"], request.stop)
    count = sum(it["generated_tokens"] for it in [details, *details.get("best_of_sequences", ())])
    whole = (inputs if request.return_full_text else "") + (text or "")
    usage = openai_api.usage(int(headers["x-prompt-tokens"]), count)
    return _response(request, engine, whole, details, usage, cut=cut)


def _generate_body(request: GenerateRequest, inputs: str, engine: Engine) -> dict[str, Any]:
    engine.adapter(request.adapter_id, "adapter_id")
    engine.check_length(request.max_tokens)
    return {"inputs": inputs, "parameters": parameters(request, request.max_tokens or DEFAULT_TOKENS)}


def _shorter(request: GenerateRequest, body: dict[str, Any], error: JobError) -> dict[str, Any]:
    """The same for an answer as long as there is room, where the length was the worker's to sample_next_tokens."""
    left = room(error)
    if request.max_tokens is not None or not left:
        raise error
    return {**body, "parameters": {**body["parameters"], "max_new_tokens": left}}


def _response(
    request: GenerateRequest, engine: Engine, text: str, details: dict[str, Any], usage: Usage, *, cut: bool
) -> GenerateResponse:
    short = {name: details[name] for name in ("finish_reason", "generated_tokens", "seed")}
    full = details["finish_reason"] == "length" and not cut
    return GenerateResponse(
        response=text, finish_reason="length" if full else "stop",
        details=details if request.detailed else short, usage=usage, model=engine.name,
        revision=engine.revision,
    )  # fmt: skip


async def stream(
    request: GenerateRequest, engine: Engine
) -> AsyncIterator[GenerateResponse | dict[str, Any]]:
    """Pieces of text, then the response with its text left out."""
    inputs, field = await engine.read(request)
    body = _generate_body(request, inputs, engine)
    stops, cut = StopStrings(request.stop), False
    details: dict[str, Any] = {"prefill": [], "tokens": []}

    async def events() -> AsyncGenerator[list[dict[str, Any]]]:
        try:
            async with aclosing(engine.events("/generate_stream", body, field)) as first:
                async for made in first:
                    yield made
        except JobError as error:
            again = _shorter(request, body, error)
            async with aclosing(engine.events("/generate_stream", again, field)) as second:
                async for made in second:
                    yield made

    def text_of(event: dict[str, Any]) -> str:
        nonlocal cut
        token = event["token"]
        if request.detailed:
            details["tokens"].append(token)
            if request.top_n_tokens:
                details.setdefault("top_tokens", []).append(event.get("top_tokens", []))
        details.update(event["details"] or {})
        if cut:
            return ""
        text, cut = stops.feed("" if token["special"] else token["text"])
        return text if cut or not event["details"] else text + stops.rest()

    async def texts() -> AsyncIterator[str]:
        before = inputs if request.return_full_text else ""
        async with aclosing(events()) as parts:
            async for made in parts:
                yield before + "".join(map(text_of, made))
                before = ""

    async for text in relay(texts(), max_bytes=STREAM_LIMIT - 20):
        yield {"response": text}
    if "finish_reason" not in details:
        raise JobError("The answer broke off. Send the job again.", code="incomplete", type="server_error")
    usage = openai_api.usage(details.pop("input_length"), details["generated_tokens"])
    yield _response(request, engine, "", details, usage, cut=cut)


def prepare_openai(request: OpenAICall, engine: Engine) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """TGI's route, its body, and what the answer has that TGI does not know: the id and the model's name."""
    adapter = engine.adapter(request.model)
    chat = isinstance(request, ChatRequest)
    body = openai_body(request, adapter)
    engine.check_length(body.get("max_tokens"))
    head = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{current_job.get()['id']}",
        "created": int(time.time()),
        "model": adapter or engine.name,
    }
    return "/v1/chat/completions" if chat else "/v1/completions", body, head


def _text_field(request: OpenAICall) -> str:
    return "messages" if isinstance(request, ChatRequest) else "prompt"


def _text_of(choice: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The object that holds a choice's text, and the text's name in it."""
    holder = choice.get("message") or choice.get("delta")
    return (choice, "text") if holder is None else (holder, "content")


async def stream_openai(request: OpenAICall, engine: Engine) -> AsyncIterator[str]:
    path, body, head = prepare_openai(request, engine)
    stops: dict[int, StopStrings] = {}
    cut: set[int] = set()
    calling = False
    used: list[dict[str, int]] = []
    event: dict[str, Any] = {}

    def mended(event: dict[str, Any]) -> str:
        """The event as OpenAI's clients know it; "" where nothing is left of it."""
        nonlocal calling
        if usage := event.pop("usage", None):
            used.append(usage)
        told = ""
        for choice in event["choices"]:
            number = choice["index"]
            holder, key = _text_of(choice)
            calling = calling or "tool_calls" in holder
            text = holder.get(key) or ""
            if choice["finish_reason"] == "eos_token":
                text = ""  # the mark of the end, which TGI gives away in completions
            stop = stops.setdefault(number, StopStrings(request.stop))
            if number in cut:
                text = ""
            elif request.stop:
                text, found = stop.feed(text)
                if found:
                    cut.add(number)
                elif choice["finish_reason"]:
                    text += stop.rest()
            if key in holder:
                holder[key] = text
            mend(choice, cut=number in cut, calling=calling)
            if text or choice["finish_reason"] or choice["logprobs"] or "tool_calls" in holder:
                told += _sse({**event, **head, "choices": [choice]})
        return told

    async with aclosing(engine.events(path, body, _text_field(request))) as parts:
        async for made in parts:
            event = made[-1]
            yield "".join(map(mended, made))
    if request.wants_usage and used:
        usage = {name: sum(it[name] for it in used) for name in used[0]}
        yield _sse({**event, **head, "choices": [], "usage": usage})
    yield openai_api.DONE


def mend(choice: dict[str, Any], *, cut: bool, calling: bool) -> None:
    """The finish_reason as OpenAI's clients know it: TGI has eos_token, stop_sequence and "" too."""
    reason = choice["finish_reason"] or None
    if reason in ("eos_token", "stop_sequence") or (reason and cut):
        reason = "stop"
    choice["finish_reason"] = "tool_calls" if calling and reason == "stop" else reason


def _sse(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"


# ---- start ---------------------------------------------------------------------------------------------


def prepare() -> dict[str, Any]:
    global engine
    settings = read_settings(Settings)
    engine = load(settings)
    serving = handler if settings.streaming else plain_handler
    if settings.prewarm:
        prewarm.run(serving, [{"prompt": "Hello", "max_tokens": 4, "temperature": 0}])
    return start_config(serving, settings)


BASE_HOME = "/data"  # HF_HOME of TGI's image, on the container's disk


def use_volume_for_tgi() -> None:
    """What TGI fetches by itself goes to the volume, where there is one, in spite of BASE_HOME."""
    if os.environ.get("HF_HOME") == BASE_HOME:
        del os.environ["HF_HOME"]
        use_volume()
        os.environ.setdefault("HF_HOME", BASE_HOME)


def main() -> None:
    use_volume_for_tgi()
    config = startup.run(prepare, worker="tgi")
    import runpod

    runpod.serverless.start(config)


if __name__ == "__main__":
    main()
