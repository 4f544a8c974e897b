"""What transformers itself generates, and whether other tokens are as likely."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from tests.quality.prompts import chat
from tools.models import real

TIE = 1e-4
"""Logits that differ by less come out in either order, by the order in which numbers are added."""


@dataclass(frozen=True)
class Generated:
    """tokens: the text of each. margins: by how much the likeliest token's logit exceeds the second's."""

    tokens: list[str]
    margins: list[float]

    def difference(self, tokens: Sequence[str]) -> str | None:
        """Where and how `tokens` differ; None where they are the same up to a tie."""
        for i, (ours, token) in enumerate(zip_longest(tokens, self.tokens)):
            if ours != token:
                return (
                    None if self.margins[i] < TIE else f"{i}: {ours!r}, not {token!r}, by {self.margins[i]}"
                )
        return None


class Transformers:
    """SmolLM2 by transformers' own generate, in float32."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = real.folder("smollm2")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def inputs(self, prompts: Sequence[str]) -> Any:
        return self.tokenizer.apply_chat_template(
            [chat(prompt) for prompt in prompts],
            add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip

    def generate(self, prompts: Sequence[str], max_tokens: int, *, batch: int) -> Iterator[Generated]:
        """The greedy answer to each prompt, without the end token."""
        import torch

        for start in range(0, len(prompts), batch):
            inputs = self.inputs(prompts[start : start + batch])
            with torch.inference_mode():
                out = self.model.generate(
                    **inputs, do_sample=False, max_new_tokens=max_tokens,
                    return_dict_in_generate=True, output_logits=True,
                )  # fmt: skip
            new = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
            two = torch.stack(out.logits, dim=1).topk(2).values  # (batch, steps, 2)
            margins = (two[..., 0] - two[..., 1]).tolist()
            end = self.tokenizer.eos_token_id
            for ids, margin in zip(new, margins, strict=True):
                kept = ids[: ids.index(end)] if end in ids else ids
                yield Generated([self.tokenizer.decode([token]) for token in kept], margin)

    def first_logprobs(self, prompts: Sequence[str]) -> Any:
        """The log probabilities of the first token, (batch, vocab)."""
        import torch

        with torch.inference_mode():
            return self.model(**self.inputs(prompts)).logits[:, -1].log_softmax(-1)
