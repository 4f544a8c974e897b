"""The huggingface worker in the process of the tests, and what transformers itself generates."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import pytest

from shared.errors import StartError
from tests import helpers
from tests.helpers import send

MESSAGES = [{"role": "user", "content": "Name three rivers."}]
PROMPTS = [
    "The river",
    "the old stone house and",
    "Name",
    "into the sea. Name three rivers",
    "more of the same",
]


def serving(**env: str) -> AbstractContextManager[ModuleType]:
    return helpers.serving("huggingface", **env)


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
