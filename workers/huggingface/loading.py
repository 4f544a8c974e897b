"""Model and tokenizer from a folder, quantised on request, and the cause of a failed load."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shared.device import pick_device
from shared.errors import StartError


def load_model(
    path: Path,
    *,
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    quantization: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in `path`, in evaluation mode, and its tokenizer.

    name: the model's name, for error messages. device, dtype: as in `pick_device`. device_map: transformers'
    own, in place of `device`. quantization: see `quantization_config`.
    Raises StartError for a cause that a new attempt does not change.
    """
    chosen, torch_dtype = pick_device(device, dtype)
    hub: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    config = AutoConfig.from_pretrained(path, **hub)
    if getattr(config, "is_encoder_decoder", False):
        message = f"{name} is an encoder-decoder, and this worker runs decoders. Use a causal language model."
        raise StartError(message, code="unsupported_architecture")
    more = quantization_config(quantization, config, torch_dtype, name=name)
    # Quantised weights cannot be moved to another device, so they are loaded where they run.
    if device_map is None and (more or getattr(config, "quantization_config", None)):
        placement: Any = {"": str(chosen)}
    else:
        placement = device_map
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=torch_dtype,
            device_map=placement,
            attn_implementation=attn_implementation,
            **more,
            **hub,
        )
    except (ImportError, ValueError, RuntimeError) as error:
        raise explain_failure(error, attn_implementation) from error
    if placement is None:
        model = model.to(chosen)
    return model.eval(), AutoTokenizer.from_pretrained(path, **hub)


def quantization_config(
    quantization: str | None, config: Any, dtype: torch.dtype, *, name: str
) -> dict[str, Any]:
    """`from_pretrained`'s arguments for QUANTIZATION; it reads a quantised checkpoint's by itself.

    quantization: bitsandbytes-8bit, bitsandbytes-4bit, or the method that the checkpoint is quantised with.
    """
    present = getattr(config, "quantization_config", None) or {}
    method = present.get("quant_method") if isinstance(present, dict) else present.quant_method
    if quantization in (None, method):
        return {}
    if method is not None:
        raise StartError(
            f"QUANTIZATION={quantization}: {name} is already quantised, with {method}. Leave QUANTIZATION "
            "out.",
            code="bad_setting",
        )
    if quantization in ("awq", "gptq"):
        raise StartError(
            f"QUANTIZATION={quantization}: {name} is not quantised. Use a checkpoint quantised with "
            f"{quantization}, or bitsandbytes-4bit, which quantises any model.",
            code="bad_setting",
        )
    # It logs at every matrix product that it casts to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if quantization == "bitsandbytes-8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": four_bit}


def explain_failure(error: Exception, attn_implementation: str | None) -> Exception:
    """`error` as a StartError where a new attempt would fail in the same way, else `error` itself."""
    lines = str(error).strip().splitlines()
    cause = lines[0][:300] if lines else type(error).__name__
    if re.search(r"No GPU found|GPU is required|requires an? .*GPU", cause):  # transformers' quantisers
        return StartError(f"{cause} Use an endpoint with a GPU, or another model.", code="no_gpu")
    if isinstance(error, ImportError):
        return StartError(
            f"{cause} This image does not have it: add it to the worker's requirements.in and build again, "
            "or choose another model or setting.",
            code="missing_package",
        )
    if "attn_implementation" in cause:
        return StartError(f"ATTN_IMPLEMENTATION={attn_implementation}: {cause}", code="bad_setting")
    return error
