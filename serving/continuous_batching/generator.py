"""Text generation for the jobs of a worker whose model transformers runs in this process.

    generator = Generator(model, tokenizer)
    inputs = tokenizer("...", return_tensors="pt")            # or what a processor makes of text and images
    async with aclosing(generator.stream(inputs, SamplingParams(max_tokens=64))) as deltas:
        async for delta in deltas: ...

Sequences join and leave a running batch at every token. That is exact where sequences share nothing but the
batch (`supports_joining_batches`); with any other model the waiting sequences run together through
`model.generate`, from start to end.

Each sequence has its own sampling params, random numbers, end and stop strings. In float32 it gets the tokens
that it would get alone; in bfloat16 and float16 a batch may round otherwise than a sequence alone.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from serving.continuous_batching.answer_text import AnswerText
from serving.continuous_batching.decode_loop import DecodeLoop
from serving.continuous_batching.end_tokens import end_token_ids
from serving.continuous_batching.kv_cache import (
    DecodeBatch,
    cache_budget,
    input_device,
    preallocated_cache,
    supports_joining_batches,
)
from serving.continuous_batching.sampling import Logprob, SamplingParams
from serving.continuous_batching.step_threads import StepThreads
from serving.continuous_batching.text_sequence import FinishReason, TextSequence, collate, prefill_key
from shared.errors import JobError
from shared.logs import log

PREFILL_TOKENS = 8192  # of prompts in one prefill: running sequences wait meanwhile


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The text since the last delta. The one with a finish_reason is the last.

    num_tokens: tokens of this answer so far, the one that ended it included.
    logprobs: of the new tokens, where `SamplingParams.logprobs` asks for them.
    """

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[Logprob, ...] = ()


