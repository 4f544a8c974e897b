"""The huggingface worker in the process of the tests, and what transformers itself generates."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shared.errors import StartError
from tests.helpers import generating, send

serving = partial(generating, "huggingface")
MESSAGES = [{"role": "user", "content": "Name three rivers."}]
PROMPTS = [
    "The river",
    "the old stone house and",
    "Name",
    "into the sea. Name three rivers",
    "more of the same",
]


def start_error(**env: str) -> StartError:
    """Why a worker with these settings does not start."""
    with pytest.raises(StartError) as caught, serving(**env):
        pass
    return caught.value


async def response(worker: ModuleType, prompt: str, **payload: Any) -> str:
    """The greedy answer to a prompt."""
    answer = await send(worker.handler, prompt=prompt, max_tokens=24, temperature=0, **payload)
    assert "error" not in answer, answer
    return str(answer["response"])


def tokenizer_of(worker: ModuleType) -> Any:
    return worker.engine.generator.tokenizer


def generated(
    model: Any, tokenizer: Any, prompt: str, max_tokens: int = 24, **settings: Any
) -> tuple[str, int, str]:
    """What `model.generate` makes of a prompt: text, number of tokens and finish_reason."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(
        **inputs, do_sample=False, max_new_tokens=max_tokens, pad_token_id=tokenizer.eos_token_id, **settings
    )
    new = out[0, inputs["input_ids"].shape[1] :].tolist()
    reason = "stop" if new[-1] == tokenizer.eos_token_id else "length"
    return tokenizer.decode(new, skip_special_tokens=True), len(new), reason


def make_adapter(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """A random adapter of peft's for the model in `base`, with weights large enough to change its answers."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 8, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers by an older name, and has remarks
        model = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(task_type="CAUSAL_LM", **targets)
        )
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    weight.normal_(0, 0.3)
        model.save_pretrained(folder)
    return folder
