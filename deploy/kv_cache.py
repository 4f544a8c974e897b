"""The KV cache of a model: bytes for each token and sequence, from its config.json, by vLLM's rules."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

# Every layer keeps a key and a value for each KV head; some of them for a window of tokens only.
_HEADS = {
    *("llama", "mistral", "ministral3", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "phi", "phi3", "phimoe"),
    *(
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt_oss",
        "gpt2",
        "gpt_neox",
        "opt",
        "bloom",
        "stablelm",
        "starcoder2",
    ),
    *(
        "granite",
        "granitemoe",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "cohere",
        "cohere2",
        "glm",
        "glm4",
        "glm4_moe",
    ),
    *("smollm3", "exaone4", "seed_oss", "ernie4_5", "ernie4_5_moe", "hunyuan_v1_dense"),
}
# Multi-head latent attention: a layer keeps one compressed vector and one rotary key, for all heads together.
_LATENT = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite"}
# Attributes of sparse attention, shared caches, state spaces and linear attention.
_BEYOND = (
    "index_topk",
    "num_kv_shared_layers",
    "mamba_d_state",
    "attn_layer_period",
    "linear_num_value_heads",
)


class UnknownArchitecture(Exception):
    """A model whose KV cache this module cannot compute; the message says why, in one sentence."""


@dataclass(frozen=True)
class KVCache:
    """full, windowed: layers that keep every token, and that keep the last `window`.

    heads: KV heads, 1 for a latent. width: numbers that a layer keeps for a token and head.
    heads_of_queries: what tensor parallelism divides.
    """

    full: int
    windowed: int
    window: int
    heads: int
    width: int
    heads_of_queries: int

    def per_token(self, dtype_bytes: int = 2, gpus: int = 1) -> int:
        """Bytes on one of `gpus` GPUs while the sequence is within the window."""
        return self._layer(dtype_bytes, gpus) * (self.full + self.windowed)

    def per_sequence(
        self, tokens: int, dtype_bytes: int = 2, gpus: int = 1, *, in_flight: int = 8192, block: int = 16
    ) -> int:
        """Bytes on one of `gpus` GPUs for a sequence of `tokens`, which vLLM sets aside in blocks.

        in_flight: max_num_batched_tokens; a prefill keeps its tokens beside the window. block: tokens of one.
        vLLM keeps layers in groups of one size and fills up the last of each kind
        (vllm/v1/core/kv_cache_utils.py); a kind that is alone needs no groups.
        """
        whole = -(-tokens // block)
        # A window may begin inside a block.
        kept = -(-min(tokens, self.window - 1 + in_flight) // block) + 1
        full, windowed = self.full, self.windowed
        if full and windowed:
            size = min(full, windowed)
            if max(full, windowed) < 1.5 * size:
                size = max(full, windowed)
            full, windowed = (-(-layers // size) * size for layers in (full, windowed))
        return self._layer(dtype_bytes, gpus) * block * (full * whole + windowed * kept)

    def divides(self, gpus: int) -> bool:
        """Whether vLLM splits the model over `gpus`."""
        heads = self.heads
        return self.heads_of_queries % gpus == 0 and (heads % gpus == 0 or gpus % heads == 0)

    def _layer(self, dtype_bytes: int, gpus: int) -> int:
        return max(1, self.heads // gpus) * self.width * dtype_bytes


def text_config(config: dict[str, Any]) -> Any:
    """The config of the language model inside, with its defaults, as transformers has it.

    Raises UnknownArchitecture.
    """
    from transformers import CONFIG_MAPPING  # seconds

    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UnknownArchitecture(f"model_type {model_type} is not one that transformers has.")
    try:
        return CONFIG_MAPPING[model_type](**config).get_text_config(decoder=True)
    except (TypeError, ValueError, AttributeError) as error:
        raise UnknownArchitecture(f"config.json is not one of {model_type}: {error}.") from None


def kv_cache(config: dict[str, Any]) -> KVCache:
    """That of the model with this config.json. Raises UnknownArchitecture rather than guess."""
    text = text_config(config)
    kind = text.model_type
    if kind not in _HEADS | _LATENT:
        raise UnknownArchitecture(f"how a model of type {kind} keeps its KV cache is not known here.")
    for name in _BEYOND:
        if getattr(text, name, None):
            raise UnknownArchitecture(f"{name} of {kind} adds to its KV cache, or shares it.")
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    if kind in _LATENT:
        width = text.kv_lora_rank + text.qk_rope_head_dim
        return KVCache(layers, 0, 0, 1, width, heads)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    width = 2 * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    window = getattr(text, "sliding_window", None) or 0
    if getattr(text, "use_sliding_window", None) is False:
        window = 0
    types = Counter(
        getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    )
    if other := types.keys() - {"full_attention", "sliding_attention"}:
        raise UnknownArchitecture(f"layers of type {min(other)} are not known here.")
    windowed = types["sliding_attention"] if window else 0
    return KVCache(layers - windowed, windowed, window, kv_heads, width, heads)
