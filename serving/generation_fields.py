"""The fields of a request for generated text: those that every such worker serves, and those it refuses.

OpenAI's and vLLM's requests have many more fields than a worker here serves. A test compares their lists with
the names in this module: a field that would change the answer is served or refused, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from shared.errors import invalid
from shared.openai import Usage
from shared.settings import WorkerSettings

# ---- served --------------------------------------------------------------------------------------------


def _as_stop_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


_StopText = Annotated[str, Field(min_length=1, max_length=200)]
_StopList = Annotated[list[_StopText], Field(max_length=4)]
Stop = Annotated[_StopList, BeforeValidator(_as_stop_list, json_schema_input_type=_StopText | _StopList)]
"""Stop strings: one, or a list of up to four."""


def _check_token_ids(bias: dict[str, float] | None) -> dict[str, float] | None:
    if wrong := [key for key in bias or {} if not (key.isascii() and key.isdigit())]:
        raise ValueError(f"keys are token ids, and {wrong[0][:20]!r} is none")
    return bias


LogitBias = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], AfterValidator(_check_token_ids)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=1000)]
TOP_K = "Sample from this many of the most likely tokens; 0: from all"
MIN_P = "Minimum probability of a token, as a share of the most likely token's"
TOP_P = "Nucleus sampling: probability mass of the tokens to sample from"


class GenerationSettings(WorkerSettings):
    """Settings of the workers whose engine is serving.continuous_batching."""

    streaming: bool = Field(
        True, description="Run as a generator, which can stream; false: complete answers only"
    )
    max_model_len: int | None = Field(
        None,
        ge=16,
        description="Maximum tokens of a prompt with its output; at most and by default the model's own",
    )
    max_batch_size: int = Field(64, ge=1, le=1024, description="Maximum number of sequences in a batch")
    max_batch_tokens: int | None = Field(
        None, ge=16, description="Maximum tokens in the KV cache; unset: what fits the GPU's free memory"
    )


class GenerationResponse(BaseModel):
    """The answer of a worker's own route."""

    response: str = Field(description="The generated text, without the prompt")
    finish_reason: str = Field(
        description="`stop`: end-of-sequence token or stop string; `length`: `max_tokens` reached"
    )
    usage: Usage
    model: str = Field(description="Name of the model, SERVED_MODEL_NAME or MODEL_NAME")
    revision: str | None = Field(description="Commit of the model, where known")


class SamplingFields(BaseModel):
    """Sampling parameters, with the names and definitions of OpenAI's and vLLM's."""

    model_config = ConfigDict(strict=True, frozen=True, protected_namespaces=())

    temperature: float | None = Field(
        None, ge=0, le=2, description="Sampling temperature; 0: greedy decoding"
    )
    top_p: float | None = Field(None, gt=0, le=1, description=TOP_P)
    top_k: int | None = Field(None, ge=0, le=1_000_000, description=TOP_K)
    min_p: float | None = Field(None, ge=0, le=1, description=MIN_P)
    repetition_penalty: float | None = Field(
        None,
        ge=0.01,
        le=10,
        description="Above 1: tokens that the text already has become less likely; unset: the model's own",
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="Subtracted from the logit of each token that the answer already has"
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="The same, times how often the answer has the token"
    )
    logit_bias: LogitBias | None = Field(
        None, description="What is added to the logits of tokens, -100 to 100, by token id"
    )
    seed: int | None = Field(
        None, description="Random seed: equal requests with equal seeds repeat; unset: random"
    )
    stop: Stop = Field(
        default=[],
        description="Up to four strings that end the generation, special tokens among them; not returned",
    )
    stop_token_ids: TokenIds | None = Field(None, description="Token ids that end the generation")
    ignore_eos: bool | None = Field(None, description="Generate beyond the end-of-sequence token")
    min_tokens: int | None = Field(
        None, ge=0, description="Number of tokens before which nothing ends the generation"
    )
    skip_special_tokens: bool | None = Field(
        None, description="Leave special tokens out of the text; unset: true"
    )