class Generator(DecodeLoop[TextSequence]):
    """Answers prompts with a decoder model of transformers, many at a time.

    max_batch_size: the most sequences that are decoded at a time. max_cache_tokens: the most tokens in the KV
    cache, padding and tokens still to come included; None: see `cache_budget`; one sequence may have more.
    max_model_len: the most tokens of a prompt and its answer; None, or more than it: the model's own limit.
    processor: where it has the chat template in place of the tokenizer. set_adapters: called on the engine's
    thread before the model runs, with the `adapter` of each sequence of the batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch_size: int = 32,
        max_cache_tokens: int | None = None,
        max_model_len: int | None = None,
        processor: Any = None,
        set_adapters: Callable[[list[str | None]], None] | None = None,
    ) -> None:
        super().__init__(input_device(model))
        config = model.config.get_text_config(decoder=True)
        own_limit = getattr(config, "max_position_embeddings", None)
        limits = (max_model_len, own_limit)
        self.max_model_len: int | None = min((limit for limit in limits if limit), default=None)
        if max_model_len and max_model_len > (self.max_model_len or 0):
            log.warning(
                "max_model_len=%d: the model takes %d tokens, which stays the limit", max_model_len, own_limit
            )
        self.model, self.tokenizer, self.set_adapters = model, tokenizer, set_adapters
        self.eos_token_ids = end_token_ids(model, tokenizer, processor or tokenizer)
        self._special_tokens = {
            token_id: token.content
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        pads = (tokenizer.pad_token_id, *self.eos_token_ids)
        self.pad_token_id: int = next((token_id for token_id in pads if token_id is not None), 0)
        self.threads = StepThreads(torch.get_num_threads() if self.device.type == "cpu" else 1)
        self.max_batch_size = max_batch_size
        self.max_cache_tokens = max_cache_tokens or cache_budget(model)
        self.joins = supports_joining_batches(model)
        self.vocab_size: int = model.get_input_embeddings().weight.shape[0]
        self.repetition_penalty: float = model.generation_config.repetition_penalty or 1.0
        takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.last_logits: dict[str, Any] = {"logits_to_keep": 1} if takes_logits_to_keep else {}
        self.start()

    # -- for the event loop

    def fit_max_tokens(
        self,
        prompt_tokens: int,
        max_tokens: int | None,
        *,
        default: int,
        param: str,
        max_tokens_param: str = "max_tokens",
    ) -> int:
        """How many tokens the answer may have: `max_tokens`, else `default` or as many as there is room for.

        param, max_tokens_param: the names of the two fields, as the client sent them. Raises
        JobError(code="too_long") where the model has no room.
        """
        if self.max_model_len is None:
            return max_tokens or default
        room = self.max_model_len - prompt_tokens
        if room < 1:
            raise JobError(
                f"{param}: the prompt has {prompt_tokens} tokens, and the model takes {self.max_model_len} "
                "with the answer. Shorten it.",
                param=param,
                code="too_long",
            )
        if max_tokens is not None and max_tokens > room:
            raise JobError(
                f"{max_tokens_param}: the prompt has {prompt_tokens} tokens, and {max_tokens} more make "
                f"{prompt_tokens + max_tokens}; the model takes {self.max_model_len}. Ask for at most "
                f"{room}.",
                param=max_tokens_param,
                code="too_long",
            )
        return max_tokens or min(default, room)

    async def stream(
        self,
        inputs: Mapping[str, Any],
        params: SamplingParams,
        *,
        each: bool = True,
        adapter: str | None = None,
    ) -> AsyncGenerator[TextDelta]:
        """The answer to a prompt. Close the generator (`contextlib.aclosing`) to leave the batch at once.

        inputs: of the tokenizer or processor for one prompt, as tensors with a first dimension of one.
        each: a delta for each token that completes some text; False: one delta with all of it.
        adapter: for `set_adapters`.
        """
        if params.repetition_penalty is None:
            params = replace(params, repetition_penalty=self.repetition_penalty)
        eos = frozenset[int]() if params.ignore_eos else self.eos_token_ids
        sequence = TextSequence(
            params=params,
            prompt_ids=inputs["input_ids"][0],
            random=random.Random(params.seed),  # noqa: S311
            end_token_ids=eos.union(params.stop_token_ids),
            inputs=inputs,
            prefill_key=prefill_key(inputs),
            each_token=each or bool(params.stop),
            adapter=adapter,
        )
        answer = AnswerText(self.tokenizer, params, sequence.prompt_ids, self._special_tokens)
        text, reported = "", 0  # reported: tokens of the deltas so far
        self.submit(sequence)
        try:
            while answer.finish_reason is None:
                text += answer.feed(*await sequence.next_update())
                if answer.finish_reason or (text and each):
                    logprobs = tuple(sequence.logprobs[reported : answer.num_tokens])
                    yield TextDelta(text, answer.num_tokens, answer.finish_reason, logprobs)
                    text, reported = "", answer.num_tokens
        finally:
            sequence.finished = True

    # -- on the engine's thread

    def admit(self) -> list[TextSequence]:
        """The first that waits, and later ones with its prefill_key, as long as the limits have room."""
        running = self.running.sequences if self.running else []
        cached = self.running.attention_mask.shape[1] if self.running else 0
        remaining = max((sequence.remaining for sequence in running), default=0)
        longest = 0
        admitted: list[TextSequence] = []
        for sequence in self.waiting:
            if admitted and sequence.prefill_key != admitted[0].prefill_key:
                continue
            longest, remaining = max(longest, sequence.length), max(remaining, sequence.remaining)
            size = len(running) + len(admitted) + 1
            tokens = size * (max(cached, longest) + remaining)
            full = size > self.max_batch_size or tokens > self.max_cache_tokens
            long = bool(admitted) and (len(admitted) + 1) * longest > PREFILL_TOKENS
            if size > 1 and (full or long):
                break
            admitted.append(sequence)
        for sequence in admitted:
            self.waiting.remove(sequence)
        return admitted

    def prefill_and_join(self, sequences: list[TextSequence]) -> None:
        if self.joins:
            super().prefill_and_join(sequences)
        else:
            self._generate(sequences)

    def prefill(self, sequences: list[TextSequence]) -> tuple[DecodeBatch[TextSequence], torch.Tensor]:
        self.threads.use(self.threads.threads)
        self._select_adapters(sequences)
        inputs = self._collate(sequences)
        mask = inputs.get("attention_mask")  # (batch, longest)
        if mask is None:
            mask = torch.ones_like(inputs["input_ids"])
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)  # (batch, longest); padding has 0
        output = self.model(
            **inputs, position_ids=positions, past_key_values=preallocated_cache(self.model), use_cache=True,
            **self.last_logits,
        )  # fmt: skip
        return DecodeBatch(sequences, output.past_key_values, mask), output.logits[:, -1]

    def decode(self, batch: DecodeBatch[TextSequence]) -> torch.Tensor:
        self._select_adapters(batch.sequences)
        mask = torch.cat([batch.attention_mask, torch.ones_like(batch.attention_mask[:, :1])], dim=1)
        positions = mask.sum(dim=1, keepdim=True) - 1  # (batch, 1)
        output = self.threads.run(
            lambda: self.model(
                input_ids=batch.token_ids, attention_mask=mask, position_ids=positions,
                past_key_values=batch.cache, use_cache=True,
            ),
            len(batch.sequences),
        )  # fmt: skip
        batch.attention_mask, batch.cache = mask, output.past_key_values
        logits: torch.Tensor = output.logits[:, -1]  # (batch, vocab)
        return logits

    def accept(self, sequence: TextSequence, token_id: int) -> None:
        sequence.token_ids.append(token_id)
        reason = None
        if token_id in sequence.end_token_ids:
            reason = "stop"
        elif not sequence.remaining:
            reason = "length"
        if reason:
            sequence.finished = True
        if reason or sequence.each_token:
            new, sequence.emitted = sequence.token_ids[sequence.emitted :], len(sequence.token_ids)
            sequence.emit((new, reason))

    def shrink(self, batch: DecodeBatch[TextSequence], newcomer: TextSequence | None) -> None:
        tokens = batch.attention_mask.numel() + (newcomer.length if newcomer else 0)
        self.max_cache_tokens = max(1, int(tokens * 0.8))
        log.warning("out of memory: at most %d tokens in the cache from now on", self.max_cache_tokens)

    def _collate(self, sequences: list[TextSequence]) -> dict[str, Any]:
        return collate(sequences, pad_token_id=self.pad_token_id, device=self.device, dtype=self.model.dtype)

    def _select_adapters(self, sequences: list[TextSequence]) -> None:
        if self.set_adapters:
            self.set_adapters([sequence.adapter for sequence in sequences])

    def _generate(self, sequences: list[TextSequence]) -> None:
        """Answer `sequences` from start to end with `model.generate`. No other joins them meanwhile."""
        self._select_adapters(sequences)

        def sample(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            """Scores, (batch, vocab), of which greedy decoding chooses the tokens sampled here."""
            token_ids = torch.tensor(self.sample(sequences, scores), device=scores.device)[:, None]
            return torch.full_like(scores, -torch.inf).scatter_(1, token_ids.clamp(min=0), 0.0)

        def finished(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.tensor([sequence.finished for sequence in sequences], device=ids.device)

        config = copy.deepcopy(self.model.generation_config)
        config.update(
            do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
            max_length=None, max_new_tokens=max(sequence.remaining for sequence in sequences),
            eos_token_id=None, pad_token_id=self.pad_token_id,
        )  # fmt: skip
        self.model.generate(
            **self._collate(sequences), generation_config=config,
            logits_processor=LogitsProcessorList([sample]),
            stopping_criteria=StoppingCriteriaList([finished]),
        )  # fmt: skip
