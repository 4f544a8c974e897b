"""How the next token of each sequence is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from serving.continuous_batching.sequence import ActiveSequence

MIN_TEMPERATURE = 1e-5  # logits divided by less are more than float32 holds
NO_TOKEN = -1
"""In place of a token id where the logits are not finite."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one answer is sampled, with vLLM's names and definitions.

    temperature: 0 is greedy decoding. seed: None gives another answer each time. top_k, min_p: 0 is off.
    repetition_penalty: None is the model's own. presence_penalty, frequency_penalty: of the answer's tokens.
    logit_bias: (token id, what is added to its logit). stop_token_ids: end the answer as the end-of-sequence
    tokens do. ignore_eos: only those others end it. min_tokens: no token and no stop string ends it before.
    skip_special_tokens: leave special tokens out of the text. logprobs: how many of the likeliest tokens are
    reported beside each token; None: not even the token's own logprob.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of a token before temperature, penalties and cuts.

    top: the likeliest tokens at this position and their log-probabilities, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def sample_next_tokens(logits: torch.Tensor, sequences: Sequence[ActiveSequence]) -> list[int]:
    """The next token id of each sequence: the likeliest, or one drawn with the sequence's own random number.

    logits: (batch, vocab). A sequence whose logits are not finite gets NO_TOKEN. Appends to the `logprobs` of
    sequences that ask for them.
    """
    penalised = _apply_bias(logits, sequences)  # (batch, vocab)
    penalised = _apply_repetition_penalty(penalised, sequences)
    penalised = _apply_output_penalties(penalised, sequences)
    best, token_ids = penalised.max(dim=-1)  # (batch,), (batch,)
    drawn = [
        i for i, one in enumerate(sequences) if one.params.temperature >= MIN_TEMPERATURE and not one.finished
    ]
    if drawn:
        token_ids[drawn] = _draw(penalised[drawn], [sequences[i] for i in drawn])
    token_ids = token_ids.masked_fill(~best.isfinite(), NO_TOKEN)
    with_logprobs = [
        i for i, one in enumerate(sequences) if one.params.logprobs is not None and not one.finished
    ]
    if with_logprobs:
        logprobs = logits[with_logprobs].float().log_softmax(dim=-1)  # (with_logprobs, vocab)
        _append_logprobs(logprobs, token_ids[with_logprobs], [sequences[i] for i in with_logprobs])
    return token_ids.tolist()  # type: ignore[no-any-return]


def _draw(logits: torch.Tensor, sequences: Sequence[ActiveSequence]) -> torch.Tensor:
    """One token id for each sequence, drawn from what temperature, top_k, top_p and min_p leave.

    logits: (batch, vocab). Returns (batch,).
    """
    vocab = logits.shape[-1]
    params = [one.params for one in sequences]
    width = min(vocab, max(each.top_k or vocab for each in params))
    settings = [
        (each.temperature, each.top_p, each.min_p, each.top_k or vocab, one.random.random())
        for each, one in zip(params, sequences, strict=True)
    ]
    # One tensor, so that one copy goes to the GPU.
    columns = torch.tensor(settings, device=logits.device).split(1, dim=1)
    temperature, top_p, min_p, top_k, uniform = columns  # (batch, 1) each
    scores, order = (logits.float() / temperature).topk(width, dim=-1)  # (batch, width), best first
    rank = torch.arange(width, device=logits.device)  # (width,)
    probs = scores.masked_fill(rank >= top_k, -torch.inf).softmax(dim=-1)  # (batch, width)
    mass_before = probs.cumsum(dim=-1) - probs  # (batch, width); 0 for the likeliest, which always stays
    cut = (mass_before >= top_p) | (probs < min_p * probs[:, :1])
    probs = probs.masked_fill(cut, 0.0)
    cumulative = probs.cumsum(dim=-1)  # (batch, width)
    position = (cumulative <= uniform * cumulative[:, -1:]).sum(dim=-1, keepdim=True)  # (batch, 1)
    last = (probs > 0).sum(dim=-1, keepdim=True) - 1  # (batch, 1); -1 where no probability is a number
    position = position.minimum(last).clamp(min=0)
    return order.gather(1, position).squeeze(1)


