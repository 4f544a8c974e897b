"""The KV cache of a batch whose sequences come and go, and how much of it memory holds."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation.utils import GenerationMixin

from serving.continuous_batching.sampling import Row

CPU_BUDGET = 32768  # tokens in the cache; on a GPU it is what the free memory holds
ROOM = 64  # columns by which the cache grows


@dataclass(slots=True, eq=False)
class DecodeBatch(Generic[Row]):
    """The rows that are being answered. `mask` has a column for each token in the cache."""

    rows: list[Row]
    cache: Any
    mask: torch.Tensor
    tokens: torch.Tensor  # the last ones, which are not in the cache yet

    def keep(self, indices: list[int]) -> None:
        """Drop the other rows, and the columns on the left that are then empty."""
        mask = self.mask[indices]
        empty = int(mask.any(dim=0).int().argmax())
        self.mask, self.tokens = mask[:, empty:], self.tokens[indices]
        self.rows = [self.rows[i] for i in indices]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[indices, :, empty:], layer.values[indices, :, empty:]

    def join(self, other: DecodeBatch[Row]) -> None:
        width = max(self.mask.shape[1], other.mask.shape[1])

        def joined(ours: torch.Tensor, theirs: torch.Tensor, dim: int) -> torch.Tensor:
            sides = [0, 0] * (ours.dim() - 1 - dim)
            parts = [pad(part, (*sides, width - part.shape[dim], 0)) for part in (ours, theirs)]
            return torch.cat(parts)

        self.rows += other.rows
        self.mask = joined(self.mask, other.mask, 1)
        self.tokens = torch.cat([self.tokens, other.tokens])
        for ours, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            ours.keys, ours.values = joined(ours.keys, theirs.keys, 2), joined(ours.values, theirs.values, 2)


@cache
def _roomy_layer() -> type[Any]:

    class RoomyLayer(DynamicLayer):  # type: ignore[misc]
        """Grows in place, ROOM columns at a time; transformers' own is copied for every token."""

        keys: Any
        values: Any
        space: tuple[torch.Tensor, ...] = ()
        view: torch.Tensor | None = None  # of the space; `keys` is another tensor when rows came or went

        def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> Any:
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
            begin = self.get_seq_length()
            end = begin + keys.shape[2]
            if self.view is not self.keys or end > self.space[0].shape[2]:
                sizes = [(*new.shape[:2], end + ROOM, new.shape[3]) for new in (keys, values)]
                self.space = tuple(keys.new_empty(size) for size in sizes)
                if begin:
                    self.space[0][:, :, :begin], self.space[1][:, :, :begin] = self.keys, self.values
            self.space[0][:, :, begin:end], self.space[1][:, :, begin:end] = keys, values
            self.keys, self.values = (space[:, :, :end] for space in self.space)
            self.view = self.keys
            return self.keys, self.values

    return RoomyLayer


def preallocated_cache(model: PreTrainedModel) -> Any:
    """An empty cache for `model` that grows in place."""

    made = DynamicCache(config=model.config)
    made.layers = [_roomy_layer()() for _ in made.layers]
    return made


def supports_joining_batches(model: PreTrainedModel) -> bool:
    """Whether rows of this model may be put beside others in the middle of their answers.

    They may where a step needs no more than the tokens, their places and a cache with a column for each:
    where the class prepares its inputs as transformers does by default, no layer has a window or a state, and
    the checkpoint asks for no changes to the logits that look back over the text.
    """
    from transformers.cache_utils import DynamicLayer

    prepares = (
        "prepare_inputs_for_generation",
        "_update_model_kwargs_for_generation",
        "_prepare_position_ids_for_generation",
    )
    default = all(getattr(type(model), name) is getattr(GenerationMixin, name) for name in prepares)
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    plain = plain and not getattr(model.config.get_text_config(decoder=True), "num_kv_shared_layers", 0)
    changes = {
        name
        for name, value in model.generation_config.to_dict().items()
        if value not in (None, 0, 1, [], {})  # 0 and 1, False and True among them, are what changes nothing
        and not name.startswith(("_", "max_"))
        and not name.endswith("_token_id")
    }
    sampling = {"temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty"}
    sampling.add("transformers_version")
    return default and plain and changes <= sampling


def cache_budget(model: PreTrainedModel, share: float = 0.7) -> int:
    """How many tokens' keys and values fit into `share` of the GPUs' free memory; CPU_BUDGET on a CPU.

    A layer's are where the layer runs: of several GPUs, the one with the least room for its layers decides.
    """
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_layer = 2 * heads * size * model.dtype.itemsize
    budgets = [
        int(torch.cuda.mem_get_info(device)[0] * share // (layers * per_layer))
        for device, layers in _layers(model, config.num_hidden_layers).items()
        if device.type == "cuda"
    ]
    return max(1, min(budgets, default=CPU_BUDGET))


def _layers(model: PreTrainedModel, count: int) -> Counter[torch.device]:
    """How many of the model's `count` layers run on each device; offloaded ones run on the first."""
    placed: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    # A layer's name ends with its number; what several are in has no number, and then all are on one device.
    layers = [where for name, where in placed.items() if re.search(r"\.\d+$", name)]
    gpus = [where for where in placed.values() if where not in ("cpu", "disk")]
    main = _device(gpus[0]) if gpus else input_device(model)
    return Counter(_device(it) if it in gpus else main for it in layers) or Counter({main: count})


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its tokens. accelerate may have its parts on several devices, or on a disk."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else _device(device)


def _device(name: int | str | torch.device) -> torch.device:
    return torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
