"""LoRA adapters beside the model's weights: each sequence of a batch has its own adapter, or none.

peft's layers run mixed batches: they take `adapter_names`, one for each sequence, `__base__` for no adapter.
PeftModel.forward passes the names to them through hooks that it registers and removes at every pass; here the
hooks are registered once, so that the model keeps its own class and a decode step its speed. In a pass whose
sequences all use no adapter, the model has its own layers in place of peft's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from transformers import PreTrainedModel

from shared.device import is_out_of_memory
from shared.errors import StartError

SetAdapters = Callable[[list[str | None]], None]

BASE = "__base__"  # peft's name for no adapter
_PEFT_LAYERS = (LoraLayer, ModulesToSaveWrapper)
# Settings of an adapter that peft cannot apply to some sequences of a batch only.
_NOT_MIXABLE = (
    "use_dora",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
)


def load_adapters(model: PreTrainedModel, folders: Mapping[str, Path]) -> SetAdapters:
    """Load the adapters, by name, into `model`, unmerged.

    Returns a function for the generator: before a forward pass, it takes the adapter's name of each sequence.
    Raises StartError(code="bad_adapter") for an adapter that does not fit the model or cannot be mixed.
    """
    peft_names = {name: f"lora_{number}" for number, name in enumerate(folders)}  # a module has no dot
    for name, folder in folders.items():
        try:
            _load_adapter(model, folder, peft_names[name])
        except _BadAdapter as error:
            raise StartError(f"LORA, {name}: {error}", code="bad_adapter") from None
    return _mix_adapters(model, peft_names)


class _BadAdapter(Exception):
    pass


def _load_adapter(model: PreTrainedModel, folder: Path, name: str) -> None:
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        if config.peft_type != PeftType.LORA:
            raise _BadAdapter(f"its type is {config.peft_type}, and this worker runs LoRA.")
        if config.bias != "none" or any(getattr(config, setting, None) for setting in _NOT_MIXABLE):
            raise _BadAdapter(
                "adapters with DoRA, aLoRA, biases, or tokens, layers or parameters of their own cannot "
                "share a batch with others. Merge it into its model, and serve that."
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are intended
            info = model.load_adapter(str(folder), adapter_name=name)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise _BadAdapter(f"it does not fit this {type(model).__name__}: {cause}") from None
    missing = {key for key in info.missing_keys if f".{name}." in f"{key}."}
    if key := min(missing | set(info.unexpected_keys), default=None):
        raise _BadAdapter(f"it was made for another model: {key} is not in both.")


def _mix_adapters(model: PreTrainedModel, peft_names: Mapping[str, str]) -> SetAdapters:
    current: list[str] = []  # peft's name for each sequence of the batch

    def pass_names(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # A layer's input has a first dimension of the sequences, or of all their tokens (OPT's fc1, fc2).
        each, rest = divmod(len(args[0]), len(current))
        if rest:
            raise RuntimeError("A layer of this model mixes sequences: its adapters cannot share a batch.")
        names = current if each == 1 else [name for name in current for _ in range(each)]
        if isinstance(module, ModulesToSaveWrapper):  # fails for names that it does not have
            names = [name if name in module.modules_to_save else BASE for name in names]
        return args, {**kwargs, "adapter_names": names}

    layers: list[tuple[Any, str, Any, Any]] = [
        (parent, name, layer, _base_layer(layer))
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, _PEFT_LAYERS)
    ]
    for _, _, layer, _ in layers:
        layer.register_forward_pre_hook(pass_names, with_kwargs=True)
        if isinstance(layer, ModulesToSaveWrapper):  # bypassed while its active adapter is not its own
            layer.set_adapter(next(iter(layer.modules_to_save)), inference_mode=True)
    has_peft_layers = True

    def set_adapters(names: list[str | None]) -> None:
        nonlocal has_peft_layers
        current[:] = [BASE if name is None else peft_names[name] for name in names]
        if has_peft_layers != any(names):
            has_peft_layers = not has_peft_layers
            for parent, name, layer, base_layer in layers:
                setattr(parent, name, layer if has_peft_layers else base_layer)

    return set_adapters


def _base_layer(layer: Any) -> Any:
    """The model's own layer, inside one or several of peft's."""
    while isinstance(layer, _PEFT_LAYERS):
        layer = layer.base_layer if isinstance(layer, LoraLayer) else layer.original_module
    return layer
