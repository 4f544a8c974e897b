"""Settings, requests and responses. Sampling fields have the names and meanings of vLLM's SamplingParams."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from serving.generation_fields import TOP_K, TOP_P, GenerationResponse, GenerationSettings, SamplingFields
from serving.openai_chat import (
    ADD_GENERATION_PROMPT,
    CONTINUE_FINAL_MESSAGE,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    OpenAIGenerationRequest,
    TokenLogprobs,
    is_none,
)
from shared.errors import invalid
from shared.openai import ModelList, ModelsRequest, OpenAIRequest, Usage
from shared.requests import Request
from shared.results import EVENTS, JSON
from shared.settings import DType

from .adapters import check_adapters

DEFAULT_MAX_TOKENS = 512
MAX_SEQUENCES = 128  # prompts times n, of one request
MAX_CHARACTERS = 4_000_000


# ---- settings ------------------------------------------------------------------------------------------


class Settings(GenerationSettings):
    model_name: str = Field(
        "Qwen/Qwen2.5-7B-Instruct", description="Model id on the Hugging Face Hub, or a folder"
    )
    torch_dtype: DType | None = Field(None, description="Other name of DTYPE, used where that is auto")
    device_map: str | None = Field(
        None,
        pattern=r"^(auto|balanced|balanced_low_0|sequential)$",
        description="auto: spread the model over all GPUs; unset: one device, DEVICE",
    )
    quantization: Literal["bitsandbytes-8bit", "bitsandbytes-4bit", "awq", "gptq"] | None = Field(
        None, description="bitsandbytes: quantise on load; awq and gptq: for checkpoints quantised so"
    )
    lora: Annotated[str | None, AfterValidator(check_adapters)] = Field(
        None,
        description="LoRA adapters in peft's format, as name=repository, name=repository@revision or "
        "name=folder, separated by commas",
    )
    attn_implementation: str | None = Field(
        None,
        pattern=r"^[\w|/@.-]+$",
        description="Attention implementation of transformers, such as sdpa; unset: the model's default",
    )
    gpu_memory_utilization: float = Field(
        0.7, gt=0, le=0.95, description="Share of the memory that is free after loading for the KV cache"
    )


# ---- fields that several requests have -----------------------------------------------------------------


def _join_text_parts(value: Any) -> Any:
    """OpenAI's list of text parts as one string."""
    if not isinstance(value, list):
        return value
    for number, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f'part {number} must be {{"type": "text", "text": ...}}: this worker reads text only'
            )
    return "".join(part["text"] for part in value)


class TextContent(OpenAIRequest):
    type: Literal["text"]
    text: str


class Message(OpenAIRequest):
    """A message of a conversation. Fields beyond these are passed to the chat template unchanged."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="Role of the author"
    )
    content: Annotated[
        str | None, BeforeValidator(_join_text_parts, json_schema_input_type=str | list[TextContent] | None)
    ] = Field(None, description="A string, or a list of text parts")
    tool_calls: list[dict[str, Any]] | None = Field(None, description="Tool calls of the assistant")

    def for_template(self, *, json_arguments: bool = False) -> dict[str, Any]:
        """The message as chat templates expect it: content is a string, arguments of tools are objects.

        json_arguments: arguments of tools are JSON, for templates that join them with other text.
        """
        message = {"role": self.role, "content": self.content or "", **(self.model_extra or {})}
        if self.tool_calls:
            message["tool_calls"] = [
                _with_arguments(call, as_json=json_arguments) for call in self.tool_calls
            ]
        return message


def _with_arguments(call: dict[str, Any], *, as_json: bool) -> dict[str, Any]:
    """The tool call with arguments as JSON or as an object; as they are where they are not JSON."""
    function = call.get("function")
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    arguments = function["arguments"]
    with suppress(ValueError):
        if as_json and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not as_json and isinstance(arguments, str):
            arguments = json.loads(arguments)
    return {**call, "function": {**function, "arguments": arguments}}


def _as_prompts(value: Any) -> Any:
    """OpenAI takes a string, a list of strings, an array of token ids, or a list of such arrays."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(t) is int for t in value)):
        return [value]
    if not isinstance(value, list) or not any(all(type(v) is kind for v in value) for kind in (str, list)):
        raise ValueError(
            "must be a string, a list of strings, an array of token ids or a list of such arrays"
        )
    return value


Prompts = (
    str | Annotated[list[str] | list[int] | list[list[int]], Field(min_length=1, max_length=MAX_SEQUENCES)]
)
Messages = Annotated[list[Message], Field(min_length=1)]
Tools = list[dict[str, Any]]
MaxTokens = Annotated[int, Field(ge=1, le=1_000_000)]

_TEMPLATE_KWARGS = "Variables of the model's chat template, such as `enable_thinking`"


# ---- the worker's own route ----------------------------------------------------------------------------