# ---- refused -------------------------------------------------------------------------------------------

UNSERVED: dict[str, Any] = {
    # OpenAI's
    "response_format": {"type": "text"}, "suffix": "", "echo": False, "best_of": 1,
    "functions": [], "function_call": "none", "modalities": ["text"], "audio": None,
    "web_search_options": None, "verbosity": "medium", "reasoning_effort": None, "moderation": None,
    # vLLM's
    "structured_outputs": None, "guided_json": None, "guided_regex": None, "guided_choice": None,
    "guided_grammar": None, "guided_decoding_backend": None, "guided_whitespace_pattern": None,
    "allowed_token_ids": None, "bad_words": [], "add_special_tokens": False, "chat_template": None,
    "documents": [], "include_stop_str_in_output": False, "use_beam_search": False, "length_penalty": 1,
    "prompt_logprobs": None, "logprob_token_ids": None, "prompt_embeds": None, "truncate_prompt_tokens": None,
    "thinking_token_budget": None, "repetition_detection": None, "watermarking": None, "vllm_xargs": {},
    "mm_payload": None, "mm_processor_kwargs": {}, "media_io_kwargs": {}, "return_mm_kwargs": False,
    "return_prompt_text": False, "return_token_ids": False, "return_token_offsets": False,
    "return_tokens_as_token_ids": False, "routed_experts_prompt_start": 0,
    "kv_transfer_params": None, "ec_transfer_params": None,
    # transformers'
    "num_beams": 1, "max_new_tokens": None, "min_new_tokens": None, "min_length": 0, "typical_p": 1,
    "no_repeat_ngram_size": 0, "penalty_alpha": None, "epsilon_cutoff": 0, "eta_cutoff": 0,
    # TGI's and llama.cpp's
    "grammar": None, "json_schema": None, "top_n_tokens": None, "top_a": 0, "mirostat": 0,
}  # fmt: skip
"""Fields that would change the answer, each with a value that does not. None: no other value than null."""

NO_EFFECT = frozenset(
    {
        # OpenAI's accounting, storage and caching
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prediction"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
        # Of calls and reasoning that a server reads out of the text: here they stay in the text.
        *("parallel_tool_calls", "include_reasoning", "tool_choice"),
        # vLLM's scheduling, and options of other fields that are refused
        *("priority", "request_id", "session_id", "cache_salt", "stream_interval"),
        *("truncation_side", "spaces_between_special_tokens"),
    }
)
"""Fields of OpenAI's and vLLM's requests that are ignored, as they change no answer."""


def refuse_unserved(request: BaseModel, **neutral: Any) -> None:
    """Raise JobError for a field that this worker does not implement and that would change the answer.

    neutral: the fields, each with a value that has no effect. Null, false and empty values never have one,
    and 0 has one only where None is the neutral value.
    """
    for name, value in (request.model_extra or {}).items():
        if name not in neutral or value is None or value is False or value == neutral[name]:
            continue
        if value or (value == 0 and neutral[name] is None):
            raise invalid(name, "not supported by this worker. Leave it out.", "unsupported")


def refuse_lone_surrogates(value: Any, param: str) -> None:
    """Raise JobError for a text in the JSON value `value` that is not valid Unicode. param: its field."""
    if isinstance(value, str):
        try:
            if not value.isascii():
                value.encode()
        except UnicodeEncodeError as error:
            message = (
                f"character {error.start} is a lone surrogate ({value[error.start]!a}), half of a character. "
                "Send valid Unicode."
            )
            raise invalid(param, message, "invalid_unicode") from None
    elif isinstance(value, BaseModel):
        refuse_lone_surrogates(value.model_dump(), param)
    elif isinstance(value, dict):
        for name, part in value.items():
            refuse_lone_surrogates(name, param)
            refuse_lone_surrogates(part, f"{param}.{name}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            refuse_lone_surrogates(part, f"{param}.{number}")
