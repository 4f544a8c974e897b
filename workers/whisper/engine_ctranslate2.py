"""CTranslate2's Whisper, the engine of faster-whisper: one temperature and one beam size in a batch."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Hashable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import WhisperFeatureExtractor

from shared import startup
from shared.errors import StartError
from shared.logs import log
from shared.volume import ModelPath, lease

from .engine import MEDIAN_FILTER_WIDTH, TOKENS_PER_SECOND, DecodeRequest, DecodeResult, to_align
from .processor import load_feature_extractor, load_tokenizer, read_json
from .tokenizer import WhisperTokenizer

MAX_LENGTH = 448  # positions of every Whisper's decoder


def load(
    model_path: ModelPath,
    *,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    compute_type: str,
    timestamps: bool,
) -> tuple[CTranslate2Engine, WhisperTokenizer, WhisperFeatureExtractor]:
    """The engine, tokenizer and feature extractor of a model, which is converted first where it has to be.

    name: for errors. compute_type: CTranslate2's name for the weights' number format; auto: that of `dtype`.
    timestamps: whether the model was trained with timestamp tokens. Logs the phases convert and load.
    Raises StartError for a model that cannot be converted, or whose tokenizer is missing.
    """
    if compute_type == "auto":
        compute_type = str(dtype).removeprefix("torch.")
    folder = model_path.path
    if not (folder / "model.bin").exists():
        with startup.phase("convert"):
            quantization = "float32" if compute_type == "float32" else "float16"
            folder = convert(model_path, quantization, name)
    with startup.phase("load") as phase:
        tokenizer = load_tokenizer(model_path.path, name)
        if device.type == "cuda":
            preload_cublas()
        try:
            # faster-whisper's own class would download a tokenizer for a folder that has none.
            model = ctranslate2.models.Whisper(
                str(folder), device=device.type, device_index=device.index or 0, compute_type=compute_type
            )
        except ValueError as error:
            cause = str(error).strip().partition("\n")[0]
            raise StartError(f"COMPUTE_TYPE={compute_type}: {cause}", code="bad_setting") from error
        feature_extractor = load_feature_extractor(model_path.path, model.n_mels)
        phase.bytes = (folder / "model.bin").stat().st_size
    whisper_tokenizer = WhisperTokenizer(
        tokenizer, multilingual=model.is_multilingual, max_length=MAX_LENGTH, timestamps=timestamps
    )
    suppress = list(read_json(folder / "config.json").get("suppress_ids") or [])
    return CTranslate2Engine(model, whisper_tokenizer, suppress), whisper_tokenizer, feature_extractor


class CTranslate2Engine:
    """See `engine.Engine`. suppress: tokens that are never made."""

    def __init__(self, model: Any, tokenizer: WhisperTokenizer, suppress: list[int]) -> None:
        self.model, self.tokenizer, self.suppress = model, tokenizer, suppress

    def key(self, request: DecodeRequest) -> Hashable:
        """Beams, temperature, and the length of the prompt: CTranslate2 does not pad prompts."""
        beams = 1 if request.temperature else request.beam_size
        return beams, request.temperature, len(request.prompt)

    def decode(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        # (batch, n_mels, 3000)
        features = np.ascontiguousarray(np.stack([request.features for request in requests]))
        states = self.model.encode(ctranslate2.StorageView.from_array(features))
        languages: list[tuple[str | None, float | None]] = [(request.language, None) for request in requests]
        if self.tokenizer.languages and any(request.language is None for request in requests):
            for i, probs in enumerate(self.model.detect_language(states)):
                if requests[i].language is None:
                    token, probability = probs[0]
                    languages[i] = (token.strip("<|>"), float(probability))
        prefixes = [
            self.tokenizer.sot_sequence(code, request.task)
            for request, (code, _) in zip(requests, languages, strict=True)
        ]
        temperature = requests[0].temperature
        results = self.model.generate(
            states,
            [[*request.prompt, *prefix] for request, prefix in zip(requests, prefixes, strict=True)],
            beam_size=1 if temperature else requests[0].beam_size,
            sampling_topk=0 if temperature else 1,
            sampling_temperature=temperature or 1.0,
            max_length=MAX_LENGTH,  # it makes at most half of it, and what a prompt leaves
            return_scores=True,
            return_no_speech_prob=True,
            suppress_tokens=self.suppress,
        )
        eot = self.tokenizer.eot
        tokens = [[token for token in result.sequences_ids[0] if token != eot] for result in results]
        texts = [[token for token in made if token < eot] for made in tokens]
        aligned = to_align(requests, tokens, timestamp_begin=self.tokenizer.timestamp_begin, eot=eot)
        paths = self._alignment_paths(features, requests, prefixes, texts, aligned)
        return [
            DecodeResult(
                tokens=made,
                language=language,
                language_probability=probability,
                # CTranslate2's score is the mean over the tokens without the end.
                avg_logprob=result.scores[0] * len(made) / (len(made) + 1),
                no_speech_prob=result.no_speech_prob,
                temperature=temperature,
                alignment_path=paths.get(i),
            )
            for i, (made, (language, probability), result) in enumerate(
                zip(tokens, languages, results, strict=True)
            )
        ]

    def _alignment_paths(
        self,
        features: NDArray[np.float32],
        requests: Sequence[DecodeRequest],
        prefixes: list[list[int]],
        texts: list[list[int]],
        aligned: list[int],
    ) -> dict[int, list[tuple[int, int]]]:
        """For each request of the indices `aligned`: pairs of text token and encoder state.

        Requests of one language and task are aligned together. texts: the text tokens.
        """
        paths: dict[int, list[tuple[int, int]]] = {}
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in aligned:
            groups.setdefault(tuple(prefixes[i]), []).append(i)
        for prefix, indices in groups.items():
            alignments = self.model.align(
                ctranslate2.StorageView.from_array(features[indices]),
                [token for token in prefix if token != self.tokenizer.no_timestamps],
                [texts[i] for i in indices],
                # In frames of the spectrogram, two for a state.
                [max(2, round(requests[i].seconds * 2 * TOKENS_PER_SECOND)) for i in indices],
                median_filter_width=MEDIAN_FILTER_WIDTH,
            )
            paths |= {i: alignment.alignments for i, alignment in zip(indices, alignments, strict=True)}
        return paths


def convert(model_path: ModelPath, quantization: str, name: str) -> Path:
    """The folder of the model in CTranslate2's format: made once, on the volume where there is one.

    Raises StartError for a model that CTranslate2 has no format for.
    """
    volume = Path(os.environ.get("RUNPOD_VOLUME_PATH") or "/runpod-volume")
    home = volume if os.access(volume, os.W_OK) else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    stamp = zlib.crc32(json.dumps([str(model_path.path), model_path.bytes]).encode())
    version = model_path.revision or f"{stamp:08x}"
    parent = home.expanduser() / "ctranslate2" / model_path.name.strip("/").replace("/", "--")
    folder = parent / f"{version}-{quantization}-{ctranslate2.__version__}"
    with lease(parent / f"{folder.name}.lock"):
        if not (folder / "model.bin").exists():
            log.info("convert model=%s to=%s", name, folder)
            files = ("tokenizer.json", "preprocessor_config.json", "generation_config.json")
            copied = [file for file in files if (model_path.path / file).exists()]
            new = Path(tempfile.mkdtemp(dir=parent))
            try:
                converter = ctranslate2.converters.TransformersConverter(
                    str(model_path.path), copy_files=copied
                )
                converter.convert(str(new / "model"), quantization=quantization)
                shutil.rmtree(folder, ignore_errors=True)
                (new / "model").rename(folder)
            except (ValueError, KeyError, AttributeError) as error:
                message = f"{name} cannot be converted for CTranslate2: {error}. Use ENGINE=transformers."
                raise StartError(message, code="unsupported_architecture") from error
            finally:
                shutil.rmtree(new, ignore_errors=True)
    return folder


def preload_cublas() -> None:
    """Load CUDA 12's cuBLAS from its wheel: CTranslate2 looks for it by its name alone, at its first use."""
    spec = find_spec("nvidia.cublas")
    for root in spec.submodule_search_locations or [] if spec else []:
        for library in ("libcublasLt.so.12", "libcublas.so.12"):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(Path(root) / "lib" / library), mode=ctypes.RTLD_GLOBAL)
