"""The cache that grows in place, and batches that sequences join and leave."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch

from serving.continuous_batching.kv_cache import (
    GROWTH,
    DecodeBatch,
    preallocated_cache,
    supports_joining_batches,
)
from serving.continuous_batching.sampling import SamplingParams
from serving.continuous_batching.sequence import ActiveSequence
from tests.serving.continuous_batching.tiny import tiny_llama

pytestmark = pytest.mark.engine
SHAPE = (2, 3)  # heads, head_dim of the caches here


def batch(model: Any, *lengths: int) -> DecodeBatch[ActiveSequence]:
    """Sequences of these lengths, padded on the left. Token t of a sequence of n has keys n + t / 1000."""
    sequences = [
        ActiveSequence(
            params=SamplingParams(1), prompt_ids=torch.zeros(length), random=random.Random(0),
            loop=asyncio.new_event_loop(),
        )
        for length in lengths
    ]  # fmt: skip
    cache, width = preallocated_cache(model), max(lengths)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    made = DecodeBatch(sequences, cache, mask)
    made.token_ids = torch.tensor(lengths)[:, None]
    keys = torch.stack([length + (torch.arange(width) - width + length) / 1000 for length in lengths])
    heads, head_dim = SHAPE
    states = keys[:, None, :, None].expand(-1, heads, -1, head_dim)
    for layer in cache.layers:
        layer.update(states, -states)
    return made


def check(found: DecodeBatch[ActiveSequence], *lengths: int) -> None:
    """`found` has the caches of sequences of these lengths, and no column of padding only."""
    assert [len(one.prompt_ids) for one in found.sequences] == list(lengths)
    assert found.token_ids[:, 0].tolist() == list(lengths)
    assert found.attention_mask.sum(1).tolist() == list(lengths)
    assert found.attention_mask.shape[1] == max(lengths)
    for layer in found.cache.layers:
        for i, length in enumerate(lengths):
            wanted = length + torch.arange(length) / 1000
            assert torch.equal(layer.keys[i, 1, -length:, 2], wanted)
            assert torch.equal(layer.values[i, 0, -length:, 0], -wanted)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.mark.parametrize(("ours", "theirs"), [((5, 2), (3,)), ((2,), (4, 7)), ((3,), (3,))])
def test_joined_batches_hold_the_caches_of_both(model: Any, ours: tuple[int], theirs: tuple[int]) -> None:
    joined = batch(model, *ours)
    joined.join(batch(model, *theirs))
    check(joined, *ours, *theirs)


@pytest.mark.parametrize(("lengths", "kept"), [((5, 2, 3), [1, 2]), ((5, 2, 3), [0, 2]), ((1, 4), [0])])
def test_padding_leaves_with_its_sequences(model: Any, lengths: tuple[int], kept: list[int]) -> None:
    left = batch(model, *lengths)
    left.keep(kept)
    check(left, *(lengths[i] for i in kept))


def test_the_cache_grows_in_place(model: Any) -> None:
    """And after a change of the batch in buffers of its own, with the same content as one that is copied."""
    found = batch(model, 4, 2)
    layer = found.cache.layers[0]
    wanted = layer.keys.clone()
    copies, address = 0, None
    for step in range(3 * GROWTH):
        if step == 10:
            found.keep([1, 0])
            wanted = wanted[[1, 0]]
        new = torch.full((2, SHAPE[0], 1, SHAPE[1]), float(step))
        keys, _ = layer.update(new, new)
        wanted = torch.cat([wanted, new], dim=2)
        assert torch.equal(keys, wanted)
        copies += keys.data_ptr() != address
        address = keys.data_ptr()
    assert copies <= 5


def test_which_models_join() -> None:
    """A checkpoint's repetition penalty is ours to apply; what else looks back over the text is not."""
    assert supports_joining_batches(
        tiny_llama(temperature=0.2, top_k=5, do_sample=True, repetition_penalty=1.3)
    )
    assert not supports_joining_batches(tiny_llama(no_repeat_ngram_size=3))
    assert not supports_joining_batches(tiny_llama(num_beams=2))
