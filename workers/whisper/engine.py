"""The form in which chunks of audio reach an engine, and in which its results come back."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .schemas import Task

SAMPLE_RATE = 16_000  # Hz, of the audio that the model takes
TOKENS_PER_SECOND = 50  # states of the encoder for a second of audio, and timestamp tokens
REPEATED_TOKENS = 5
MEDIAN_FILTER_WIDTH = 7  # states, over which attention is smoothed before the alignment

Samples = NDArray[np.float32]  # (samples,), mono at SAMPLE_RATE


@dataclass(eq=False)
class DecodeRequest:
    """A window of at most 30 seconds, to be decoded once.

    features: log-mel spectrogram, (n_mels, 3000), padded with silence. seconds: length of the audio in it.
    language: code; None: to be detected. prompt: token ids before the start of the transcript.
    temperature: 0 is greedy decoding, or beam search where beam_size is above 1.
    word_timestamps: align the text tokens with the audio; else that is done only for `repeats_itself`.
    cancelled: nobody waits for the result any more; set while the request is in a batch.
    """

    features: NDArray[np.float32]
    seconds: float
    language: str | None
    task: Task
    prompt: list[int]
    temperature: float
    beam_size: int
    word_timestamps: bool
    cancelled: bool = False


@dataclass(frozen=True)
class DecodeResult:
    """What the model recognised in a window.

    tokens: text and timestamp tokens, without the end token.
    language_probability: None where the language was given.
    avg_logprob: mean log probability of the tokens, the end token included.
    Where the text tokens are aligned, one of: alignment_cost, (text tokens + 1, encoder states), which
    dynamic time warping turns into a path; alignment_path, pairs of text token and encoder state.
    """

    tokens: list[int]
    language: str | None
    language_probability: float | None
    avg_logprob: float
    no_speech_prob: float
    temperature: float = 0.0
    alignment_cost: NDArray[np.float32] | None = None
    alignment_path: list[tuple[int, int]] | None = None


def repeats_itself(tokens: Sequence[int], timestamp_begin: int) -> bool:
    """Whether a result has the same segment twice, of at least REPEATED_TOKENS: spoken twice, or made up."""
    segments, text = set(), []
    for token in [*tokens, timestamp_begin]:
        if token < timestamp_begin:
            text.append(token)
        elif text:
            if len(text) >= REPEATED_TOKENS and tuple(text) in segments:
                return True
            segments.add(tuple(text))
            text = []
    return False


def to_align(
    requests: Sequence[DecodeRequest], results: Sequence[Sequence[int]], *, timestamp_begin: int, eot: int
) -> list[int]:
    """The indices of the results, tokens each, whose text tokens are to be aligned."""
    return [
        i
        for i, (request, tokens) in enumerate(zip(requests, results, strict=True))
        if any(token < eot for token in tokens)
        and (request.word_timestamps or repeats_itself(tokens, timestamp_begin))
    ]


class Engine(Protocol):
    """One way to run the model. `decode` is called on one thread at a time, with requests of one `key`."""

    def key(self, request: DecodeRequest) -> Hashable: ...

    def decode(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult]: ...
