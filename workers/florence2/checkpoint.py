"""Which checkpoints this worker loads: those for transformers' own classes."""

from __future__ import annotations

import json
import re
from pathlib import Path

from shared.errors import StartError


def native_name(name: str) -> str:
    """The checkpoint for transformers' own classes with the weights of microsoft/Florence-2-*."""
    return re.sub(r"(?i)^microsoft/(?=florence-2-(base|large)(-ft)?$)", "florence-community/", name)


def check_native(folder: Path, name: str) -> None:
    """Raise StartError for a model that is not Florence-2, or needs code of its own."""
    config = json.loads((folder / "config.json").read_text())
    model_type = config.get("model_type")
    if model_type != "florence2":
        raise StartError(
            f"{name} is a model of the type {model_type}. Set MODEL_NAME to a Florence-2 model.",
            code="unsupported_architecture",
        )
    # The names of the parts in the remote code.
    parts = [config.get(part, {}).get("model_type") for part in ("text_config", "vision_config")]
    if "florence2_language" in parts or "davit" in parts:
        raise StartError(
            f"{name} needs Python code from its own repository, which this worker does not run. Convert it "
            "to transformers' Florence2ForConditionalGeneration, or use florence-community/Florence-2-large.",
            code="needs_remote_code",
        )
