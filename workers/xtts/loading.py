"""An Xtts from a folder of its files. Pickles are read as tensors only."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from TTS.config import load_config
from TTS.tts.models.xtts import Xtts

from shared.errors import StartError

from .voices import Voice

FILES = ("config.json", "model.pth", "vocab.json")
DEFAULT_VOICE = "Ana Florence"


class _Ignored:
    """In place of the settings that XTTS's authors pickled beside their weights; config.json has them too."""

    def __setstate__(self, state: object) -> None:
        pass


_PICKLED = (
    "TTS.tts.configs.xtts_config.XttsConfig",
    "TTS.tts.models.xtts.XttsArgs",
    "TTS.tts.models.xtts.XttsAudioConfig",
    "TTS.config.shared_configs.BaseDatasetConfig",
)


def read_weights(path: Path) -> dict[str, Any]:
    """The tensors of a checkpoint. No code of its pickle is run, and nothing is written beside it."""
    with torch.serialization.safe_globals([(_Ignored, name) for name in _PICKLED]):
        weights: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"]
    return weights


class _SafeXtts(Xtts):  # type: ignore[misc]
    def _load_checkpoint(self, model_path: Path) -> dict[str, Any]:
        return read_weights(model_path)


def load_model(folder: Path, *, device: torch.device, dtype: str = "auto") -> Any:
    """The Xtts of a folder that has FILES. dtype: of the transformer; auto: float32.

    Raises StartError for a folder of another model.
    """
    architecture = json.loads((folder / "config.json").read_text()).get("model")
    if architecture != "xtts":
        raise StartError(
            f"{folder} has a {architecture} model, and this worker runs XTTS v2.",
            code="unsupported_architecture",
        )
    config = load_config(str(folder / "config.json"))
    model = _SafeXtts(config)
    model.load_checkpoint(config, checkpoint_dir=str(folder), eval=True)
    # Weights in one tensor, in place of a direction and a length that are multiplied in every call.
    for module in model.hifigan_decoder.modules():
        if is_parametrized(module):
            remove_parametrizations(module, "weight")
    model = model.to(device)
    _cast_transformer(model.gpt, getattr(torch, "float32" if dtype == "auto" else dtype))
    return model


def _cast_transformer(gpt: Any, dtype: torch.dtype) -> None:
    """Put the parts that decode into `dtype`; the encoders of recordings stay in float32."""
    if dtype == torch.float32:
        return
    parts = (gpt.gpt, gpt.text_embedding, gpt.text_pos_embedding, gpt.mel_embedding, gpt.mel_pos_embedding)
    for part in (*parts, gpt.final_norm, gpt.mel_head):
        part.to(dtype)
    # The library's position embeddings of the transformer are zeros in float32, which would promote the sum.
    gpt.gpt.wpe = lambda positions: torch.zeros(
        (*positions.shape, gpt.model_dim), device=positions.device, dtype=dtype
    )


def built_in_voices(model: Any) -> dict[str, Voice]:
    """The voices of speakers_xtts.pth, where the folder has it."""
    speakers = model.speaker_manager.speakers if model.speaker_manager else {}
    return {
        name: Voice(
            tensors["gpt_cond_latent"].to(model.device), tensors["speaker_embedding"].to(model.device)
        )
        for name, tensors in speakers.items()
    }


def default_voice(voices: dict[str, Voice], name: str | None) -> str | None:
    """`name`, else DEFAULT_VOICE or the first. Raises StartError for a name that is not there."""
    if name is not None and name not in voices:
        raise StartError(
            f"DEFAULT_SPEAKER={name!r}: no such voice. Use one of {', '.join(voices)}.", code="bad_setting"
        )
    return name or next((voice for voice in (DEFAULT_VOICE, *voices) if voice in voices), None)


def languages(model: Any) -> list[str]:
    """Of the model, without Japanese where cutlet is not installed, which lacks wheels for some Pythons."""
    return [name for name in model.config.languages if name != "ja" or importlib.util.find_spec("cutlet")]
