"""Which tokens Whisper may make next: the rules of openai/whisper (decoding.py) for timestamps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

NEVER = float("-inf")


class TimestampRules:
    """A logits processor, the same as three of transformers', which loop over the sequences in Python.

    With 51,865 tokens on one CPU core, a step of one sequence takes 0.25 ms here and 3.6 ms there, of eight
    sequences 1.2 and 5.4 ms.

    Timestamps come in pairs except at the start and the end, and never go back. One is forced where all
    timestamps together are more probable than any text token.

    begin_index: length of the prompt. suppress, suppress_at_begin: tokens that are never made, or not as the
    first one. max_initial_timestamp_index: the latest first timestamp, in steps of 20 ms.
    """

    def __init__(
        self,
        *,
        begin_index: int,
        eot: int,
        timestamp_begin: int,
        timestamps: bool,
        suppress: Sequence[int],
        suppress_at_begin: Sequence[int],
        max_initial_timestamp_index: int | None,
        device: torch.device,
    ) -> None:
        self.begin_index, self.eot, self.timestamp_begin = begin_index, eot, timestamp_begin
        self.timestamps, self.max_initial = timestamps, max_initial_timestamp_index
        self.suppress = torch.tensor(suppress, dtype=torch.long, device=device)
        self.suppress_at_begin = torch.tensor(suppress_at_begin, dtype=torch.long, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Log probabilities, (batch, vocab), of the tokens that are allowed; -inf for all others.

        input_ids: (batch, seq), the prompt included. scores: logits, (batch, vocab).
        """
        return self._mask(input_ids[:, self.begin_index :], scores.float()).log_softmax(-1)

    def _mask(self, made: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """made: the tokens after the prompt, (batch, steps)."""
        begin = self.timestamp_begin
        scores = scores.index_fill(1, self.suppress, NEVER)
        if not made.shape[1]:
            scores = scores.index_fill(1, self.suppress_at_begin, NEVER)
        text, times = scores[:, :begin], scores[:, begin:]  # views
        if not self.timestamps:
            times.fill_(NEVER)
            return scores
        if not made.shape[1]:
            text.fill_(NEVER)
            if self.max_initial is not None:
                times[:, self.max_initial + 1 :] = NEVER
            return scores
        last_is_time = made[:, -1] >= begin  # (batch,)
        second_last_is_time = made[:, -2] >= begin if made.shape[1] > 1 else torch.ones_like(last_is_time)
        opened = last_is_time & second_last_is_time  # text has to follow
        closed = last_is_time & ~second_last_is_time  # another timestamp or the end has to follow
        times.masked_fill_(opened[:, None], NEVER)
        scores[:, : self.eot].masked_fill_(closed[:, None], NEVER)
        # The earliest timestamp allowed: after the latest one, or equal to it where a segment begins.
        earliest = (made - begin).clamp(min=-1).amax(1) + 1 - closed.long()
        times.masked_fill_(torch.arange(times.shape[1], device=made.device) < earliest[:, None], NEVER)
        text.masked_fill_((times.logsumexp(1) > text.amax(1))[:, None], NEVER)
        return scores
