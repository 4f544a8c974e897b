"""Settings, requests and responses of this worker."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)

from serving.engine_server.openai_objects import ChatCompletion, ChatCompletionChunk, Completion
from serving.openai_chat import StreamOptions
from shared.errors import invalid
from shared.openai import ModelsRequest, OpenAIRequest, Usage
from shared.requests import Request, as_list
from shared.results import EVENTS, JSON
from shared.settings import WorkerSettings

# ---- settings ------------------------------------------------------------------------------------------


class Settings(WorkerSettings):
    """What the worker has to know. text-generation-launcher reads all its other variables by itself."""

    model_name: str = Field(
        validation_alias=AliasChoices("model_id", "model_name"),
        description="Model id on the Hugging Face Hub, or a folder. MODEL_NAME is another name of it",
    )
    model_revision: str | None = Field(
        None,
        validation_alias=AliasChoices("revision", "model_revision"),
        description="Branch, tag or commit of the model. MODEL_REVISION is another name of it",
    )
    hf_token: SecretStr | None = Field(
        None,
        validation_alias=AliasChoices("hf_token", "hugging_face_hub_token"),
        description="Hugging Face token, for gated and private models. Older name: HUGGING_FACE_HUB_TOKEN",
    )
    dtype: Literal["auto", "bfloat16", "float16"] = Field("auto", description="auto: TGI's choice")
    device: str = Field("auto", description="Not used: TGI takes the GPUs that CUDA_VISIBLE_DEVICES leaves")
    streaming: bool = Field(
        True, description="Answer through a generator, which can stream; false: complete answers only"
    )
    max_concurrent_requests: int | None = Field(
        None,
        ge=1,
        description="Requests that TGI takes at a time; unset: twice MAX_CONCURRENCY, at least 128",
    )
    lora_adapters: str = Field(
        "", description="Adapters by id, or as id=folder, separated by commas; requests name one as `model`"
    )
    payload_limit: int = Field(
        64_000_000, ge=1000, description="Largest request in bytes; TGI's own default is 2 MB"
    )
    tgi_extra_args: str = Field("", description="More of the launcher's command line, as in a shell")
    tgi_startup_timeout: float = Field(
        1800, gt=0, description="Seconds until TGI must be ready, or the worker is replaced"
    )
    health_timeout: float = Field(
        60, ge=2, description="Seconds of silence after which TGI counts as hung, and the worker is replaced"
    )

    @model_validator(mode="before")
    @classmethod
    def _limit_concurrency(cls, values: dict[str, Any]) -> dict[str, Any]:
        """MAX_CONCURRENT_REQUESTS alone limits the worker's jobs, too."""
        limit = str(values.get("max_concurrent_requests")).strip()
        if limit.isdecimal() and int(limit) and "max_concurrency" not in values:
            return {**values, "max_concurrency": min(int(limit), 1024)}
        return values

    @property
    def adapter_names(self) -> list[str]:
        """The names in LORA_ADAPTERS, whose entries are `name`, `name@revision` or `name=folder`."""
        entries = (entry.strip() for entry in self.lora_adapters.split(","))
        return [entry.partition("=")[0].partition("@")[0] for entry in entries if entry]

    @property
    def downloads_adapters(self) -> bool:
        return any("=" not in entry for entry in self.lora_adapters.split(",") if entry.strip())


# ---- requests ------------------------------------------------------------------------------------------


