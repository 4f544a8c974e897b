"""Settings and requests of this worker. Its answers are vLLM's own, untouched."""

from __future__ import annotations

import difflib
import json
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from shared.errors import invalid
from shared.openai import ModelsRequest, OpenAIRequest
from shared.requests import Request, validate
from shared.settings import WorkerSettings


@cache
def engine_table() -> dict[str, Any]:
    """What the pinned vLLM takes: flags, variables and fields; see dump_flags.py."""
    table: dict[str, Any] = json.loads(Path(__file__).with_name("engine.json").read_text())
    return table


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
        None,
        ge=1,
        le=1024,
        description="Jobs that one worker takes at a time; unset: by the size of the KV cache",
    )
    streaming: bool = Field(
        True, description="Answer through a generator, which can stream; false: complete answers only"
    )
    vllm_extra_args: str = Field("", description="More of the command line; wins over everything else")
    vllm_config_file: str | None = Field(None, description="vLLM's YAML file; variables win over it")
    vllm_attention_backend: str | None = Field(
        None, description="Another name of ATTENTION_BACKEND, such as FLASH_ATTN"
    )
    vllm_startup_timeout: float = Field(
        1800, gt=0, description="Seconds until the engine must be ready, or the worker is replaced"
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
        names = self.openai_served_model_name_override or self.served_model_name
        return names.split() if names else [self.model_name]


# ---- the worker's own input ----------------------------------------------------------------------------

_IN_PARTS = "leave it out: a stream's parts have what has come."
# Fields of the official worker's input, and what to send instead.
REMOVED_FIELDS = {
    "apply_chat_template": "send the text as messages, to which the template is always applied: "
    '[{"role": "user", "content": ...}]. A prompt is continued as it is.',
    "max_batch_size": _IN_PARTS,
    "min_batch_size": _IN_PARTS,
    "batch_size_growth_factor": _IN_PARTS,
    "use_openai_format": "leave it out: answers always have OpenAI's form.",
}


class GenerateRequest(Request):
    """Fields beyond these are those of vLLM's chat and completion requests."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())

    messages: list[dict[str, Any]] | None = Field(
        None, min_length=1, description="A conversation in OpenAI's form, for models with a chat template"
    )
    prompt: str | list[str] | list[int] | list[list[int]] | None = Field(
        None, min_length=1, description="A text to continue, instead of `messages`; or token ids, or several"
    )
    model: str | None = Field(None, description="A served name or a LoRA adapter's; unset: the model")
    max_tokens: int | None = Field(
        None, ge=1, description="Most tokens of the answer; unset: 512, or the context length"
    )
    temperature: float = Field(0.7, ge=0, le=2, description="0: greedy decoding")
    top_p: float = Field(
        0.95, gt=0, le=1, description="Sample from the likeliest tokens whose probabilities sum to this"
    )
    top_k: int = Field(
        -1, ge=-1, description="Sample from this many of the likeliest tokens; -1 and 0: from all"
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Above 0: fewer tokens that the answer already has"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="Above 0: fewer tokens that the answer has often"
    )
    stop: str | list[str] | None = Field(None, description="A text, or several, before which the answer ends")
    stream: bool = Field(False, description="Send the answer in parts while it is generated")

    @model_validator(mode="before")
    @classmethod
    def _flatten(cls, data: Any) -> Any:
        """The official worker's form has the sampling parameters in an object of their own."""
        if isinstance(data, dict) and isinstance(data.get("sampling_params"), dict):
            data = {**data, **data["sampling_params"]}
            del data["sampling_params"]
        return data

    @model_validator(mode="after")
    def _check_fields(self) -> GenerateRequest:
        if (self.messages is None) == (self.prompt is None):
            given = "neither is given" if self.prompt is None else "both are given"
            raise invalid("prompt", f"give either messages or prompt; {given}.")
        fields = engine_table()["fields"]
        own, other, other_form = fields["chat"], fields["completion"], "prompt"
        if self.messages is None:
            own, other, other_form = other, own, "messages"
        for name in self.model_extra or {}:
            if name in own:
                continue
            if name in other:
                message = f"goes with {other_form} only."
            elif name in REMOVED_FIELDS:
                message = REMOVED_FIELDS[name]
            elif name.startswith("guided_"):
                key = name.removeprefix("guided_")
                message = f'this vLLM has it as "structured_outputs": {{"{key}": ...}}.'
            else:
                close = difflib.get_close_matches(name, own, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                message = f"unknown field.{hint} The README says where the allowed ones are listed."
            raise invalid(name, message, "unknown_field")
        return self


# ---- vLLM's routes -------------------------------------------------------------------------------------


# What is a client's own data or a JSON schema, where null is a value.
OPAQUE = {
    "parameters", "schema", "json", "input_schema", "arguments", "documents", "metadata",
    "chat_template_kwargs", "mm_processor_kwargs", "media_io_kwargs", "vllm_xargs", "kv_transfer_params",
}  # fmt: skip


def without_nulls(value: Any) -> Any:
    """`value` without its null fields, nested ones too: vLLM refuses null for some that may be left out.

    Clients that dump their models send null for every field that is not set.
    """
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    tool_use = value.get("type") == "tool_use"  # Anthropic's, whose `input` is the tool's arguments
    return {
        name: item if name in OPAQUE or (tool_use and name == "input") else without_nulls(item)
        for name, item in value.items()
        if item is not None
    }


class Call(OpenAIRequest):
    """The body of a route: what vLLM takes there."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())
    path: ClassVar[str]

    stream: bool | None = Field(None, description="Send the answer in parts while it is generated")

    @property
    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = without_nulls(self.model_dump(exclude_unset=True))
        return body


# What vLLM requires there, and the field's kind.
_REQUIRED: dict[str, dict[str, Any]] = {
    "completions": {"prompt": {}},
    "embeddings": {"input": {}},
    "responses": {"input": {}},
    "messages": {
        "messages": {"type": "array"},
        "model": {"type": "string"},
        "max_tokens": {"type": "integer"},
    },
    "count_tokens": {"messages": {"type": "array"}, "model": {"type": "string"}},
    "rerank": {"query": {}, "documents": {}},
    "detokenize": {"tokens": {"type": "array", "items": {"type": "integer"}}},
}


def _call(path: str) -> type[Call]:
    """The model of a route. Its JSON schema has the names of vLLM's fields."""
    chat = path == "/v1/chat/completions"
    required = {"messages": {"type": "array"}} if chat else _REQUIRED.get(path.rpartition("/")[2], {})
    names = engine_table()["fields"]["chat" if chat else "completion"] if "completions" in path else []

    def describe(schema: dict[str, Any]) -> None:
        schema["properties"] = {**{name: {} for name in names}, **required, **schema["properties"]}
        if required:
            schema["required"] = [*required]

    model = create_model(
        "Call" + path.title().replace("/", ""),
        __base__=Call,
        __doc__=f"The body of POST {path}, which vLLM checks.",
    )
    model.model_config["json_schema_extra"] = describe
    model.path = path
    return model


# What a job may reach of the engine: a path is never made from a job's text.
ROUTES: dict[str, type[BaseModel]] = {
    **{
        path: _call(path)
        for path in (
            "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages",
            "/v1/messages/count_tokens", "/v1/rerank", "/v1/score", "/tokenize", "/detokenize", "/rerank",
            "/score",
        )
    },
    "/v1/models": ModelsRequest,
    # vLLM has these without /v1, which an OpenAI client cannot leave out.
    "/v1/tokenize": _call("/tokenize"),
    "/v1/detokenize": _call("/detokenize"),
}  # fmt: skip


class RouteRequest(Request):
    """The official worker's form of one of ROUTES."""

    route: str = Field(description="One of these routes")
    body: dict[str, Any] | None = Field(None, description="What vLLM takes there")
    method: str | None = Field(None, description="The route's own method, which may be left out")

    @property
    def call(self) -> Call | ModelsRequest:
        """Raises JobError for a route that is not served, and for a method that is not the route's."""
        path = self.route.partition("?")[0].rstrip("/")
        model = ROUTES.get(path)
        if model is None:
            message = f"{self.route[:60]!r} is not served here. Use {', '.join(ROUTES)}."
            raise invalid("route", message, "unknown_route")
        method = "GET" if model is ModelsRequest else "POST"
        if self.method and self.method.upper() != method:
            raise invalid("method", f"{path} takes {method}.")
        call = validate(model, self.body or {})
        assert isinstance(call, Call | ModelsRequest)
        return call

    @property
    def stream(self) -> bool:
        return bool(getattr(self.call, "stream", False))
