"""Model and processor from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from shared.device import pick_device
from shared.errors import StartError


def load_model(
    path: Path, *, name: str, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Any]:
    """The model in `path`, in evaluation mode, and its processor.

    name: the model's name, for error messages. device, dtype: as in `pick_device`.
    Raises StartError for a model that this worker cannot serve.
    """
    chosen, torch_dtype = pick_device(device, dtype)
    hub: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch_dtype, **hub).to(chosen).eval()
    processor = AutoProcessor.from_pretrained(path, **hub)
    if model.config.is_encoder_decoder:
        raise StartError(
            f"{name} is an encoder-decoder, and this worker runs decoders that chat. Use the florence2 "
            "worker for Florence-2, or another model.",
            code="unsupported_architecture",
        )
    if not getattr(processor, "chat_template", None):
        message = f"{name} has no chat template. Use a model that is made for chat."
        raise StartError(message, code="no_chat_template")
    return model, processor