_StopText = Annotated[str, Field(min_length=1, max_length=200)]
_StopList = Annotated[list[_StopText], Field(max_length=64)]
Stop = Annotated[_StopList, BeforeValidator(as_list, json_schema_input_type=_StopText | _StopList)]
_Prompts = Annotated[list[str], Field(min_length=1)]
Messages = Annotated[list[dict[str, Any]], Field(min_length=1)]
Tokens = Annotated[int, Field(ge=1, le=1_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class GenerateRequest(Request):
    messages: Messages | None = Field(None, description="A conversation, for models with a chat template")
    prompt: str | None = Field(None, min_length=1, description="A text to continue, instead of `messages`")
    max_tokens: Tokens | None = Field(
        None, description="Most tokens of the answer; unset: 512, or what the context length leaves"
    )
    temperature: float = Field(0.7, ge=0, le=100, description="0: greedy decoding")
    top_p: float = Field(
        0.95, gt=0, le=1, description="Sample from the likeliest tokens whose probabilities sum to this"
    )
    top_k: int = Field(
        0, ge=0, le=1_000_000, description="Sample from this many likeliest tokens; 0: from all"
    )
    typical_p: float | None = Field(
        None, gt=0, le=1, description="Sample from the locally typical tokens with this sum of probabilities"
    )
    do_sample: bool | None = Field(None, description="false: greedy decoding")
    repetition_penalty: float | None = Field(
        None, gt=0, le=10, description="Above 1: fewer tokens that the text has already"
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="Above 0: fewer tokens that the text has often"
    )
    seed: Seed | None = Field(None, description="The same seed gives the same answer; unset: a random one")
    stop: Stop = Field(default=[], description="A text, or several, before which the answer ends")
    best_of: int | None = Field(
        None, ge=1, le=64, description="Generate this many sequences and answer with the likeliest"
    )
    truncate: int | None = Field(None, ge=1, description="Use only this many of the prompt's last tokens")
    return_full_text: bool = Field(False, description="Put the prompt before the answer")
    details: bool = Field(False, description="Return each token and its log probability in `details`")
    decoder_input_details: bool = Field(
        False, description="Return the prompt's tokens and log probabilities, too; not with `stream`"
    )
    top_n_tokens: int | None = Field(
        None, ge=0, description="Return this many of the likeliest tokens at each position, too"
    )
    grammar: dict[str, Any] | None = Field(
        None,
        description='Constrains the answer: {"type": "json", "value": a JSON schema}, or "regex"',
    )
    adapter_id: str | None = Field(None, description="One of LORA_ADAPTERS")
    watermark: bool = Field(False, description="Mark the text as generated")
    stream: bool = Field(False, description="Send the answer in parts while it is generated")

    @model_validator(mode="after")
    def _check_combination(self) -> GenerateRequest:
        if (self.messages is None) == (self.prompt is None):
            given = "neither is given" if self.prompt is None else "both are given"
            raise invalid("prompt", f"give either messages or prompt; {given}.")
        unstreamed = {"best_of": (self.best_of or 1) > 1, "decoder_input_details": self.decoder_input_details}
        for name, is_set in unstreamed.items():
            if self.stream and is_set:
                raise invalid(name, "does not go with stream.")
        return self

    @property
    def tgi_names(self) -> dict[str, str]:
        """The names that TGI's fields have in this request."""
        return {
            "inputs": "prompt" if self.messages is None else "messages",
            "max_new_tokens": "max_tokens",
        }

    @property
    def wants_tokens(self) -> bool:
        return self.details or self.decoder_input_details or bool(self.top_n_tokens)


class OpenAIBody(OpenAIRequest):
    """The fields of both routes. TGI receives other fields as they are."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())

    model: str | None = Field(None, description="The served model's name, or one of LORA_ADAPTERS")
    max_tokens: Tokens | None = Field(
        None, description="Most tokens of the answer; unset: what the context length leaves"
    )
    temperature: float | None = Field(None, ge=0, description="0: greedy decoding")
    top_p: float | None = Field(
        None, gt=0, le=1, description="Sample from the likeliest tokens whose probabilities sum to this"
    )
    seed: Seed | None = Field(None, description="The same seed gives the same answer")
    stop: Stop = Field(default=[], description="A text, or several, before which the answer ends")
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="Above 0: fewer tokens that the text has often"
    )
    repetition_penalty: float | None = Field(
        None, gt=0, le=10, description="Above 1: fewer tokens that the text has already"
    )
    stream: bool | None = Field(None, description="Send the answer in parts while it is generated")
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`")

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(OpenAIBody):
    """The body of POST /v1/chat/completions."""

    messages: Messages = Field(
        description="The conversation so far; images as `image_url`, for models with vision"
    )
    max_completion_tokens: Tokens | None = Field(None, description="Newer name of `max_tokens`")
    logprobs: bool | None = Field(None, description="Return each token's log probability")
    top_logprobs: int | None = Field(
        None, ge=0, description="Return this many of the likeliest tokens at each position, too"
    )
    tools: list[dict[str, Any]] | None = Field(None, description="Tools that the model may call")
    tool_choice: str | dict[str, Any] | None = Field(None, description="`auto`, `none`, `required` or a tool")
    response_format: dict[str, Any] | None = Field(
        None, description="`json_schema`, which the answer will match"
    )

    @property
    def tgi_names(self) -> dict[str, str]:
        """The names that TGI's fields have in this request."""
        return {
            "inputs": "messages",
            "max_new_tokens": "max_completion_tokens" if self.max_completion_tokens else "max_tokens",
            "top_n_tokens": "top_logprobs",
            "grammar": "response_format",
        }


class CompletionRequest(OpenAIBody):
    """The body of POST /v1/completions."""

    prompt: Annotated[_Prompts, BeforeValidator(as_list, json_schema_input_type=str | _Prompts)] = Field(
        description="A text, or up to MAX_CLIENT_BATCH_SIZE (4)"
    )

    @property
    def tgi_names(self) -> dict[str, str]:
        """The names that TGI's fields have in this request."""
        return {"inputs": "prompt", "max_new_tokens": "max_tokens"}


OpenAICall = ChatRequest | CompletionRequest
ROUTES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/models": ModelsRequest,
}

# ---- responses -----------------------------------------------------------------------------------------


class TextPart(BaseModel):
    """A part of a streamed answer. Its last part is a GenerateResponse."""

    response: str = Field(description="The text since the last part")


class GenerateResponse(BaseModel):
    response: str = Field(description="The answer, without the prompt")
    finish_reason: Literal["stop", "length"] = Field(
        description="`stop`: at its end or a stop text; `length`: at `max_tokens`"
    )
    details: dict[str, Any] = Field(
        description="TGI's finish_reason, generated_tokens, seed; where requested prefill, tokens, top_tokens"
    )
    usage: Usage
    model: str = Field(description="The model, as MODEL_NAME gives it")
    revision: str | None = Field(description="Its commit, where known")


ANSWERS: dict[type[BaseModel], dict[str, Any]] = {
    GenerateRequest: {JSON: GenerateResponse, EVENTS: TextPart | GenerateResponse},
    ChatRequest: {JSON: ChatCompletion, EVENTS: ChatCompletionChunk},
    CompletionRequest: {JSON: Completion, EVENTS: Completion},
}
