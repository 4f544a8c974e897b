"""Text from any causal language model that transformers loads, many answers at a time.

Request:  {"input": {"messages": [{"role": "user", "content": "Name three rivers."}], "max_tokens": 200}}
          or {"input": {"prompt": "Three rivers:"}}
Response: {"response": "The Rhine, the Nile and the Volga.", "finish_reason": "stop",
           "usage": {"prompt_tokens": 24, "completion_tokens": 13, "total_tokens": 37},
           "model": "Qwen/Qwen2.5-7B-Instruct", "revision": "a09a354..."}

With "stream": true the answer comes in pieces, {"response": "The"}, ..., and ends with the object above,
whose `response` is then empty.

OpenAI:   /v1/chat/completions and /v1/completions, streamed and plain, and /v1/models, as {"openai_route":
          ..., "openai_input": ...} or through the endpoint's own /openai/v1 address.

Answers that are made at the same time share the model's steps, and a new job joins them at the next token. A
worker that streams is a generator, so RunPod gives a plain job's answer as a list of one; with
STREAMING=false it is the object itself.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import re
import time
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from shared import openai_api, prewarm, startup
from shared.errors import JobError, StartError
from shared.generation import Logprob, Generator, Piece, SamplingParams, cache_budget, input_device
from shared.hardware import pick_device
from shared.jobs import Request, current_job, is_out_of_memory, job_handler, refuse_stream, start_config
from shared.openai_api import (
    ChatCompletion,
    ChatCompletionRequest,
    ChoiceLogprobs,
    ModelList,
    ModelsRequest,
    OpenAIRequest,
    Stop,
    StreamOptions,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from shared.settings import DType, WorkerSettings, read_settings
from shared.streaming import coalesce
from shared.volume import ModelPath

DEFAULT_TOKENS = 512
MAX_ROWS = 128  # answers of one job
MAX_BEAMS = 16
MAX_CHARACTERS = 4_000_000


# ---- settings ------------------------------------------------------------------------------------------


def adapter_sources(lora: str | None) -> dict[str, tuple[str, str | None]]:
    """The repository or folder and the revision of each adapter that LORA names."""
    named = (pair.strip().partition("=") for pair in (lora or "").split(",") if pair.strip())
    sources = {name.strip(): source.strip() for name, _, source in named}
    return {
        name: (source, None) if source.startswith(("/", ".", "~")) else _at_revision(source)
        for name, source in sources.items()
    }


def _at_revision(source: str) -> tuple[str, str | None]:
    repository, _, revision = source.partition("@")
    return repository, revision or None


def _check_adapters(lora: str | None) -> str | None:
    sources = adapter_sources(lora)
    pairs = [pair for pair in (lora or "").split(",") if pair.strip()]
    if len({name.casefold() for name in sources}) < len(pairs):
        raise ValueError("two adapters have the same name")
    if not all(name and source for name, (source, _) in sources.items()):
        raise ValueError("each adapter is name=repository or name=folder, with commas between them")
    return lora


class Settings(WorkerSettings):
    model_name: str = Field(
        "Qwen/Qwen2.5-7B-Instruct", description="Model id on the Hugging Face Hub, or a folder"
    )
    streaming: bool = Field(
        True, description="Answer through a generator, which can stream; false: plain answers only"
    )
    torch_dtype: DType | None = Field(None, description="Another name of DTYPE, used where that is auto")
    device_map: str | None = Field(
        None, pattern=r"^(auto|balanced|balanced_low_0|sequential)$",
        description="auto: spread the model over all GPUs; unset: one device, DEVICE",
    )  # fmt: skip
    quantization: Literal["bitsandbytes-8bit", "bitsandbytes-4bit", "awq", "gptq"] | None = Field(
        None, description="bitsandbytes: quantise on load; awq and gptq: the checkpoint has to be made so"
    )
    lora: Annotated[str | None, AfterValidator(_check_adapters)] = Field(
        None,
        description="LoRA adapters of peft, as name=repository, name=repository@revision or name=folder, "
        "with commas between",
    )
    attn_implementation: str | None = Field(
        None,
        pattern=r"^[\w|/@.-]+$",
        description="Attention of transformers, such as sdpa; unset: its choice",
    )
    max_model_len: int | None = Field(
        None, ge=16, description="Most tokens of a prompt and its answer; unset: the model's own limit"
    )
    max_batch_size: int = Field(64, ge=1, le=1024, description="Most answers that are made at the same time")
    max_batch_tokens: int | None = Field(
        None, ge=16, description="Most tokens in their cache; unset: what the GPU's free memory holds"
    )
    gpu_memory_utilization: float = Field(
        0.7, gt=0, le=0.95, description="Share of the memory free after loading that the cache may take"
    )


# ---- requests and responses ----------------------------------------------------------------------------


def _as_text(value: Any) -> Any:
    """OpenAI's list of text parts is their text."""
    if not isinstance(value, list):
        return value
    for number, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f'part {number} must be {{"type": "text", "text": ...}}: this worker reads text only'
            )
    return "".join(part["text"] for part in value)


