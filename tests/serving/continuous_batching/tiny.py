"""A tiny random Llama, a tokenizer of letters and requests of all kinds for the tests of this folder."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import Any, ClassVar

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from serving.continuous_batching.generator import Generator, TextDelta
from serving.continuous_batching.sampling import SamplingParams

END = 0


class Letters:
    """A tokenizer as far as the engine needs one: token 65 is the letter A."""

    eos_token_id = None
    pad_token_id = None
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(token_id) for token_id in ids)


def tiny_llama(**changes: Any) -> Any:
    """changes: of the generation config; eos_token_id=None makes answers that end at their length only."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3,
        bos_token_id=1, eos_token_id=END, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.update(**changes)
    return model


GENERATION = {"joining": {}, "through generate": {"no_repeat_ngram_size": 100}}
"""Generation configs: with the second, sequences cannot join a batch, and run through `model.generate`."""


@contextmanager
def running(model: Any, **settings: Any) -> Iterator[Generator]:
    generator = Generator(model, Letters(), **settings)  # type: ignore[arg-type]
    yield generator
    generator.close()


def prompt(*ids: int, **more: Any) -> dict[str, Any]:
    mask = torch.ones(1, len(ids), dtype=torch.long)
    return {"input_ids": torch.tensor([ids]), "attention_mask": mask, **more}


async def ask(
    generator: Generator,
    inputs: dict[str, Any],
    params: SamplingParams,
    *,
    each: bool = True,
    after: float = 0,
) -> TextDelta:
    """The complete answer as one delta, asked for after so many seconds."""
    await asyncio.sleep(after)
    text, delta = "", TextDelta("", 0)
    async with aclosing(generator.stream(inputs, params, each=each)) as deltas:
        async for delta in deltas:
            assert delta.text or delta.finish_reason
            text += delta.text
    assert delta.finish_reason
    return TextDelta(text, delta.num_tokens, delta.finish_reason)


def mixed(number: int) -> list[tuple[dict[str, Any], SamplingParams]]:
    """Prompts and sampling params of all kinds."""
    draw = random.Random(7)
    requests = []
    for seed in range(number):
        ids = [draw.randrange(2, 128) for _ in range(draw.randrange(1, 60))]
        params = SamplingParams(
            max_tokens=draw.randrange(1, 50),
            temperature=draw.choice([0, 0, 0.7, 1.5]),
            top_p=draw.choice([1.0, 0.8]),
            seed=seed,
            stop=draw.choice([(), (), ("A", "bc")]),
        )
        requests.append((prompt(*ids), params))
    return requests


def by_generate(model: Any, inputs: dict[str, Any], max_tokens: int, **settings: Any) -> TextDelta:
    """The answer of transformers' own generate, greedy."""
    out = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False, pad_token_id=END, **settings)
    new = out[0, inputs["input_ids"].shape[1] :].tolist()
    text = "".join(chr(token_id) for token_id in new if token_id != END)
    return TextDelta(text, len(new), "stop" if END in new else "length")
