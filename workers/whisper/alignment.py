"""When each token is spoken: dynamic time warping over the decoder's attention to the audio.

The method is openai/whisper's (timing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .engine import MEDIAN_FILTER_WIDTH, TOKENS_PER_SECOND, DecodeResult

Path = list[tuple[int, int]]  # pairs of text token and encoder state, neither of which ever goes back


def dynamic_time_warping(cost: NDArray[np.float32]) -> Path:
    """The cheapest path through `cost`, (tokens, states), from corner to corner.

    Each diagonal of the table is one numpy step: cell by cell, Python takes a second a window.
    """
    rows, columns = cost.shape
    total = np.full((rows + 1, columns + 1), np.inf, np.float32)
    total[0, 0] = 0
    # Where the cheapest path to a cell comes from. 0: the diagonal, 1: the token before, 2: the state before.
    trace = np.zeros((rows + 1, columns + 1), np.int8)
    for diagonal in range(2, rows + columns + 1):
        i = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        j = diagonal - i
        previous = np.stack([total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]])  # (3, cells)
        trace[i, j] = previous.argmin(axis=0)
        total[i, j] = cost[i - 1, j - 1] + previous.min(axis=0)
    path, i, j = [], rows, columns
    while i and j:
        path.append((i - 1, j - 1))
        step = trace[i, j]
        i, j = i - (step != 2), j - (step != 1)
    return path[::-1]


def path_starts(path: Path) -> list[float]:
    """Seconds of the window at which `path` reaches each token."""
    tokens, states = np.asarray(path).T
    first = np.pad(np.diff(tokens), (1, 0), constant_values=1).astype(bool)
    starts: list[float] = (states[first] / TOKENS_PER_SECOND).tolist()
    return starts


def token_starts(result: DecodeResult) -> list[float]:
    """Seconds of the window at which each text token starts, and at which the last one ends.

    Empty where the result has no alignment. Takes some milliseconds of CPU.
    """
    if result.alignment_path is not None:
        return path_starts(result.alignment_path)
    if result.alignment_cost is not None:
        return path_starts(dynamic_time_warping(result.alignment_cost))
    return []


def median_filter(values: torch.Tensor) -> torch.Tensor:
    """The running median over MEDIAN_FILTER_WIDTH values of the last dimension, mirrored at its ends."""
    side = MEDIAN_FILTER_WIDTH // 2
    if values.shape[-1] <= side:
        return values
    padded = torch.nn.functional.pad(values, (side, side), mode="reflect")
    return padded.unfold(-1, MEDIAN_FILTER_WIDTH, 1).sort().values[..., side]


def cross_attention(
    decoder: Any,
    alignment_heads: Sequence[tuple[int, int]],
    sequences: Sequence[Sequence[int]],
    states: torch.Tensor,
    lengths: Sequence[int],
    pad: int,
) -> list[NDArray[np.float32]]:
    """The alignment heads' mean attention of each token to each encoder state that holds audio.

    decoder: a WhisperDecoder. alignment_heads: pairs of layer and head. states: (batch, states, width).
    lengths: how many states of each sequence hold audio. Returns (tokens, length) for each of `sequences`.
    """
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[pad] * (width - len(s))] for s in sequences], device=states.device)
    inputs: dict[int, torch.Tensor] = {}  # of the cross attention, by layer: (batch, seq, width)

    def record(layer: int) -> Any:
        def hook(_: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
            inputs[layer] = args[0] if args else kwargs["hidden_states"]

        return decoder.layers[layer].encoder_attn.register_forward_pre_hook(hook, with_kwargs=True)

    hooks = [record(layer) for layer in {layer for layer, _ in alignment_heads}]
    try:
        decoder(input_ids=ids, encoder_hidden_states=states)
    finally:
        for hook in hooks:
            hook.remove()
    attention = []
    for i, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        total = torch.zeros(len(sequence), length, device=states.device)
        for layer, head in alignment_heads:  # one by one: all of a large model's take gigabytes
            module = decoder.layers[layer].encoder_attn
            part = slice(head * module.head_dim, (head + 1) * module.head_dim)
            query = module.q_proj(inputs[layer][i])[:, part] * module.scaling  # (seq, head_dim)
            key = module.k_proj(states[i, :length])[:, part]  # (length, head_dim)
            weights = (query @ key.T).float().softmax(-1)[: len(sequence)]  # (tokens, length)
            std, mean = torch.std_mean(weights, dim=0, keepdim=True, unbiased=False)
            total += median_filter((weights - mean) / std.clamp(min=1e-9))
        attention.append((total / len(alignment_heads)).cpu().numpy())
    return attention
