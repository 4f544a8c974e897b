"""Sampling from given logits, without a model."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch

from serving.continuous_batching.sampling import NO_TOKEN, Logprob, SamplingParams, sample_next_tokens
from serving.continuous_batching.sequence import ActiveSequence

pytestmark = pytest.mark.engine  # torch is loaded


def sequence(*, prompt: tuple[int, ...] = (), seed: int = 0, **params: Any) -> ActiveSequence:
    return ActiveSequence(
        params=SamplingParams(1, **params), prompt_ids=torch.tensor(prompt, dtype=torch.long),
        random=random.Random(seed), loop=asyncio.new_event_loop(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.7}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 3, "top_p": 0.83}, [0.625, 0.375, 0, 0]),  # two of top_k's three have 0.84 of its mass
        ({"min_p": 0.2}, [10 / 19, 6 / 19, 3 / 19, 0]),
    ],
)
def test_tokens_are_drawn_from_the_distribution(params: dict[str, Any], expected: list[float]) -> None:
    draws = 4000
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).repeat(draws, 1)
    token_ids = sample_next_tokens(logits, [sequence(temperature=1.0, **params)] * draws)
    shares = torch.bincount(torch.tensor(token_ids), minlength=4) / draws
    # Four standard deviations of the largest share.
    assert torch.allclose(shares, torch.tensor(expected, dtype=torch.float), atol=0.032), shares


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-38, 1e-7, 1e-5])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.randn(50, generator=torch.manual_seed(0)).sort().values.repeat(3, 1)
    assert (
        sample_next_tokens(logits, [sequence(seed=i, temperature=temperature) for i in range(3)]) == [49] * 3
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite_give_no_token(temperature: float) -> None:
    logits = torch.tensor([[float("nan")] * 4, [float("-inf")] * 4, [0.0, 9.0, 0.0, 0.0]])
    sequences = [sequence(temperature=temperature, top_k=2, top_p=0.9) for _ in range(3)]
    assert sample_next_tokens(logits, sequences) == [NO_TOKEN, NO_TOKEN, 1]


def test_the_repetition_penalty_is_for_the_tokens_of_prompt_and_answer() -> None:
    """Positive logits are divided by it, negative ones multiplied, each sequence by its own penalty."""
    logits = torch.tensor([[3.0, 2.5, 2.0], [3.0, 2.5, 2.0], [-1.0, -1.5, -9.0]])
    sequences = [sequence(prompt=(0,), repetition_penalty=penalty) for penalty in (1.0, 1.3, 2.0)]
    assert sample_next_tokens(logits, sequences) == [0, 1, 1]
    for one, token_id in zip(sequences, [0, 1, 1], strict=True):
        one.token_ids.append(token_id)
    assert sample_next_tokens(logits, sequences) == [0, 0, 0]  # 3 / 1.3 is more than 2.5 / 1.3


def test_presence_and_frequency_penalties_are_for_the_tokens_of_the_answer() -> None:
    """The prompt's count for none of them. Each step counts the newest token."""
    logits = torch.tensor([[3.0, 2.0, 1.0]]).repeat(3, 1)
    penalties = ({"presence_penalty": 1.5}, {"frequency_penalty": 0.6}, {})
    sequences = [sequence(prompt=(0, 0), **penalty) for penalty in penalties]
    generated = []
    for _ in range(4):
        token_ids = sample_next_tokens(logits, sequences)
        for one, token_id in zip(sequences, token_ids, strict=True):
            one.token_ids.append(token_id)
        generated.append(token_ids)
    # 3 - 1.5 < 2, then 2 - 1.5 < 3 - 1.5; 3 - 0.6 > 2 and 3 - 2 * 0.6 < 2, then 2 - 0.6 < 3 - 2 * 0.6
    assert generated == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_a_logit_bias_and_min_tokens_change_the_logits() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]]).repeat(3, 1)
    sequences = [sequence(logit_bias=((2, 2.5), (0, -0.5))), sequence(min_tokens=2), sequence()]
    sequences[1].end_token_ids = frozenset({0, 1})
    assert sample_next_tokens(logits, sequences) == [2, 2, 0]
    sequences[1].token_ids += [2, 2]
    assert sample_next_tokens(logits, sequences) == [2, 0, 0]


def test_logprobs_are_those_of_the_logits_without_penalty_and_temperature() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(3, 1)
    sequences = [
        sequence(prompt=(0,), repetition_penalty=20.0, logprobs=2, temperature=1.0, top_k=1),
        sequence(logprobs=0),
        sequence(),
    ]
    first, second, _ = sample_next_tokens(logits, sequences)
    (penalised,) = sequences[0].logprobs
    assert penalised.token_id == first
    assert penalised.logprob == pytest.approx(logits[0, first].item())
    assert [token_id for token_id, _ in penalised.top] == [0, 1]
    assert sequences[1].logprobs == [Logprob(second, pytest.approx(logits[1, second].item()))]  # type: ignore[arg-type]
    assert sequences[2].logprobs == []
