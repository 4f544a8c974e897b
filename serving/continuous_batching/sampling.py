"""How the next token of each sequence is chosen."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

LEAST_TEMPERATURE = 1e-5  # float32 cannot hold what the logits become below


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one answer is made. temperature 0: always the likeliest token. seed None: never the same twice.

    top_k 0 and min_p 0: off. repetition_penalty None: the model's own. logprobs: how many of the likeliest
    tokens are told beside each one; None: not even its own chance. beams: with more than one, the likeliest
    answer that a beam search of this width finds, all at once; of the rest only `max_tokens`, `stop` and
    `repetition_penalty` then count.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    logprobs: int | None = None
    beams: int = 1


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token of an answer, the logarithm of its chance before sampling, and the likeliest in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampled(Protocol):
    """What sampling and a DecodeBatch need of a sequence. `inputs` has its prompt as `input_ids`."""

    inputs: Mapping[str, Any]
    sampling: SamplingParams
    random: random.Random
    tokens: list[int]
    over: bool
    seen: torch.Tensor | None
    chances: list[Logprob]


Row = TypeVar("Row", bound=Sampled)


def sample_next_tokens(logits: torch.Tensor, rows: Sequence[Sampled]) -> list[int]:
    """The next token of each row: the likeliest, or one drawn with the row's own random number.

    A row whose logits are not finite gets -1.
    """
    raw, logits = logits, _penalised(logits, rows)
    best, tokens = logits.max(dim=-1)
    drawn = [
        i for i, row in enumerate(rows) if row.sampling.temperature >= LEAST_TEMPERATURE and not row.over
    ]
    if drawn:
        settings = [
            (it.temperature, it.top_p, it.min_p, it.top_k or logits.shape[-1], rows[i].random.random())
            for i, it in ((i, rows[i].sampling) for i in drawn)
        ]
        temperature, top_p, min_p, top_k, number = torch.tensor(settings, device=logits.device).split(1, 1)
        width = min(logits.shape[-1], max(int(setting[3]) for setting in settings))
        scores, order = (logits[drawn].float() / temperature).topk(width, dim=-1)
        places = torch.arange(width, device=logits.device)
        chances = scores.masked_fill(places >= top_k, -torch.inf).softmax(dim=-1)
        before = chances.cumsum(dim=-1) - chances
        # The likeliest always stays.
        chances = chances.masked_fill((before >= top_p) | (chances < min_p * chances[:, :1]), 0.0)
        reached = chances.cumsum(dim=-1)
        at = (reached <= number * reached[:, -1:]).sum(dim=-1, keepdim=True)
        last = (chances > 0).sum(dim=-1, keepdim=True) - 1
        tokens[drawn] = order.gather(1, at.minimum(last).clamp(min=0)).squeeze(
            1
        )  # no chance at all: not finite
    tokens = tokens.masked_fill(~best.isfinite(), -1)
    told = [i for i, row in enumerate(rows) if row.sampling.logprobs is not None and not row.over]
    if told:
        _tell_chances(raw[told].float().log_softmax(dim=-1), tokens[told], [rows[i] for i in told])
    return tokens.tolist()  # type: ignore[no-any-return]


def _penalised(logits: torch.Tensor, rows: Sequence[Sampled]) -> torch.Tensor:
    """`logits` less what each row's repetition_penalty takes from the tokens that its text has."""
    asked = [i for i, row in enumerate(rows) if (row.sampling.repetition_penalty or 1.0) != 1.0]
    if not asked:
        return logits
    for row in (rows[i] for i in asked):
        if row.seen is None:
            row.seen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            row.seen[row.inputs["input_ids"][0].to(logits.device)] = True
            row.seen[row.tokens] = True
        elif row.tokens:
            row.seen[row.tokens[-1]] = True
    seen = torch.stack([row.seen for row in (rows[i] for i in asked) if row.seen is not None])
    penalty = torch.tensor([[rows[i].sampling.repetition_penalty] for i in asked], device=logits.device)
    plain = logits[asked].float()
    lower = torch.where(plain < 0, plain * penalty, plain / penalty)
    logits = logits.float().clone()
    logits[asked] = torch.where(seen, lower, plain)
    return logits


def _tell_chances(logprobs: torch.Tensor, tokens: torch.Tensor, rows: Sequence[Sampled]) -> None:
    own = logprobs.gather(1, tokens.clamp(min=0)[:, None]).squeeze(1).tolist()
    most = min(max(row.sampling.logprobs or 0 for row in rows), logprobs.shape[-1])
    values, ids = (found.tolist() for found in logprobs.topk(most, dim=-1))
    for row, token, logprob, top, beside in zip(rows, tokens.tolist(), own, values, ids, strict=True):
        pairs = tuple(zip(beside, top, strict=True))[: row.sampling.logprobs]
        row.chances.append(Logprob(token, logprob, pairs))
