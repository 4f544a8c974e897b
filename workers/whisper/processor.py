"""The two files beside the weights that both engines need: tokenizer and feature extractor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from transformers import WhisperFeatureExtractor, WhisperTokenizerFast

from shared.errors import StartError


def load_tokenizer(path: Path, name: str) -> tokenizers.Tokenizer:
    """Raises StartError for a folder without a tokenizer of Whisper's."""
    try:
        tokenizer: tokenizers.Tokenizer = WhisperTokenizerFast.from_pretrained(
            path, local_files_only=True
        ).backend_tokenizer
        for token in ("<|startoftranscript|>", "<|notimestamps|>"):
            if tokenizer.token_to_id(token) is None:
                raise ValueError(f"the token {token} is missing")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        cause = str(error).strip().partition("\n")[0]
        message = f"{name} comes without a complete tokenizer: {cause}"
        raise StartError(message, code="incomplete") from error
    return tokenizer


def load_feature_extractor(path: Path, n_mels: int | None = None) -> WhisperFeatureExtractor:
    """The folder's, or the usual one where it has none, or one for another number of mel bins."""
    try:
        extractor = WhisperFeatureExtractor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError):
        bins = read_json(path / "config.json").get("num_mel_bins", 80)
        extractor = WhisperFeatureExtractor(feature_size=bins)
    if n_mels not in (None, extractor.feature_size):
        extractor = WhisperFeatureExtractor(feature_size=n_mels)
    return extractor


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content
