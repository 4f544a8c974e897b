"""A prompt and its answer while it is decoded, and how several become one input of a transformers model."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import pad

from serving.continuous_batching.sequence import ActiveSequence

FinishReason = Literal["stop", "length"]
# Model inputs with a column for each token of the prompt. Others are joined along their first dimension.
_TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(slots=True, eq=False, kw_only=True)
class TextSequence(ActiveSequence):
    """Its updates are (new token ids, finish reason or None).

    inputs: the model's, with a first dimension of one. prefill_key: see `prefill_key`. each_token: emit every
    token, not only the end. emitted: how many tokens are.
    """

    inputs: Mapping[str, Any]
    prefill_key: Hashable
    each_token: bool
    adapter: str | None
    emitted: int = 0

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)


def prefill_key(inputs: Mapping[str, Any]) -> Hashable:
    """Prompts with equal keys can be prefilled together: only their tokens need padding."""
    return tuple(
        (name, value.dtype, tuple(value.shape[1:])) if hasattr(value, "dtype") else (name, id(value))
        for name, value in sorted(inputs.items())
        if name not in _TOKEN_INPUTS
    )


def collate(
    sequences: Sequence[TextSequence], *, pad_token_id: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """One model input of the prompts and their answers so far, padded on the left to the longest.

    dtype: of inputs that are floating point, such as pixels.
    """
    longest = max(sequence.length for sequence in sequences)
    inputs: dict[str, Any] = {}
    for name, first in sequences[0].inputs.items():
        parts = [sequence.inputs[name] for sequence in sequences]
        if name in _TOKEN_INPUTS:
            filler = pad_token_id if name == "input_ids" else 0
            for i, sequence in enumerate(sequences):
                answer = torch.tensor([sequence.token_ids], dtype=first.dtype)  # (1, answer)
                if name != "input_ids":
                    answer = torch.full_like(answer, 1 if name == "attention_mask" else 0)
                padding = (longest - sequence.length, 0)
                parts[i] = pad(torch.cat([parts[i], answer], 1), padding, value=filler)  # (1, longest)
        if len(parts) > 1 or name in _TOKEN_INPUTS:
            first = torch.cat(parts)  # (batch, ...)
        if isinstance(first, torch.Tensor):
            first = first.to(device, dtype if first.is_floating_point() else None)
        inputs[name] = first
    return inputs
