"""Which tokens end an answer, by a checkpoint's files."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from serving.continuous_batching.end_tokens import end_token_ids
from tools.models import local_env, tiny_causal

pytestmark = pytest.mark.engine

PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[0]['text'] }}"
    "{{ '<|turn_end|>\n' }}{% endfor %}"
)


@pytest.fixture
def checkpoint() -> tuple[Any, Any]:
    folder = local_env("huggingface")["MODEL_NAME"]
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("generation", "config", "eos_token", "template", "expected"),
    [
        ([5, 6], 7, "<|endoftext|>", None, {"<|endoftext|>", 5, 6, 7}),
        (None, None, "<|endoftext|>", tiny_causal.CHAT_TEMPLATE, {"<|endoftext|>", "<|im_end|>"}),
        (8, None, None, tiny_causal.CHAT_TEMPLATE, {8, "<|im_end|>"}),
        (8, None, None, PARTS, {8, "<|turn_end|>"}),
        (8, None, None, "{{ messages[-1].content }} ### ", {8}),
        (8, None, None, "{{ raise_exception('no') }}", {8}),
    ],
)
def test_end_tokens_are_those_of_every_file_and_of_the_template(
    checkpoint: tuple[Any, Any],
    generation: Any,
    config: Any,
    eos_token: Any,
    template: Any,
    expected: set[Any],
) -> None:
    model, tokenizer = checkpoint
    tokenizer.add_tokens([AddedToken("<|turn_end|>", special=True)])
    model.generation_config.eos_token_id, model.config.eos_token_id = generation, config
    tokenizer.eos_token, tokenizer.chat_template = eos_token, template
    ids = {tokenizer.convert_tokens_to_ids(each) if isinstance(each, str) else each for each in expected}
    assert end_token_ids(model, tokenizer, tokenizer) == ids


def test_the_template_may_be_the_processors(checkpoint: tuple[Any, Any]) -> None:
    model, tokenizer = checkpoint
    end = tokenizer.eos_token_id
    processor = SimpleNamespace(
        chat_template="a template", apply_chat_template=lambda messages, tokenize: "Seventeen<|im_end|>"
    )
    tokenizer.chat_template = tokenizer.eos_token = None
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert end_token_ids(model, tokenizer, tokenizer) == set()
    assert end_token_ids(model, tokenizer, processor) == {end}
