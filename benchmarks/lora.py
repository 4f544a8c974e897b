"""What LoRA adapters cost a decode step: a model with four, step by step beside the same one without.

One thread's CPU time, so that other processes do not count. The smaller model shows the cost of each call, as
a GPU does, where launching a layer takes as long as running it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import machine, table, write
from workers.huggingface.lora import load_adapters

ROUNDS, BATCH, ADAPTERS, RANK, VOCAB = 60, 8, 4, 16, 2000
SIZES = ((256, 12), (1024, 4))  # hidden size, layers
STEPS: dict[str, list[str | None]] = {
    "loaded, not used": [None] * BATCH,
    "one adapter, half of the batch": ["0"] * (BATCH // 2) + [None] * (BATCH // 2),
    "one adapter, the batch": ["0"] * BATCH,
    "four adapters and none, mixed": ([None, "0", "1", "2", "3"] * BATCH)[:BATCH],
}


def make_model(hidden: int, layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def measure(hidden: int, layers: int, folder: Path) -> dict[str, float]:
    """CPU time of each kind of step by that of the model without adapters: the median of the rounds."""
    for name in map(str, range(ADAPTERS)):
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=RANK)
        peft.get_peft_model(make_model(hidden, layers), config).save_pretrained(folder / name)
    plain, model = make_model(hidden, layers), make_model(hidden, layers)
    set_adapters = load_adapters(model, {str(name): folder / str(name) for name in range(ADAPTERS)})
    ids = torch.randint(0, VOCAB, (BATCH, 1))

    def seconds(which: Any, names: list[str | None] | None) -> float:
        start = time.thread_time()
        if names is not None:
            set_adapters(names)
        which(input_ids=ids, use_cache=False)
        return time.thread_time() - start

    ratios: dict[str, list[float]] = {step: [] for step in STEPS}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for step, names in STEPS.items():
                ratios[step].append(seconds(model, names) / seconds(plain, None))
    return {step: statistics.median(values) for step, values in ratios.items()}


def main() -> None:
    where = machine("torch", "transformers", "peft")
    torch.set_num_threads(1)
    results = {}
    for hidden, layers in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            results[f"{layers} layers of {hidden}"] = measure(hidden, layers, Path(folder))
    rows = [[step, *(measured[step] for measured in results.values())] for step in STEPS]
    text = f"""# LoRA

A decode step of {BATCH} sequences with {ADAPTERS} adapters of rank {RANK} on all linear layers, times the
same step of the same model without adapters. Random Llamas in float32. CPU time of one thread, {ROUNDS} pairs
of steps in turn, the median. Written by `python -m benchmarks lora`.

{table(["step", *results], rows)}

Adapters that no sequence of a step uses cost nothing: the model then runs its own layers. What is left is
peft's: two more products a layer and adapter, for the sequences that use it, on the smaller model mostly the
calls. Not measured: a GPU, for want of one.

{table(["machine", ""], list(where.items()))}
"""
    write("lora", text, {"machine": where, "times_without_adapters": results})


if __name__ == "__main__":
    main()
