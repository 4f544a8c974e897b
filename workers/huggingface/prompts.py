"""A request as the generator takes it: token ids, through the chat template, and sampling parameters."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from serving.continuous_batching.generator import Generator, TextDelta
from serving.continuous_batching.sampling import SamplingParams
from shared.errors import invalid

from .schemas import (
    DEFAULT_MAX_TOKENS,
    MAX_SEQUENCES,
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    GenerationRequest,
)


@dataclass(frozen=True)
class Prompts:
    """The sequences that a request asks for; those of one prompt follow each other.

    prompt_tokens: of all prompts, each counted once. sequences: model inputs, (1, tokens), and parameters.
    """

    prompt_tokens: int
    sequences: list[tuple[dict[str, torch.Tensor], SamplingParams]]

    def streams(
        self, generator: Generator, adapter: str | None, *, each: bool
    ) -> list[AsyncGenerator[TextDelta]]:
        """The output of each sequence; each: token by token, else in one part."""
        return [
            generator.stream(inputs, params, each=each, adapter=adapter) for inputs, params in self.sequences
        ]


class PromptReader:
    """Tokenizes requests for one model. model: its name, for error messages."""

    def __init__(self, generator: Generator, tokenizer: PreTrainedTokenizerBase, model: str) -> None:
        self._generator, self._tokenizer, self._model = generator, tokenizer, model
        self._vocab_size = generator.model.get_input_embeddings().weight.shape[0]
        # One thread: a fast tokenizer must not be used by two at the same time.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def read(self, request: GenerationRequest) -> Prompts:
        """The request's sequences. Raises JobError for prompts that the model cannot take."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._read, request)

    def _read(self, request: GenerationRequest) -> Prompts:
        token_ids, count = self._token_ids(request), request.n or 1
        if len(token_ids) * count > MAX_SEQUENCES:
            message = f"{len(token_ids)} prompts with {count} answers each are more than {MAX_SEQUENCES}."
            raise invalid("n", message)
        field = "prompt" if getattr(request, "messages", None) is None else "messages"
        renamed = getattr(request, "max_completion_tokens", None) is not None
        params, sequences = sampling_params(request), []
        for ids in token_ids:
            if not ids:
                raise invalid("prompt", "has no tokens. Send some text.", "empty")
            if not 0 <= min(ids) <= max(ids) < self._vocab_size:
                raise invalid("prompt", f"token ids range from 0 to {self._vocab_size - 1}.")
            max_tokens = self._generator.fit_max_tokens(
                len(ids),
                params.max_tokens or None,
                default=DEFAULT_MAX_TOKENS,
                param=field,
                max_tokens_param="max_completion_tokens" if renamed else "max_tokens",
            )
            tensor = torch.tensor([ids])  # (1, tokens)
            inputs = {"input_ids": tensor, "attention_mask": torch.ones_like(tensor)}
            for number in range(count):
                seed = None if params.seed is None else params.seed + number
                sequences.append((inputs, replace(params, max_tokens=max_tokens, seed=seed)))
        return Prompts(sum(map(len, token_ids)), sequences)

    def _token_ids(self, request: GenerationRequest) -> list[list[int]]:
        if isinstance(request, CompletionRequest):
            return [
                self._tokenize(prompt) if isinstance(prompt, str) else prompt for prompt in request.prompt
            ]
        if request.messages is not None:
            return [self._apply_chat_template(request)]
        assert isinstance(request, GenerateRequest)
        return [self._tokenize(request.prompt or "")]

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids

    def _apply_chat_template(self, request: GenerateRequest | ChatRequest) -> list[int]:
        apply = self._tokenizer.apply_chat_template
        if not self._tokenizer.chat_template:
            message = f"{self._model} has no chat template. Send prompt, or serve a model made for chat."
            raise invalid("messages", message, "no_chat_template")
        variables = request.chat_template_kwargs or {}
        reserved = variables.keys() & {"messages", *inspect.signature(apply).parameters}
        if reserved:
            raise invalid("chat_template_kwargs", f"{min(reserved)!r} is no variable of the template.")
        messages = [message.for_template() for message in request.messages or []]
        tools = None if getattr(request, "tool_choice", None) == "none" else request.tools or None
        try:
            ids: list[int] = apply(
                messages,
                tools=tools,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **variables,
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            message = f"the model's chat template refuses them: {cause}"
            raise invalid("messages", message, "bad_prompt") from None
        return ids


def sampling_params(request: GenerationRequest) -> SamplingParams:
    """The request's parameters, `max_tokens` 0 where it has none. OpenAI's routes have OpenAI's defaults."""
    max_tokens, logprobs = request.max_tokens, None
    if isinstance(request, GenerateRequest):
        temperature, top_p, logprobs = request.temperature, request.top_p, request.logprobs
    else:
        temperature = 1.0 if request.temperature is None else request.temperature
        top_p = request.top_p or 1.0
    if isinstance(request, ChatRequest):
        max_tokens = request.max_completion_tokens or max_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return SamplingParams(
        max_tokens or 0,
        temperature,
        top_p,
        request.seed,
        tuple(request.stop),
        top_k=request.top_k or 0,
        min_p=request.min_p or 0.0,
        repetition_penalty=request.repetition_penalty,
        logprobs=logprobs,
    )