def _apply_bias(logits: torch.Tensor, sequences: Sequence[ActiveSequence]) -> torch.Tensor:
    """`logits`, (batch, vocab), with each sequence's logit_bias, and no end token before its min_tokens."""
    biased = [
        i
        for i, one in enumerate(sequences)
        if one.params.logit_bias or len(one.token_ids) < one.params.min_tokens
    ]
    if not biased:
        return logits
    result = logits.float().clone()
    for i in biased:
        one = sequences[i]
        if one.params.logit_bias:
            token_ids, bias = zip(*one.params.logit_bias, strict=True)
            result[i, list(token_ids)] += torch.tensor(bias, device=logits.device)
        if len(one.token_ids) < one.params.min_tokens:
            result[i, list(one.end_token_ids)] = -torch.inf
    return result


def _apply_output_penalties(logits: torch.Tensor, sequences: Sequence[ActiveSequence]) -> torch.Tensor:
    """`logits`, (batch, vocab), lowered for the tokens that a sequence's answer has.

    The formula is OpenAI's: minus count * frequency_penalty, minus presence_penalty where the count is not 0.
    """
    penalised = [
        i for i, one in enumerate(sequences) if one.params.frequency_penalty or one.params.presence_penalty
    ]
    if not penalised:
        return logits
    counts = torch.stack([_output_counts(sequences[i], logits) for i in penalised])  # (penalised, vocab)
    penalties = [
        (sequences[i].params.frequency_penalty, sequences[i].params.presence_penalty) for i in penalised
    ]
    frequency, presence = torch.tensor(penalties, device=logits.device).split(1, dim=1)  # (penalised, 1) each
    result = logits.float().clone()
    result[penalised] -= frequency * counts + presence * (counts > 0)
    return result


def _output_counts(sequence: ActiveSequence, logits: torch.Tensor) -> torch.Tensor:
    """How often the answer so far has each token id, (vocab,). Kept in the sequence."""
    counts = sequence.output_counts
    if counts is None:
        token_ids = torch.tensor(sequence.token_ids, dtype=torch.long, device=logits.device)
        counts = torch.bincount(token_ids, minlength=logits.shape[-1]).float()
        sequence.output_counts = counts
    elif sequence.token_ids:
        counts[sequence.token_ids[-1]] += 1
    return counts


def _apply_repetition_penalty(logits: torch.Tensor, sequences: Sequence[ActiveSequence]) -> torch.Tensor:
    """`logits`, (batch, vocab), lowered for the tokens that a sequence's prompt and answer have.

    The formula is transformers' RepetitionPenaltyLogitsProcessor's: logits / penalty, or times it below 0.
    """
    penalised = [i for i, one in enumerate(sequences) if (one.params.repetition_penalty or 1.0) != 1.0]
    if not penalised:
        return logits
    seen = torch.stack([_seen_tokens(sequences[i], logits) for i in penalised])  # (penalised, vocab), bool
    penalties = [[sequences[i].params.repetition_penalty] for i in penalised]
    penalty = torch.tensor(penalties, device=logits.device)  # (penalised, 1)
    plain = logits[penalised].float()  # (penalised, vocab)
    lowered = torch.where(plain < 0, plain * penalty, plain / penalty)
    result = logits.float().clone()
    result[penalised] = torch.where(seen, lowered, plain)
    return result


def _seen_tokens(sequence: ActiveSequence, logits: torch.Tensor) -> torch.Tensor:
    """True for each token id of the prompt and the answer so far, (vocab,). Kept in the sequence."""
    seen = sequence.seen_tokens
    if seen is None:
        seen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        seen[sequence.prompt_ids.to(logits.device)] = True
        seen[sequence.token_ids] = True
        sequence.seen_tokens = seen
    elif sequence.token_ids:
        seen[sequence.token_ids[-1]] = True
    return seen


def _append_logprobs(
    logprobs: torch.Tensor, token_ids: torch.Tensor, sequences: Sequence[ActiveSequence]
) -> None:
    """logprobs: (batch, vocab). token_ids: (batch,)."""
    own = logprobs.gather(1, token_ids.clamp(min=0)[:, None]).squeeze(1).tolist()
    width = min(max(one.params.logprobs or 0 for one in sequences), logprobs.shape[-1])
    top_logprobs, top_ids = (tensor.tolist() for tensor in logprobs.topk(width, dim=-1))  # (batch, width)
    for i, (sequence, token_id) in enumerate(zip(sequences, token_ids.tolist(), strict=True)):
        top = tuple(zip(top_ids[i], top_logprobs[i], strict=True))[: sequence.params.logprobs]
        sequence.logprobs.append(Logprob(token_id, own[i], top))
