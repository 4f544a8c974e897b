"""The KV cache of a batch whose sequences come and go, and how many tokens of it fit into memory."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Generic

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import GenerationMixin

from serving.continuous_batching.sequence import AnySequence

CPU_BUDGET = 32768  # tokens in the cache; on a GPU the free memory decides
GROWTH = 64  # tokens by which the buffers of the cache grow


@dataclass(slots=True, eq=False)
class DecodeBatch(Generic[AnySequence]):
    """The sequences that are decoded together, padded on the left.

    cache: a `preallocated_cache`; the keys and values of a layer are (batch, heads, cached, head_dim).
    attention_mask: (batch, cached), 1 for a token in the cache, 0 for padding.
    token_ids: (batch, 1), the newest tokens, which are not in the cache yet. Set after the first sampling.
    """

    sequences: list[AnySequence]
    cache: Any
    attention_mask: torch.Tensor
    token_ids: torch.Tensor = field(init=False)

    def keep(self, indices: list[int]) -> None:
        """Drop the sequences that are not in `indices`, and the columns that then hold padding only."""
        mask = self.attention_mask[indices]  # (kept, cached)
        first = int(mask.any(dim=0).int().argmax())  # the first column with a token
        self.sequences = [self.sequences[i] for i in indices]
        self.token_ids = self.token_ids[indices]  # (kept, 1)
        self.attention_mask = mask[:, first:]  # (kept, cached - first)
        for layer in self.cache.layers:  # (kept, heads, cached - first, head_dim)
            layer.replace(layer.keys[indices, :, first:], layer.values[indices, :, first:])

    def join(self, other: DecodeBatch[AnySequence]) -> None:
        """Append the sequences of `other`. The shorter of the two caches is padded on the left."""
        cached = max(self.attention_mask.shape[1], other.attention_mask.shape[1])

        def concatenate(ours: torch.Tensor, theirs: torch.Tensor, dim: int) -> torch.Tensor:
            """Along the batch, with dimension `dim` padded to `cached`."""
            later_dims = [0, 0] * (ours.dim() - 1 - dim)
            padded = [pad(part, (*later_dims, cached - part.shape[dim], 0)) for part in (ours, theirs)]
            return torch.cat(padded)

        self.token_ids = torch.cat([self.token_ids, other.token_ids])  # (batch + other, 1)
        self.attention_mask = concatenate(self.attention_mask, other.attention_mask, 1)
        for ours, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            keys = concatenate(ours.keys, theirs.keys, 2)  # (batch + other, heads, cached, head_dim)
            ours.replace(keys, concatenate(ours.values, theirs.values, 2))
        self.sequences += other.sequences  # last: where memory runs out before, none of `other` has joined


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """A layer's cache that grows in place, GROWTH tokens at a time; DynamicLayer's is copied for every token.

    keys and values are views of the first columns of the buffers where `in_buffers`, else other tensors.
    """

    keys: Any
    values: Any
    key_buffer: torch.Tensor  # (batch, heads, capacity, head_dim)
    value_buffer: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.in_buffers = False

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Set the cache to other tensors; the next update copies them into buffers."""
        self.keys, self.values, self.in_buffers = keys, values, False

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Append keys and values, (batch, heads, new, head_dim); returns all of both."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        cached = self.get_seq_length()
        end = cached + keys.shape[2]
        if not self.in_buffers or end > self.key_buffer.shape[2]:
            self.key_buffer = keys.new_empty(*keys.shape[:2], end + GROWTH, keys.shape[3])
            self.value_buffer = values.new_empty(*values.shape[:2], end + GROWTH, values.shape[3])
            self.in_buffers = True
            if cached:
                self.key_buffer[:, :, :cached] = self.keys
                self.value_buffer[:, :, :cached] = self.values
        self.key_buffer[:, :, cached:end] = keys
        self.value_buffer[:, :, cached:end] = values
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]
        return self.keys, self.values


def preallocated_cache(model: PreTrainedModel) -> Any:
    """An empty cache for `model` that grows in place."""
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer() for _ in cache.layers]
    return cache


def supports_joining_batches(model: PreTrainedModel) -> bool:
    """Whether a sequence of this model can join a batch that is being decoded.

    It can where a decode step needs nothing but the tokens, their positions and a cache with a column for
    each token: where the class prepares its inputs as GenerationMixin does, no layer has a window or a state,
    and the checkpoint's generation config asks for no processing of logits that looks back over the text.
    """
    methods = (
        "prepare_inputs_for_generation",
        "_update_model_kwargs_for_generation",
        "_prepare_position_ids_for_generation",
    )
    prepares_by_default = all(
        getattr(type(model), name) is getattr(GenerationMixin, name) for name in methods
    )
    layers = DynamicCache(config=model.config).layers
    shared_layers = getattr(model.config.get_text_config(decoder=True), "num_kv_shared_layers", 0)
    plain_cache = all(type(layer) is DynamicLayer for layer in layers) and not shared_layers
    changed = {
        name
        for name, value in model.generation_config.to_dict().items()
        if value not in (None, 0, 1, [], {})  # 0 and 1, False and True among them, switch nothing on
        and not name.startswith(("_", "max_"))
        and not name.endswith("_token_id")
    }
    ours = {"temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty"}
    return prepares_by_default and plain_cache and changed <= ours | {"transformers_version"}


# ---- memory and devices ----------------------------------------------------------------------------------


def cache_budget(model: PreTrainedModel, share: float = 0.7) -> int:
    """How many tokens' keys and values fit into `share` of the GPUs' free memory; CPU_BUDGET on a CPU.

    The cache of a layer is on the layer's device: the GPU with the least memory for its layers decides.
    """
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * heads * head_dim * model.dtype.itemsize  # keys and values of one layer
    budgets = [
        int(torch.cuda.mem_get_info(device)[0] * share // (layers * token_bytes))
        for device, layers in _layers_by_device(model, config.num_hidden_layers).items()
        if device.type == "cuda"
    ]
    return max(1, min(budgets, default=CPU_BUDGET))


def _layers_by_device(model: PreTrainedModel, num_layers: int) -> Counter[torch.device]:
    """How many layers run on each device; offloaded layers run on the first GPU."""
    device_map: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    # The name of a layer ends with its number. A map without such names has all layers on one device.
    layers = [place for name, place in device_map.items() if re.search(r"\.\d+$", name)]
    gpus = [place for place in device_map.values() if place not in ("cpu", "disk")]
    first = _device(gpus[0]) if gpus else input_device(model)
    devices = [_device(place) if place in gpus else first for place in layers]
    return Counter(devices) or Counter({first: num_layers})


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its token ids. accelerate may have put its parts on several devices or a disk."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else _device(device)


def _device(name: int | str | torch.device) -> torch.device:
    return torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
