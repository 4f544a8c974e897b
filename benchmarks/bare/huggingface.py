"""transformers and nothing else: huggingface.py MODEL TOKENS, prompts as a JSON list on standard input.

Prints the seconds of the first prompt through `generate` (the median of three), and of all prompts through
transformers' continuous batching and through shared.generation's engine, in this order and in one process.
"""

import asyncio
import json
import statistics
import sys
import time
from contextlib import aclosing

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import ContinuousBatchingConfig, GenerationConfig

from shared.generation import Generator, Sampling

name, tokens = sys.argv[1], int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
model.generation_config.eos_token_id = None
prompts = [tokenizer(text)["input_ids"] for text in json.load(sys.stdin)]


def generate(ids: list[int]) -> float:
    begin = time.perf_counter()
    model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=tokens, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return time.perf_counter() - begin


async def engine(count: int) -> float:
    generator = Generator(model, tokenizer)
    generator._ends = frozenset()

    async def one(ids: list[int]) -> None:
        tensor = torch.tensor([ids])
        inputs = {"input_ids": tensor, "attention_mask": torch.ones_like(tensor)}
        async with aclosing(generator.stream(inputs, Sampling(tokens), each=False)) as pieces:
            await anext(pieces)

    await one(prompts[0][:2])
    begin = time.perf_counter()
    await asyncio.gather(*map(one, prompts[:count]))
    took = time.perf_counter() - begin
    generator.close()
    return took


def continuous() -> float:
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    settings = ContinuousBatchingConfig(num_blocks=64, page_size=64, max_batch_tokens=512)
    begin = time.perf_counter()
    model.generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=settings, progress_bar=False
    )
    return time.perf_counter() - begin


generate(prompts[0])
found = {"generate": statistics.median(generate(prompts[0]) for _ in range(3))}
found["engine_one"] = statistics.median(asyncio.run(engine(1)) for _ in range(3))
found["engine"] = asyncio.run(engine(len(prompts)))
try:
    found["continuous"] = continuous()
except Exception as error:
    print(repr(error), file=sys.stderr)
print(json.dumps(found))
