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
from serving.continuous_batching.request_params import sampling_params
from serving.continuous_batching.sampling import SamplingParams
from serving.generation_fields import refuse_lone_surrogates
from serving.openai_chat import prompt_end
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
    """The sequences of a request; those of one prompt follow each other.

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
        # One thread: a fast tokenizer must not be used by two at the same time.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def read(self, request: GenerationRequest) -> Prompts:
        """The request's sequences. Raises JobError for prompts that the model cannot take."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._read, request)

    def _read(self, request: GenerationRequest) -> Prompts:
        for name in ("messages", "prompt", "tools", "chat_template_kwargs"):
            refuse_lone_surrogates(getattr(request, name, None), name)
        token_ids, count = self._token_ids(request), request.n or 1
        if len(token_ids) * count > MAX_SEQUENCES:
            message = f"{len(token_ids)} prompts with {count} answers each are more than {MAX_SEQUENCES}."
            raise invalid("n", message)
        sequences = []
        for ids in token_ids:
            if not ids:
                raise invalid("prompt", "has no tokens. Send some text.", "empty")
            if not 0 <= min(ids) <= max(ids) < self._generator.vocab_size:
                raise invalid("prompt", f"token ids range from 0 to {self._generator.vocab_size - 1}.")
            params = sampling_params(
                request,
                self._generator,
                prompt_tokens=len(ids),
                default_max_tokens=DEFAULT_MAX_TOKENS,
                default_temperature=1.0,
                prompt_param="prompt" if getattr(request, "messages", None) is None else "messages",
                logprobs=num_logprobs(request),
            )
            tensor = torch.tensor([ids])  # (1, tokens)
            inputs = {"input_ids": tensor, "attention_mask": torch.ones_like(tensor)}
            for number in range(count):
                seed = None if params.seed is None else params.seed + number
                sequences.append((inputs, replace(params, seed=seed)))
        return Prompts(sum(map(len, token_ids)), sequences)

    def _token_ids(self, request: GenerationRequest) -> list[list[int]]:
        if isinstance(request, CompletionRequest):
            special = request.add_special_tokens is not False
            return [
                self._tokenize(prompt, add_special_tokens=special) if isinstance(prompt, str) else prompt
                for prompt in request.prompt
            ]
        if request.messages is not None:
            return [self._apply_chat_template(request)]
        assert isinstance(request, GenerateRequest)
        return [self._tokenize(request.prompt or "")]

    def _tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
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
        messages = request.messages or []
        tools = None if getattr(request, "tool_choice", None) == "none" else request.tools or None
        cause = ""
        # Some templates take the arguments of tool calls as objects, some join them with other text.
        for json_arguments in (False, True) if any(each.tool_calls for each in messages) else (False,):
            try:
                ids: list[int] = apply(
                    [message.for_template(json_arguments=json_arguments) for message in messages],
                    tools=tools,
                    tokenize=True,
                    return_dict=False,
                    **prompt_end(request),
                    **variables,
                )
            except (TemplateError, ValueError, TypeError, KeyError) as error:
                cause = cause or (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            else:
                return ids
        raise invalid("messages", f"the model's chat template refuses them: {cause}", "bad_prompt")


def num_logprobs(request: GenerationRequest) -> int | None:
    """How many of the likeliest tokens the request wants beside each token; None: no log probabilities."""
    if isinstance(request, GenerateRequest):
        return request.logprobs
    return (request.top_logprobs or 0) if isinstance(request, ChatRequest) and request.logprobs else None
