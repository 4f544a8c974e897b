"""Token by token from the encoder's states, with transformers' Whisper: by sampling, or by beam search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import BaseModelOutput

from .engine import DecodeRequest
from .timestamp_rules import TimestampRules
from .tokenizer import WhisperTokenizer


class Decoded(NamedTuple):
    tokens: list[int]  # without the end token
    avg_logprob: float
    no_speech_prob: float


class Decoder:
    """The two ways to decode a batch.

    Both take states, (batch, 1500, width); the requests; and the prefix of each, its start-of-transcript
    sequence, which follows the request's prompt.
    """

    def __init__(self, model: Any, tokenizer: WhisperTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def sample(
        self, states: torch.Tensor, requests: Sequence[DecodeRequest], prefixes: list[list[int]]
    ) -> list[Decoded]:
        """Decode token by token, at each request's temperature. Sequences that are done leave the batch."""
        ids, mask = self._prompts(requests, prefixes, states.device)
        rules = self._rules(ids.shape[1], states.device)
        temperature = torch.tensor([request.temperature for request in requests], device=states.device)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        eot = self.tokenizer.eot
        running = list(range(len(requests)))  # the request of each sequence in the batch
        done: set[int] = set()
        logprob_sums = [0.0] * len(requests)
        no_speech_probs: list[float] = []
        tokens: list[list[int]] = [[] for _ in requests]
        latest = ids  # (batch, seq) in the first step, (batch, 1) then
        for _ in range(self._max_new_tokens(ids.shape[1])):
            positions = None
            if mask is not None:
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -latest.shape[1] :]
            hidden = self.model.model.decoder(
                input_ids=latest,
                attention_mask=mask,
                position_ids=positions,
                encoder_hidden_states=states,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state  # (batch, seq or 1, width)
            if not no_speech_probs:
                no_speech_probs = self._no_speech_probs(hidden, prefixes)
            logprobs = rules(ids, self.model.proj_out(hidden[:, -1]))  # (batch, vocab)
            chosen = logprobs.argmax(-1)  # (batch,)
            if temperature.any():
                probs = (logprobs / temperature.clamp(min=0.01)[:, None]).softmax(-1)
                chosen = torch.where(temperature > 0, torch.multinomial(probs, 1)[:, 0], chosen)
            chosen_logprobs = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
            for index, token, logprob in zip(running, chosen.tolist(), chosen_logprobs, strict=True):
                if index not in done:
                    logprob_sums[index] += logprob
                    tokens[index].append(token)
                    if token == eot or requests[index].cancelled:
                        done.add(index)
            if len(done) == len(requests):
                break
            latest = chosen[:, None]
            ids = torch.cat([ids, latest], 1)
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(latest)], 1)
            left = [i for i, index in enumerate(running) if index not in done]
            if len(left) <= 0.75 * len(running):  # copying the cache of the others costs a step or two
                keep = torch.tensor(left, device=states.device)
                cache.batch_select_indices(keep)
                ids, latest, states = ids[keep], latest[keep], states[keep]
                temperature = temperature[keep]
                mask = None if mask is None else mask[keep]
                running = [running[i] for i in left]
        return [
            Decoded([token for token in made if token != eot], total / max(1, len(made)), no_speech)
            for made, total, no_speech in zip(tokens, logprob_sums, no_speech_probs, strict=True)
        ]

    def beam_search(
        self, states: torch.Tensor, requests: Sequence[DecodeRequest], prefixes: list[list[int]]
    ) -> list[Decoded]:
        """Decode by transformers' beam search."""
        eot = self.tokenizer.eot
        ids, mask = self._prompts(requests, prefixes, states.device)
        prompt_length = ids.shape[1]
        ones = torch.ones_like(ids) if mask is None else mask
        hidden = self.model.model.decoder(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=states,
            position_ids=(ones.cumsum(-1) - 1).clamp(min=0),
        ).last_hidden_state
        no_speech_probs = self._no_speech_probs(hidden, prefixes)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # All beams of a sequence attend to the same audio.
        cache.cross_attention_cache.reorder_cache = lambda _: None

        def cancelled(sequences: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            flags = [request.cancelled for request in requests]
            return torch.tensor(flags, device=sequences.device).repeat_interleave(
                len(sequences) // len(flags)
            )

        output = GenerationMixin.generate(
            self.model,
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            decoder_input_ids=ids,
            decoder_attention_mask=ones,
            attention_mask=torch.ones(states.shape[:2], device=states.device),  # unused; avoids a warning
            past_key_values=cache,
            generation_config=GenerationConfig(
                num_beams=requests[0].beam_size,
                do_sample=False,
                max_length=prompt_length + self._max_new_tokens(prompt_length),
                eos_token_id=eot,
                pad_token_id=eot,
                decoder_start_token_id=self.tokenizer.sot,
                return_dict_in_generate=True,
                output_scores=True,
            ),
            logits_processor=[self._rules(prompt_length, states.device)],
            stopping_criteria=StoppingCriteriaList([cancelled]),
        )
        sequences = output.sequences[:, prompt_length:].tolist()
        tokens = [made[: made.index(eot)] if eot in made else made for made in sequences]
        scores = output.sequences_scores.tolist()
        return [Decoded(*values) for values in zip(tokens, scores, no_speech_probs, strict=True)]

    def _prompts(
        self, requests: Sequence[DecodeRequest], prefixes: list[list[int]], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prompts and prefixes, (batch, seq), padded on the left; and the mask, None without padding."""
        sequences = [[*request.prompt, *prefix] for request, prefix in zip(requests, prefixes, strict=True)]
        width = max(map(len, sequences))
        ids = torch.tensor(
            [[self.tokenizer.eot] * (width - len(sequence)) + sequence for sequence in sequences],
            device=device,
        )
        if all(len(sequence) == width for sequence in sequences):
            return ids, None
        mask = torch.tensor(
            [[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences], device=device
        )
        return ids, mask

    def _rules(self, begin_index: int, device: torch.device) -> TimestampRules:
        config, tokenizer = self.model.generation_config, self.tokenizer
        return TimestampRules(
            begin_index=begin_index,
            eot=tokenizer.eot,
            timestamp_begin=tokenizer.timestamp_begin,
            timestamps=tokenizer.timestamps,
            suppress=[*(config.suppress_tokens or []), tokenizer.no_timestamps],
            suppress_at_begin=config.begin_suppress_tokens or [],
            max_initial_timestamp_index=getattr(config, "max_initial_timestamp_index", None),
            device=device,
        )

    def _max_new_tokens(self, prompt_length: int) -> int:
        """Half of the model's positions, or what a prompt leaves of them."""
        return min(self.tokenizer.max_length // 2, self.tokenizer.max_length - prompt_length)

    def _no_speech_probs(self, hidden: torch.Tensor, prefixes: list[list[int]]) -> list[float]:
        """hidden: the decoder's states of the prompts, (batch, seq, width).

        The probability is that of the token after <|startoftranscript|>.
        """
        logits = self.model.proj_out(hidden[:, -len(prefixes[0])])  # (batch, vocab)
        probs: list[float] = logits.float().softmax(-1)[:, self.tokenizer.no_speech].tolist()
        return probs