class Message(OpenAIRequest):
    """A turn of a conversation. Fields beyond these reach the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(description="Whose it is")
    content: Annotated[str | None, BeforeValidator(_as_text)] = Field(None, description="Its text")
    tool_calls: list[dict[str, Any]] | None = Field(None, description="Tools that the assistant called")

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: with text, and the arguments of tool calls as objects."""
        turn = {"role": self.role, "content": self.content or "", **(self.model_extra or {})}
        if self.tool_calls:
            turn["tool_calls"] = [_with_arguments(call) for call in self.tool_calls]
        return turn


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except ValueError:
        return call


Messages = Annotated[list[Message], Field(min_length=1)]
Tools = list[dict[str, Any]]
Tokens = Annotated[int, Field(ge=1, le=1_000_000)]


class GenerateRequest(Request):
    messages: Messages | None = Field(None, description="A conversation, for models with a chat template")
    prompt: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_CHARACTERS,
        description="A text to go on from, instead of `messages`",
    )
    max_tokens: Tokens | None = Field(
        None, description="Most tokens of the answer; unset: 512, or what there is room for"
    )
    temperature: float = Field(0.7, ge=0, le=2, description="0: always the likeliest token")
    top_p: float = Field(0.95, gt=0, le=1, description="Draw from the likeliest tokens with this sum")
    top_k: int = Field(
        50, ge=0, le=1_000_000, description="Draw from this many of the likeliest; 0: from all"
    )
    min_p: float = Field(
        0.0, ge=0, le=1, description="Leave out tokens below this share of the likeliest's chance"
    )
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=10, description="Above 1: less of what the text has already; unset: the model's own"
    )
    num_beams: int = Field(
        1, ge=1, le=MAX_BEAMS, description="Above 1: no drawing, but the best answer of so wide a beam search"
    )
    seed: int | None = Field(
        None, description="The same seed gives the same answer; unset: another each time"
    )
    stop: Stop = Field(default=[], description="A text, or up to four, before which the answer ends")
    n: int = Field(1, ge=1, le=MAX_ROWS, description="Answers to make; with more than one see `choices`")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=20,
        description="Tell each token's log probability, and as many of the likeliest beside it",
    )
    tools: Tools = Field(default=[], description="Tools in OpenAI's form, for the model's chat template")
    chat_template_kwargs: dict[str, Any] = Field(
        default={}, description="Variables of the model's chat template, such as `enable_thinking`"
    )
    lora: str | None = Field(None, description="One of the adapters that LORA names; unset: none")
    stream: bool = Field(False, description="Send the answer in pieces as it is made")

    @model_validator(mode="after")
    def _fits_together(self) -> GenerateRequest:
        if (self.messages is None) == (self.prompt is None):
            given = "neither of them is there" if self.prompt is None else "both are there"
            raise _wrong("prompt", "invalid_value", f"give either messages or prompt; {given}.")
        for name in ("tools", "chat_template_kwargs"):
            if self.messages is None and getattr(self, name):
                raise _wrong(name, "invalid_value", "goes with messages only.")
        return self


def _missing(value: object) -> bool:
    return value is None


class Choice(BaseModel):
    response: str = Field(description="The answer")
    finish_reason: str = Field(description="`stop` or `length`")
    logprobs: list[TokenLogprob] | None = Field(exclude_if=_missing, description="Where asked for")


class GenerateResponse(BaseModel):
    response: str = Field(description="The answer, without the prompt; the first of them with `n`")
    finish_reason: str = Field(
        description="`stop`: it was at its end or a stop text; `length`: at `max_tokens`"
    )
    usage: Usage
    model: str = Field(description="The model, as MODEL_NAME gives it")
    revision: str | None = Field(description="Its commit, where known")
    lora: str | None = Field(None, exclude_if=_missing, description="The adapter, where one was asked for")
    logprobs: list[TokenLogprob] | None = Field(
        None,
        exclude_if=_missing,
        description="Where asked for: each token, its log probability and the likeliest beside it",
    )
    choices: list[Choice] | None = Field(
        None, exclude_if=_missing, description="All answers, where `n` asks for more than one"
    )


