"""Token ids from texts and padded tensors from token ids, for encoders and rerankers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shared.errors import JobError, invalid

MAX_REPEATED_CHARACTERS = 20_000_000  # as many as one request can hold
# Tokens in one padded batch. A GPU needs many (16384 is text-embeddings-inference's default); on two CPU
# cores about a thousand was fastest, and larger batches were slower than none: benchmarks/results.
GPU_BATCH_TOKENS = 16384
CPU_BATCH_TOKENS = 1024


def check_unicode(texts: Sequence[str], param: str) -> None:
    """Raise JobError for a lone surrogate, which JSON can escape and no tokenizer takes."""
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise invalid(
                param_of(param, number, len(texts)),
                "half of a surrogate pair, which is not valid Unicode. Send complete characters.",
            ) from None


def check_repeated(text: str, times: int, param: str) -> None:
    """Raise JobError for a prefix that would fill the memory when it is put before each of `times` texts."""
    if len(text) * times > MAX_REPEATED_CHARACTERS:
        raise invalid(
            param,
            f"{len(text)} characters before each of {times} texts exceed {MAX_REPEATED_CHARACTERS} "
            "characters in total. Shorten it, or split the job.",
            "too_large",
        )


def too_long(param: str, length: int, limit: int, what: str = "text") -> JobError:
    """The error for an input of `length` tokens that may not be truncated to the model's `limit`."""
    message = f"{length} tokens, and the model takes {limit}. Shorten the {what}, or set truncate to true."
    return invalid(param, message, "too_long")


def param_of(param: str, number: int, count: int) -> str:
    """The name of one of `count` inputs that came in the field `param`: `texts.3`; of a single one `text`."""
    return f"{param}.{number}" if count > 1 else param


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids by a tokenizer of transformers, without special tokens, not truncated."""
    ids: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        truncation=False,
        padding=False,
        verbose=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    return ids


def pad(sequences: Sequence[Sequence[int]], *, value: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences filled up with `value`, and the attention mask; both int64, (batch, longest sequence).

    left: pad on the left, as causal models need it.
    """
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), value)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        start = longest - len(sequence) if left else 0
        ids[row, start : start + len(sequence)] = torch.tensor(sequence)
        mask[row, start : start + len(sequence)] = 1
    return ids, mask


def batch_tokens(device: torch.device, limit: int | None) -> int:
    """Tokens in one padded batch: `limit`, or what suits the device."""
    return limit or (CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS)
