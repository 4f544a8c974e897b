"""Causal language models that the project makes itself, in a second: real classes and files, random weights.

Their tokenizer is a real one, trained here: byte-level BPE, whose tokens may end within a character.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FAMILIES = ("llama", "qwen2", "gpt2", "gemma", "gemma3", "opt")

# The form of Qwen2.5's, tools and all; `shout` is a variable of its own.
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ call['function']['name'] }}{{ call['function']['arguments'] | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if shout %}LOUD: {% endif %}{% endif %}"
)
TEXT = (
    "The river runs past the old stone house and into the sea. Name three rivers, please. "
    "Gr\u00fcne Wiese, caf\u00e9, \u4f60\u597d, \U0001f33f and more of the same words again and again."
)


def make(
    folder: Path, family: str = "llama", *, hidden: int = 64, layers: int = 2, vocabulary: int = 600,
    length: int = 2048, chat: bool = True,
) -> Path:  # fmt: skip
    """Write a model of `family` and its tokenizer into `folder`, which is made."""
    import torch

    torch.manual_seed(0)
    tokenizer = _tokenizer(vocabulary, chat=chat)
    model = _model(family, tokenizer, hidden, layers, vocabulary, length)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_for_engines(folder: Path) -> Path:
    """A Llama that vLLM's attention takes, on CPU too: its heads are of 32 numbers."""
    return make(folder, hidden=128)


def _tokenizer(vocabulary: int, *, chat: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 600), special_tokens=words, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    made.train_from_iterator([TEXT] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")  # noqa: S106
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _model(family: str, tokenizer: Any, hidden: int, layers: int, vocabulary: int, length: int) -> Any:
    import transformers as hf

    heads = max(4, hidden // 64)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    if family == "gpt2":
        config = hf.GPT2Config(
            vocab_size=vocabulary, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=length,
            initializer_range=0.3, **ends,
        )  # fmt: skip
        return hf.GPT2LMHeadModel(config)
    if family == "opt":  # its layers see a batch as one long row of tokens
        config = hf.OPTConfig(
            vocab_size=vocabulary, hidden_size=hidden, word_embed_proj_dim=hidden, num_hidden_layers=layers,
            ffn_dim=3 * hidden, num_attention_heads=heads, max_position_embeddings=length, init_std=0.3,
            **{**ends, "pad_token_id": tokenizer.eos_token_id},
        )  # fmt: skip
        return hf.OPTForCausalLM(config)
    common: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // 2,
        "max_position_embeddings": length, "initializer_range": 0.3, **ends,
    }  # fmt: skip
    if family == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**common))
    if family == "qwen2":
        return hf.Qwen2ForCausalLM(hf.Qwen2Config(**common))
    if family == "gemma":
        return hf.GemmaForCausalLM(hf.GemmaConfig(**common, head_dim=hidden // heads))
    if family == "gemma3":  # its layers see a window of the text, all but every second
        types = ["sliding_attention", "full_attention"] * layers
        config = hf.Gemma3TextConfig(
            **common, head_dim=hidden // heads, sliding_window=16, layer_types=types[:layers]
        )
        return hf.Gemma3ForCausalLM(config)
    raise ValueError(f"{family}: not one of {', '.join(FAMILIES)}")