class ChatRequest(ChatCompletionRequest):
    """The body of POST /v1/chat/completions: OpenAI's, and what samplers of open models have."""

    messages: Messages = Field(description="The conversation so far")  # type: ignore[assignment]
    n: int | None = Field(None, ge=1, le=MAX_ROWS, description="Answers to make")
    logprobs: bool | None = Field(None, description="Tell each token's log probability")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="And those of the likeliest beside it")
    tools: Tools | None = Field(None, description="For the model's chat template")
    tool_choice: Literal["auto", "none"] | None = Field(
        None, description="none: the template gets no tools. A call cannot be forced"
    )
    top_k: int | None = Field(None, ge=0, le=1_000_000, description="Draw from this many of the likeliest")
    min_p: float | None = Field(None, ge=0, le=1, description="Least share of the likeliest's chance")
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, description="Unset: the model's own")
    num_beams: int | None = Field(None, ge=1, le=MAX_BEAMS, description="Width of a beam search; 1: none")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template")


def _as_prompts(value: Any) -> Any:
    """OpenAI takes a text, a list of texts, one array of token ids, or a list of such arrays."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(t) is int for t in value)):
        return [value]
    if not isinstance(value, list) or not any(all(type(it) is kind for it in value) for kind in (str, list)):
        raise ValueError("must be a text, a list of texts, an array of token ids or a list of such arrays")
    return value


class CompletionRequest(OpenAIRequest):
    """The body of POST /v1/completions."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_as_prompts)] = Field(
        min_length=1, max_length=MAX_ROWS, description="One or several, as texts or the model's own token ids"
    )
    model: str | None = Field(None, description="The served model's name")
    max_tokens: Tokens | None = Field(None, description="The most tokens of each answer; unset: 512")
    temperature: float | None = Field(None, ge=0, le=2, description="0: always the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1, description="Draw from the likeliest tokens of this sum")
    top_k: int | None = Field(None, ge=0, le=1_000_000, description="Draw from this many of the likeliest")
    min_p: float | None = Field(None, ge=0, le=1, description="Least share of the likeliest's chance")
    repetition_penalty: float | None = Field(None, ge=0.01, le=10, description="Unset: the model's own")
    num_beams: int | None = Field(None, ge=1, le=MAX_BEAMS, description="Width of a beam search; 1: none")
    seed: int | None = Field(None, description="The same seed gives the same answer")
    stop: Stop = Field(default=[], description="The answer ends before the first of these, at most four")
    n: int | None = Field(None, ge=1, le=MAX_ROWS, description="Answers to each prompt")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Tell log probabilities, and of this many more"
    )
    stream: bool | None = Field(None, description="Send the answer in pieces")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`")


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(BaseModel):
    """An answer of /v1/completions, and each chunk of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


Asked = GenerateRequest | ChatRequest | CompletionRequest | ModelsRequest
Making = GenerateRequest | ChatRequest | CompletionRequest
Answer = GenerateResponse | ChatCompletion | Completion | ModelList
ROUTES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/models": ModelsRequest,
}


def _wrong(param: str, code: str, message: str) -> JobError:
    return JobError(f"{param}: {message}", param=param, code=code)


def sampling_of(request: Making) -> SamplingParams:
    """The request's sampling, but for `max_tokens`. OpenAI's routes have OpenAI's defaults."""
    if isinstance(request, GenerateRequest):
        temperature, top_p, logprobs = request.temperature, request.top_p, request.logprobs
    else:
        temperature = 1.0 if request.temperature is None else request.temperature
        top_p = request.top_p or 1.0
        if isinstance(request, ChatRequest):
            logprobs = (request.top_logprobs or 0) if request.logprobs else None
        else:
            logprobs = request.logprobs
    return SamplingParams(
        0,
        temperature,
        top_p,
        request.seed,
        tuple(request.stop),
        request.top_k or 0,
        request.min_p or 0.0,
        request.repetition_penalty,
        logprobs,
        request.num_beams or 1,
    )


def _refuse_unserved(request: ChatRequest | CompletionRequest) -> None:
    openai_api.refuse_unserved(
        request, functions=[], response_format={"type": "text"}, presence_penalty=0, frequency_penalty=0,
        logit_bias={}, modalities=["text"], audio=None, echo=False, best_of=1, suffix="",
    )  # fmt: skip


# ---- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    generator: Generator
    tokenizer: Any
    name: str
    served: tuple[str, ...]
    revision: str | None
    adapters: tuple[str, ...] = ()
    # One thread: a fast tokenizer must not be used by two at a time.
    reader: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
    )

    async def read(self, request: Making) -> list[list[int]]:
        """The token ids of the request's prompts. Raises JobError for what the model cannot read."""
        prompts = await asyncio.get_running_loop().run_in_executor(self.reader, self._read, request)
        known = self.generator.model.get_input_embeddings().weight.shape[0]
        for ids in prompts:
            if not ids:
                raise _wrong("prompt", "empty", "it has no tokens. Send some text.")
            if not 0 <= min(ids) <= max(ids) < known:
                raise _wrong("prompt", "invalid_value", f"token ids go from 0 to {known - 1}.")
        return prompts

    def _read(self, request: Making) -> list[list[int]]:
        if isinstance(request, CompletionRequest):
            prompts: Sequence[str | list[int]] = request.prompt
        elif request.messages is not None:
            return [self._read_messages(request)]
        else:
            assert isinstance(request, GenerateRequest)
            prompts = [request.prompt or ""]
        return [self.tokenizer(it)["input_ids"] if isinstance(it, str) else it for it in prompts]

    def _read_messages(self, request: GenerateRequest | ChatRequest) -> list[int]:
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise _wrong(
                "messages", "no_chat_template",
                f"{self.name} has no chat template, so it cannot read a conversation. Send prompt, or serve "
                "a model that is made for chat.",
            )  # fmt: skip
        variables = request.chat_template_kwargs or {}
        given = {"messages", *inspect.signature(self.tokenizer.apply_chat_template).parameters}
        taken = given & variables.keys()
        if taken:
            raise _wrong("chat_template_kwargs", "invalid_value", f"{min(taken)!r} is not the template's.")
        turns = [message.for_template() for message in request.messages or []]
        tools = None if getattr(request, "tool_choice", None) == "none" else request.tools or None
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                turns, tools=tools, add_generation_prompt=True, tokenize=True,
                return_dict=False, **variables,
            )  # fmt: skip
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise _wrong(
                "messages", "bad_prompt", f"the model's chat template refuses them: {cause}"
            ) from None
        return ids

    def adapter(self, request: Making) -> str | None:
        """The adapter that the request names: natively as `lora`, on OpenAI's routes as `model`."""
        named = {name.casefold(): name for name in self.adapters}
        if not isinstance(request, GenerateRequest):
            openai_api.check_model(request.model, *self.served, *self.adapters)
            return named.get((request.model or "").casefold())
        if request.lora is not None and request.lora.casefold() not in named:
            known = f"Use {', '.join(self.adapters)}." if named else "LORA names none."
            raise _wrong("lora", "lora_not_found", f"{request.lora!r} is not served here. {known}")
        return named.get((request.lora or "").casefold())

    def text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))

    def logprobs(self, chances: Sequence[Logprob]) -> list[TokenLogprob]:
        return [
            TokenLogprob(
                **_logprob(self.text(it.token), it.logprob),
                top_logprobs=[TopLogprob(**_logprob(self.text(token), chance)) for token, chance in it.top],
            )
            for it in chances
        ]


def _logprob(token: str, logprob: float) -> dict[str, Any]:
    # JSON has no minus infinity, and a part of a character has no bytes that could be told.
    known = None if "\ufffd" in token else list(token.encode())
    return {"token": token, "logprob": max(logprob, -9999.0), "bytes": known}


def resolve_adapters(settings: Settings) -> dict[str, ModelPath]:
    """The folder of each adapter that LORA names."""
    found = {}
    for name, (source, revision) in adapter_sources(settings.lora).items():
        if name.casefold() in {served.casefold() for served in (settings.public_name, settings.model_name)}:
            raise StartError(f"LORA: {name} is the model's own name. Choose another.", code="bad_setting")
        try:
            found[name] = prewarm.resolve(settings.model_copy(update={"model_revision": revision}), source)
        except StartError as cause:
            message = cause.message.removeprefix("MODEL_NAME=")
            raise StartError(f"LORA, {name}: {message}", code=cause.code) from None
    return found


def load_adapters(model: Any, adapters: Mapping[str, ModelPath]) -> Callable[[list[str | None]], None]:
    """Put the adapters beside the model's weights, unmerged; returns `mix_adapters`' function."""
    from peft import PeftConfig, PeftType

    inside = {name: f"lora_{number}" for number, name in enumerate(adapters)}  # theirs may not have a dot
    for name, found in adapters.items():

        def refuse(cause: str) -> StartError:
            return StartError(f"LORA, {name}: {cause}", code="bad_adapter")  # noqa: B023

        try:
            config = PeftConfig.from_pretrained(str(found.path))
            if config.peft_type != PeftType.LORA:
                raise refuse(f"it is of the kind {config.peft_type}, and this worker runs LoRA.")
            alone = (
                "use_dora", "alora_invocation_tokens", "trainable_token_indices", "layer_replication",
                "target_parameters",
            )  # fmt: skip
            if config.bias != "none" or any(getattr(config, kind, None) for kind in alone):
                raise refuse(
                    "with DoRA, aLoRA, biases, tokens, layers or parameters of its own an adapter cannot run "
                    "beside others. Merge it into its model, and serve that."
                )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are wanted
                info = model.load_adapter(str(found.path), adapter_name=inside[name])
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            if is_out_of_memory(error):
                raise
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise refuse(f"it does not go into this {type(model).__name__}: {cause}") from None
        own = {key for key in info.missing_keys if f".{inside[name]}." in f"{key}."}
        if key := min(own | set(info.unexpected_keys), default=None):
            raise refuse(f"it was made for another model: {key} is not in both.")
    return mix_adapters(model, inside)


def mix_adapters(model: Any, inside: Mapping[str, str]) -> Callable[[list[str | None]], None]:
    """Let each row of a batch have its own adapter, or none: the function takes their names before a step.

    inside: the adapters' names in the model. peft has this for every kind of layer, at 0.1 ms a layer and
    step: more than all the rest takes. Plain layers, which are nearly all, are done here in a third of that.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper
    from torch.nn.functional import linear

    names: list[str] = []  # of each row
    groups: list[tuple[str, torch.Tensor | None]] = []  # each adapter's rows; None: all

    def per_row(length: int) -> int:
        """How many of the `length` lines that a layer sees are one row's: OPT's see a line for each token."""
        each, rest = divmod(length, len(names))
        if rest:
            raise RuntimeError("A layer of this model does not see whole rows: its adapters cannot be mixed.")
        return each

    def lines(rows: torch.Tensor, each: int) -> torch.Tensor:
        if each == 1:
            return rows
        return (rows[:, None] * each + torch.arange(each, device=rows.device)).flatten()

    def add_plain(layer: Any) -> Callable[..., torch.Tensor]:
        weights = {
            name: (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
            for name in layer.lora_A
        }

        def forward(x: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
            result: torch.Tensor = layer.base_layer(x, *args, **more)
            for name, rows in groups:
                if name not in weights:
                    continue
                down, up, scaling = weights[name]
                here = None if rows is None else lines(rows.to(x.device), per_row(len(x)))
                mine = x if here is None else x[here]
                change = (linear(linear(mine.to(down.dtype), down), up) * scaling).to(result.dtype)
                result = result + change if here is None else result.index_add(0, here, change)
            return result

        return forward

    def give_names(module: Any, args: Any, more: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        each = per_row(len(args[0])) if args and names else 1
        known = [name for name in names for _ in range(each)]
        if isinstance(module, ModulesToSaveWrapper):  # which, unlike the others, fails at what it has not
            known = [name if name in module.modules_to_save else "__base__" for name in known]
        return args, {**more, "adapter_names": known}

    layers: tuple[type[Any], ...] = (LoraLayer, ModulesToSaveWrapper)
    for module in model.modules():
        if not isinstance(module, layers):
            continue
        if isinstance(module, ModulesToSaveWrapper):  # and does nothing if another adapter is the active one
            module.set_adapter(next(iter(module.modules_to_save)), inference_mode=True)
        parts: list[Any] = [*getattr(module, "lora_A", {}).values(), *getattr(module, "lora_B", {}).values()]
        plain = parts and all(type(part) is torch.nn.Linear and part.bias is None for part in parts)
        moved = any(hasattr(part, "_hf_hook") for part in (module, *parts))
        if plain and not moved and not module.lora_variant:
            module.forward = add_plain(module)
        else:
            module.register_forward_pre_hook(give_names, with_kwargs=True)

    def use(rows: list[str | None]) -> None:
        now = ["__base__" if name is None else inside[name] for name in rows]
        if now != names:
            names[:] = now
            where = {name: [i for i, its in enumerate(now) if its == name] for name in {*now} - {"__base__"}}
            groups[:] = [
                (name, None if len(its) == len(now) else torch.tensor(its, device=device))
                for name, its in where.items()
            ]

    device = input_device(model)
    return use


def quantization(settings: Settings, config: Any, dtype: Any) -> dict[str, Any]:
    """What `from_pretrained` is told for QUANTIZATION; of a quantised checkpoint it knows by itself."""
    made = getattr(config, "quantization_config", None) or {}
    method = made.get("quant_method") if isinstance(made, dict) else made.quant_method
    asked = settings.quantization
    if asked in (None, method):
        return {}
    if method is not None:
        raise StartError(
            f"QUANTIZATION={asked}: {settings.model_name} is quantised already, with {method}. "
            "Leave QUANTIZATION out.",
            code="bad_setting",
        )
    if asked in ("awq", "gptq"):
        raise StartError(
            f"QUANTIZATION={asked}: {settings.model_name} is not quantised. Use a checkpoint that was made "
            f"with {asked}, or bitsandbytes-4bit, which quantises any.",
            code="bad_setting",
        )
    # It says at every product that it casts to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    from transformers import BitsAndBytesConfig

    if asked == "bitsandbytes-8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    return {"quantization_config": four}


def _load_problem(error: Exception, settings: Settings) -> Exception:
    """A cause that a new try cannot mend as StartError; any other `error` as it is."""
    said = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    if re.search(r"No GPU found|GPU is required|requires an? .*GPU", said):  # transformers' quantisers
        return StartError(f"{said} Use an endpoint with a GPU, or another model.", code="no_gpu")
    if isinstance(error, ImportError):
        return StartError(
            f"{said} It is not in this image: add it to the worker's requirements.in and build anew, or "
            "sample_next_tokens another model or setting.",
            code="missing_package",
        )
    if "attn_implementation" in said:
        return StartError(f"ATTN_IMPLEMENTATION={settings.attn_implementation}: {said}", code="bad_setting")
    return error


def load(settings: Settings) -> Engine:
    found = prewarm.resolve(settings, settings.model_name)
    adapters = resolve_adapters(settings)
    with prewarm.phase("import"):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    with prewarm.phase("load") as phase:
        if settings.dtype == "auto" and settings.torch_dtype is not None:
            settings = settings.model_copy(update={"dtype": settings.torch_dtype})
        device, dtype = pick_device(settings)
        trust: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code, "local_files_only": True}
        config: Any = AutoConfig.from_pretrained(found.path, **trust)
        if getattr(config, "is_encoder_decoder", False):
            raise StartError(
                f"{settings.model_name} is an encoder-decoder, and this worker runs decoders. Use a causal "
                "language model.",
                code="unsupported_architecture",
            )
        quantized = quantization(settings, config, dtype)
        # What is quantised cannot be moved later.
        made = quantized or getattr(config, "quantization_config", None)
        device_map: Any = settings.device_map or ({"": str(device)} if made else None)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                found.path, config=config, dtype=dtype, device_map=device_map,
                attn_implementation=settings.attn_implementation, **quantized, **trust,
            )  # fmt: skip
        except (ImportError, ValueError, RuntimeError) as error:
            raise _load_problem(error, settings) from error
        if device_map is None:
            model = model.to(device)
        tokenizer = AutoTokenizer.from_pretrained(found.path, **trust)
        use_adapters = load_adapters(model, adapters) if adapters else None
        model.eval()
        phase.bytes = sum(weight.nbytes for weight in model.parameters())
    generator = Generator(
        model,
        tokenizer,
        max_rows=settings.max_batch_size,
        budget=settings.max_batch_tokens or cache_budget(model, settings.gpu_memory_utilization),
        max_length=settings.max_model_len,
        use_adapters=use_adapters,
    )
    served = (settings.public_name, settings.model_name)
    return Engine(generator, tokenizer, settings.public_name, served, found.revision, tuple(adapters))


engine: Engine


# ---- handle --------------------------------------------------------------------------------------------


@job_handler(GenerateRequest, routes=ROUTES)
async def handler(request: Asked) -> AsyncIterator[Answer | dict[str, Any] | str]:
    if isinstance(request, ModelsRequest) or not request.stream:
        yield await answer(request, engine)
    elif isinstance(request, GenerateRequest):
        async for part in stream(request, engine):
            yield part
    else:
        async for events in coalesce(stream_openai(request, engine)):
            yield events


@job_handler(GenerateRequest, routes=ROUTES)
async def plain_handler(request: Asked) -> Answer:
    """The handler where STREAMING is false."""
    refuse_stream(request)
    return await answer(request, engine)


@dataclass(frozen=True)
class Plan:
    """What a request asks of the engine: a row for each answer, those to one prompt in succession."""

    prompt_tokens: int
    rows: list[tuple[dict[str, Any], SamplingParams]]
    adapter: str | None

    def streams(self, engine: Engine, *, each: bool) -> list[AsyncGenerator[Piece]]:
        return [
            engine.generator.stream(inputs, sampling, each=each, adapter=self.adapter)
            for inputs, sampling in self.rows
        ]


async def plan(request: Making, engine: Engine) -> Plan:
    """Raises JobError for what does not fit: the model, the length, the fields."""
    import torch

    max_tokens, adapter = request.max_tokens, engine.adapter(request)
    if not isinstance(request, GenerateRequest):
        _refuse_unserved(request)
    if isinstance(request, ChatRequest):
        max_tokens = request.max_completion_tokens or max_tokens
    prompts, count = await engine.read(request), request.n or 1
    if len(prompts) * count > MAX_ROWS:
        raise _wrong(
            "n", "invalid_value", f"{len(prompts)} prompts by {count} answers are more than {MAX_ROWS}."
        )
    param = "prompt" if getattr(request, "messages", None) is None else "messages"
    asked, rows = sampling_of(request), []
    for name, there in (("n", count > 1), ("logprobs", asked.logprobs is not None)):
        if there and asked.beams > 1:
            raise _wrong(name, "invalid_value", "not with num_beams above 1. Leave out one of them.")
    for ids in prompts:
        room = engine.generator.fit(len(ids), max_tokens, default=DEFAULT_TOKENS, param=param)
        tensor = torch.tensor([ids])
        inputs = {"input_ids": tensor, "attention_mask": torch.ones_like(tensor)}
        for number in range(count):
            seed = None if asked.seed is None else asked.seed + number
            rows.append((inputs, replace(asked, max_tokens=room, seed=seed)))
    return Plan(sum(map(len, prompts)), rows, adapter)


async def _last(pieces: AsyncGenerator[Piece]) -> Piece:
    async with aclosing(pieces):
        return await anext(pieces)


async def answer(request: Asked, engine: Engine) -> Answer:
    if isinstance(request, ModelsRequest):
        return openai_api.model_list(engine.name, *engine.adapters)
    planned = await plan(request, engine)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_last(it)) for it in planned.streams(engine, each=False)]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    pieces = [task.result() for task in tasks]
    usage = openai_api.usage(planned.prompt_tokens, sum(piece.tokens for piece in pieces))
    if isinstance(request, GenerateRequest):
        return _response(request, pieces, usage, engine)
    head = _head(request, engine)
    if isinstance(request, CompletionRequest):
        made = [
            CompletionChoice(
                index=number, text=it.text, finish_reason=it.finish_reason,
                logprobs=None if request.logprobs is None else _completion_logprobs(it.chances, 0, engine),
            )
            for number, it in enumerate(pieces)
        ]  # fmt: skip
        return Completion(**head, choices=made, usage=usage)
    choices = [
        openai_api.ChatChoice(
            index=number,
            message=openai_api.AnswerMessage(content=it.text),
            finish_reason=it.finish_reason or "stop",
            logprobs=ChoiceLogprobs(content=engine.logprobs(it.chances)) if request.logprobs else None,
        )
        for number, it in enumerate(pieces)
    ]
    return ChatCompletion(**head, choices=choices, usage=usage)


def _head(request: Making, engine: Engine) -> dict[str, Any]:
    kind = "cmpl" if isinstance(request, CompletionRequest) else "chatcmpl"
    model = engine.adapter(request) or engine.name
    return {"id": f"{kind}-{current_job.get()['id']}", "created": int(time.time()), "model": model}


def _response(
    request: GenerateRequest, pieces: Sequence[Piece], usage: Usage, engine: Engine
) -> GenerateResponse:
    choices = [
        Choice(
            response=it.text,
            finish_reason=it.finish_reason or "stop",
            logprobs=None if request.logprobs is None else engine.logprobs(it.chances),
        )
        for it in pieces
    ]
    first = choices[0]
    return GenerateResponse(
        response=first.response, finish_reason=first.finish_reason, usage=usage, model=engine.name,
        revision=engine.revision, lora=engine.adapter(request), logprobs=first.logprobs,
        choices=choices if len(choices) > 1 else None,
    )  # fmt: skip


def _completion_logprobs(chances: Sequence[Logprob], start: int, engine: Engine) -> CompletionLogprobs:
    told = engine.logprobs(chances)
    offsets = [start]
    for it in told[:-1]:
        offsets.append(offsets[-1] + len(it.token))
    return CompletionLogprobs(
        tokens=[it.token for it in told],
        token_logprobs=[it.logprob for it in told],
        top_logprobs=[{top.token: top.logprob for top in it.top_logprobs} for it in told],
        text_offset=offsets[: len(told)],
    )


async def together(streams: Sequence[AsyncGenerator[Piece]]) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of all streams as they come, each with its stream's number; closes them with itself."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    arrived: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

    async def read(number: int, pieces: AsyncGenerator[Piece]) -> None:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    arrived.put_nowait((number, piece))
        except Exception as error:
            arrived.put_nowait((number, error))

    tasks = [asyncio.create_task(read(number, pieces)) for number, pieces in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            number, came = await arrived.get()
            if isinstance(came, Exception):
                raise came
            left -= came.finish_reason is not None
            yield number, came
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def stream(
    request: GenerateRequest, engine: Engine
) -> AsyncIterator[GenerateResponse | dict[str, Any]]:
    """Pieces of text, then the response with its texts left out. With `n`, each piece has its `index`."""
    planned = await plan(request, engine)
    last = [Piece("", 0)] * len(planned.rows)

    async def lines() -> AsyncIterator[str]:
        async with aclosing(together(planned.streams(engine, each=True))) as pieces:
            async for number, piece in pieces:
                last[number] = replace(piece, text="", chances=last[number].chances + piece.chances)
                if piece.text:
                    yield json.dumps([number, piece.text]) + "\n"

    async for block in coalesce(lines()):
        texts: dict[int, str] = {}
        for line in block.splitlines():
            number, text = json.loads(line)
            texts[number] = texts.get(number, "") + text
        for number, text in texts.items():
            yield {"response": text} if len(last) == 1 else {"index": number, "response": text}
    usage = openai_api.usage(planned.prompt_tokens, sum(piece.tokens for piece in last))
    yield _response(request, last, usage, engine)


async def stream_openai(request: ChatRequest | CompletionRequest, engine: Engine) -> AsyncIterator[str]:
    planned = await plan(request, engine)
    head = _head(request, engine)
    count = len(planned.rows)
    tokens, offsets, begun = [0] * count, [0] * count, [False] * count

    def event(number: int, text: str, chances: Sequence[Logprob], end: str | None = None) -> str:
        if isinstance(request, CompletionRequest):
            told = (
                None if request.logprobs is None else _completion_logprobs(chances, offsets[number], engine)
            )
            made = CompletionChoice(index=number, text=text, logprobs=told, finish_reason=end)
            return openai_api.sse(Completion(**head, choices=[made]))
        delta = openai_api.Delta(role=None if begun[number] else "assistant", content=text)
        if end:
            delta = openai_api.Delta()
        logprobs = ChoiceLogprobs(content=engine.logprobs(chances)) if request.logprobs and chances else None
        choice = openai_api.ChunkChoice(index=number, delta=delta, logprobs=logprobs, finish_reason=end)
        return openai_api.sse(openai_api.ChatCompletionChunk(**head, choices=[choice]))

    async with aclosing(together(planned.streams(engine, each=True))) as pieces:
        async for number, piece in pieces:
            if piece.text or piece.chances or not begun[number]:
                yield event(number, piece.text, piece.chances)
                begun[number] = True
                offsets[number] += len(piece.text)
            if piece.finish_reason:
                yield event(number, "", (), piece.finish_reason)
            tokens[number] = piece.tokens
    if request.stream_options is not None and request.stream_options.include_usage:
        usage = openai_api.usage(planned.prompt_tokens, sum(tokens))
        kind = Completion if isinstance(request, CompletionRequest) else openai_api.ChatCompletionChunk
        yield openai_api.sse(kind(**head, choices=[], usage=usage))
    yield openai_api.DONE


# ---- start ---------------------------------------------------------------------------------------------


def prepare() -> dict[str, Any]:
    global engine
    settings = read_settings(Settings)
    engine = load(settings)
    serving = handler if settings.streaming else plain_handler
    if settings.prewarm:
        asked: dict[str, Any] = {"prompt": "Hello", "max_tokens": 4}
        each = [{**asked, "lora": name} for name in engine.adapters]
        prewarm.run(serving, [{**asked, "temperature": 0}, asked, *each])
    return start_config(serving, settings)


def main() -> None:
    config = startup.run(prepare, worker="huggingface")
    import runpod

    runpod.serverless.start(config)


if __name__ == "__main__":
    main()