class PromptFields(Request):
    messages: Messages | None = Field(None, description="A conversation, for models with a chat template")
    prompt: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_CHARACTERS,
        description="A text to continue, instead of `messages`",
    )
    max_tokens: MaxTokens | None = Field(
        None, description="Maximum number of generated tokens; unset: 512, or as many as the model has left"
    )


class GenerateRequest(SamplingFields, PromptFields):
    temperature: float = Field(0.7, ge=0, le=2, description="Sampling temperature; 0: greedy decoding")
    top_p: float = Field(0.95, gt=0, le=1, description=TOP_P)
    top_k: int = Field(50, ge=0, le=1_000_000, description=TOP_K)
    n: int = Field(1, ge=1, le=MAX_SEQUENCES, description="Number of answers, returned as `choices`")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=20,
        description="Return the log probability of each token and of this many of the most likely ones",
    )
    tools: Tools = Field(default=[], description="Tools in OpenAI's format, for the model's chat template")
    chat_template_kwargs: dict[str, Any] = Field(default={}, description=_TEMPLATE_KWARGS)
    add_generation_prompt: bool | None = Field(None, description=ADD_GENERATION_PROMPT)
    continue_final_message: bool | None = Field(None, description=CONTINUE_FINAL_MESSAGE)
    lora: str | None = Field(None, description="Name of an adapter of LORA; unset: the model without one")
    stream: bool = Field(False, description="Stream the answer while it is generated")

    @model_validator(mode="after")
    def _check_prompt(self) -> GenerateRequest:
        if (self.messages is None) == (self.prompt is None):
            given = "neither is given" if self.prompt is None else "both are given"
            raise invalid("prompt", f"send either messages or prompt; {given}.")
        for name in ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"):
            if self.messages is None and getattr(self, name):
                raise invalid(name, "needs messages.")
        return self


class Choice(BaseModel):
    response: str = Field(description="The generated text")
    finish_reason: str = Field(description="`stop` or `length`")
    logprobs: TokenLogprobs | None = Field(exclude_if=is_none, description="As above")


class TextPart(BaseModel):
    """A part of a streamed answer. Its last part is a GenerateResponse."""

    response: str = Field(description="The text since the last part")
    index: int = Field(0, description="Number of the answer, where `n` is more than 1")


class GenerateResponse(GenerationResponse):
    response: str = Field(description="The generated text, without the prompt; with `n` the first")
    lora: str | None = Field(None, exclude_if=is_none, description="Name of the adapter, where one was used")
    logprobs: TokenLogprobs | None = Field(
        None, exclude_if=is_none, description="Log probabilities, where `logprobs` is set"
    )
    choices: list[Choice] | None = Field(
        None, exclude_if=is_none, description="All answers, where `n` is more than 1"
    )


# ---- OpenAI's routes -----------------------------------------------------------------------------------


class ChatRequest(ChatCompletionRequest):
    """The body of POST /v1/chat/completions."""

    messages: Messages = Field(description="The conversation so far")  # type: ignore[assignment]
    n: int | None = Field(None, ge=1, le=MAX_SEQUENCES, description="Number of choices")
    logprobs: bool | None = Field(None, description="Return the log probability of each token")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="Number of the most likely tokens to return at each position"
    )
    tools: Tools | None = Field(None, description="Tools, for the model's chat template")
    tool_choice: Literal["auto", "none"] | None = Field(
        None, description="none: the chat template gets no tools. A call cannot be forced"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description=_TEMPLATE_KWARGS)


class CompletionRequest(OpenAIGenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[
        list[str] | list[list[int]], BeforeValidator(_as_prompts, json_schema_input_type=Prompts)
    ] = Field(
        min_length=1, max_length=MAX_SEQUENCES, description="One or several, as strings or as token ids"
    )
    max_tokens: MaxTokens | None = Field(
        None, description="Maximum number of generated tokens of each choice; unset: 512"
    )
    n: int | None = Field(None, ge=1, le=MAX_SEQUENCES, description="Number of choices for each prompt")
    add_special_tokens: bool | None = Field(
        None, description="Add the tokenizer's special tokens to a prompt; unset: true"
    )


class CompletionChoice(BaseModel):
    index: int
    text: str
    finish_reason: str | None = None


class Completion(BaseModel):
    """A response of /v1/completions, and each chunk of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = Field(None, exclude_if=is_none)


OpenAICall = ChatRequest | CompletionRequest
GenerationRequest = GenerateRequest | OpenAICall
Answer = GenerateResponse | ChatCompletion | Completion | ModelList
ROUTES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/models": ModelsRequest,
}
ANSWERS: dict[type[BaseModel], dict[str, Any]] = {
    GenerateRequest: {JSON: GenerateResponse, EVENTS: TextPart | GenerateResponse},
    ChatRequest: {JSON: ChatCompletion, EVENTS: ChatCompletionChunk},
    CompletionRequest: {JSON: Completion, EVENTS: Completion},
}
