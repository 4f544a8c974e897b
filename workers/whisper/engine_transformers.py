"""transformers' Whisper: requests of any language, task, prompt and temperature share a batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    StoppingCriteriaList,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from shared import startup
from shared.errors import StartError
from shared.volume import ModelPath

from .alignment import cross_attention
from .engine import TOKENS_PER_SECOND, DecodeRequest, DecodeResult, to_align
from .processor import load_feature_extractor, load_tokenizer, read_json
from .timestamp_rules import TimestampRules
from .tokenizer import WhisperTokenizer


def load(
    model_path: ModelPath, *, name: str, device: torch.device, dtype: torch.dtype, timestamps: bool
) -> tuple[TransformersEngine, WhisperTokenizer, WhisperFeatureExtractor]:
    """The engine, tokenizer and feature extractor of a model. Logs the phase load.

    name: for errors. timestamps: whether the model was trained with timestamp tokens.
    Raises StartError for a model that is not Whisper's, or lacks weights or a tokenizer.
    """
    path = model_path.path
    model_type = read_json(path / "config.json").get("model_type")
    if model_type != "whisper":
        if (path / "model.bin").exists() and next(path.glob("vocabulary.*"), None):
            message = f"{name} is a CTranslate2 model. Set ENGINE=faster-whisper."
        else:
            message = f"{name} is a model of the type {model_type}, not whisper."
        raise StartError(message, code="unsupported_architecture")
    with startup.phase("load") as phase:
        tokenizer, feature_extractor = load_tokenizer(path, name), load_feature_extractor(path)
        model, report = WhisperForConditionalGeneration.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        if missing := report["missing_keys"]:
            message = f"{name} lacks {len(missing)} weights, such as {min(missing)}. Use another checkpoint."
            raise StartError(message, code="incomplete")
        model.to(device).eval()
        phase.bytes = sum(weight.nbytes for weight in model.parameters())
    # Fine-tunes may lack the flag. As in openai/whisper, English-only models have a vocabulary of 51,864.
    multilingual = getattr(model.generation_config, "is_multilingual", None)
    if multilingual is None:
        multilingual = model.config.vocab_size >= 51_865
    whisper_tokenizer = WhisperTokenizer(
        tokenizer,
        multilingual=bool(multilingual),
        max_length=model.config.max_target_positions,
        timestamps=timestamps,
    )
    return TransformersEngine(model, whisper_tokenizer), whisper_tokenizer, feature_extractor


class Decoded(NamedTuple):
    tokens: list[int]  # without the end token
    avg_logprob: float
    no_speech_prob: float


class TransformersEngine:
    """See `engine.Engine`.

    alignment_heads: pairs of layer and head whose attention follows the audio.
    """

    def __init__(self, model: Any, tokenizer: WhisperTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        config = model.config
        # Where the checkpoint does not name them, all heads of the later half, as openai/whisper does.
        later_half = range(config.decoder_layers // 2, config.decoder_layers)
        self.alignment_heads: list[tuple[int, int]] = [
            (layer, head) for layer, head in getattr(model.generation_config, "alignment_heads", None) or []
        ] or [(layer, head) for layer in later_half for head in range(config.decoder_attention_heads)]

    def key(self, request: DecodeRequest) -> Hashable:
        """The number of beams."""
        return 1 if request.temperature else request.beam_size

    def decode(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        features = torch.from_numpy(np.stack([request.features for request in requests]))
        with torch.inference_mode():
            features = features.to(self.model.device, self.model.dtype)  # (batch, n_mels, 3000)
            states = self.model.model.encoder(features).last_hidden_state  # (batch, 1500, width)
            languages = self._detect_languages(states, requests)
            prefixes = [
                self.tokenizer.sot_sequence(code, request.task)
                for request, (code, _) in zip(requests, languages, strict=True)
            ]
            decode = self._sample if self.key(requests[0]) == 1 else self._beam_search
            decoded = decode(states, requests, prefixes)
            texts = [[token for token in d.tokens if token < self.tokenizer.eot] for d in decoded]
            made = [d.tokens for d in decoded]
            begin, eot = self.tokenizer.timestamp_begin, self.tokenizer.eot
            aligned = to_align(requests, made, timestamp_begin=begin, eot=eot)
            costs = self._alignment_costs(states, requests, prefixes, texts, aligned)
        return [
            DecodeResult(
                tokens=sequence.tokens,
                language=language,
                language_probability=probability,
                avg_logprob=sequence.avg_logprob,
                no_speech_prob=sequence.no_speech_prob,
                temperature=request.temperature,
                alignment_cost=cost,
            )
            for request, sequence, (language, probability), cost in zip(
                requests, decoded, languages, costs, strict=True
            )
        ]

    def _detect_languages(
        self, states: torch.Tensor, requests: Sequence[DecodeRequest]
    ) -> list[tuple[str | None, float | None]]:
        """The language of each request, given or detected, and the probability of a detected one."""
        languages: list[tuple[str | None, float | None]] = [(request.language, None) for request in requests]
        unknown = [index for index, request in enumerate(requests) if request.language is None]
        if unknown and self.tokenizer.languages:
            sot = torch.full((len(unknown), 1), self.tokenizer.sot, device=states.device)
            out = self.model.model.decoder(input_ids=sot, encoder_hidden_states=states[unknown])
            tokens = list(self.tokenizer.languages)
            logits = self.model.proj_out(out.last_hidden_state[:, -1])[:, tokens]  # (unknown, languages)
            for index, probs in zip(unknown, logits.float().softmax(-1), strict=True):
                best = int(probs.argmax())
                languages[index] = (self.tokenizer.languages[tokens[best]], float(probs[best]))
        return languages

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

    def _sample(
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

    def _beam_search(
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

    def _alignment_costs(
        self,
        states: torch.Tensor,
        requests: Sequence[DecodeRequest],
        prefixes: list[list[int]],
        texts: list[list[int]],
        aligned: list[int],
    ) -> list[NDArray[np.float32] | None]:
        """For each request of the indices `aligned`: (text tokens + 1, states), for dynamic time warping.

        texts: the text tokens.
        """
        tokenizer = self.tokenizer
        costs: list[NDArray[np.float32] | None] = [None] * len(requests)
        if not aligned:
            return costs
        heads = [[token for token in prefixes[i] if token != tokenizer.no_timestamps] for i in aligned]
        sequences = [
            [*head, tokenizer.no_timestamps, *texts[i], tokenizer.eot]
            for i, head in zip(aligned, heads, strict=True)
        ]
        lengths = [max(1, round(requests[i].seconds * TOKENS_PER_SECOND)) for i in aligned]
        attention = cross_attention(
            self.model.model.decoder, self.alignment_heads, sequences, states[aligned], lengths, tokenizer.eot
        )
        for i, head, weights in zip(aligned, heads, attention, strict=True):
            # The attention that makes a token is that of the position before it: from <|notimestamps|>, which
            # makes the first text token, to the last one, which makes the end.
            costs[i] = -weights[len(head) : -1]
        return costs
