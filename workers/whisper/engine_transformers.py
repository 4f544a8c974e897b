"""transformers' Whisper: requests of any language, task, prompt and temperature share a batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from shared import startup
from shared.errors import StartError
from shared.volume import ModelPath

from .alignment import cross_attention
from .decoding import Decoder
from .engine import TOKENS_PER_SECOND, DecodeRequest, DecodeResult, to_align
from .processor import load_feature_extractor, load_tokenizer, read_json
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


class TransformersEngine:
    """See `engine.Engine`.

    alignment_heads: pairs of layer and head whose attention follows the audio.
    """

    def __init__(self, model: Any, tokenizer: WhisperTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.decoder = Decoder(model, tokenizer)
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
            decode = self.decoder.sample if self.key(requests[0]) == 1 else self.decoder.beam_search
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
