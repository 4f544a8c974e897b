"""The tokens that end an answer: those that a model's files name, and the turn end of its chat template."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ANSWER = "Seventeen"  # the answer of a conversation that the chat template renders


def end_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template_owner: Any
) -> frozenset[int]:
    """Every id that the generation config, the config or the tokenizer names, and the template's turn end.

    Fine-tuned checkpoints often name one token in one file and another in the next. template_owner: the
    tokenizer or the processor that has the chat template.
    """
    configs = (model.generation_config, model.config, model.config.get_text_config(decoder=True))
    named = [getattr(config, "eos_token_id", None) for config in configs]
    ids = {token_id for value in (*named, tokenizer.eos_token_id) for token_id in _as_ids(value)}
    if getattr(template_owner, "chat_template", None):
        ids.update(_turn_end(tokenizer, template_owner))
    return frozenset(ids)


def _as_ids(value: int | Iterable[int] | None) -> Iterable[int]:
    return () if value is None else (value,) if isinstance(value, int) else value


def _turn_end(tokenizer: PreTrainedTokenizerBase, template_owner: Any) -> list[int]:
    """The special token that the template writes after the assistant's last message; [] where it has none."""
    contents: tuple[Any, Any] = (lambda text: text, lambda text: [{"type": "text", "text": text}])
    for content in contents:  # a string, or the parts that templates for images take
        messages = [
            {"role": "user", "content": content("What is 8 + 9?")},
            {"role": "assistant", "content": content(_ANSWER)},
        ]
        try:
            text = str(template_owner.apply_chat_template(messages, tokenize=False))
        except (TemplateError, ValueError, TypeError, KeyError):
            continue
        _, answer, after = text.rpartition(_ANSWER)
        if answer:  # a template for parts may read a string as nothing
            tokens = tokenizer.added_tokens_decoder.items()
            return [token_id for token_id, token in tokens if after.strip().startswith(token.content)]
    return []
