"""Random models of real shapes, made on the device, and the requests that the parts send to each worker.

The small models of tools/models write tokenizer, processor and configuration; then the sizes are raised and
the weights are drawn again on the device, with a fixed seed. Nothing is downloaded.
"""

from __future__ import annotations

import base64
import io
import json
import random
import re
import time
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.report import Part

WORDS = "the of and to in is was for that with his on be at by had not are but from have an they which"


@dataclass(frozen=True)
class Case:
    """A worker, the shape of its model, and its requests.

    write: makes a small model and all its files; its argument says whether the real sizes follow.
    model_class: of transformers. sizes: of the configuration. request: the input of a job, by its number and
    whether it is tiny. encoder: a pattern of the weights that each position of a job is multiplied with once;
    positions: how many, by the answer, 0 for the tokens of its text. decoder: the weights that each step
    reads; tokens: how many steps. env: settings of the worker.
    """

    shape: str
    write: Callable[[Path, bool], object]
    model_class: str
    sizes: Mapping[str, Any]
    request: Callable[[int, bool], dict[str, Any]]
    encoder: str
    decoder: str = ""
    positions: Callable[[Any, bool], int] = lambda output, tiny: 0
    tokens: Callable[[Any, bool], int] = lambda output, tiny: 0
    streams: bool = False
    env: Mapping[str, str] = field(default_factory=dict)


# ---- requests ------------------------------------------------------------------------------------------


def text(number: int, words: int) -> str:
    """Common English words, the same for the same number."""
    draw = random.Random(number)
    return " ".join(draw.choices(WORDS.split(), k=words))


def picture(number: int, side: int) -> str:
    """A PNG in base64 of 16 x 16 coloured squares."""
    from PIL import Image

    pixels = Image.frombytes("RGB", (16, 16), random.Random(number).randbytes(16 * 16 * 3))
    file = io.BytesIO()
    pixels.resize((side, side), Image.Resampling.NEAREST).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def noise(number: int, seconds: int) -> str:
    """White noise as a WAV file in base64, 8 bits at 16 kHz."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(1)
        out.setframerate(16_000)
        out.writeframes(random.Random(number).randbytes(seconds * 16_000))
    return base64.b64encode(file.getvalue()).decode()


def embed(number: int, tiny: bool) -> dict[str, Any]:
    return {"texts": [text(number, 8 if tiny else 100)]}


# ---- files of the small models -------------------------------------------------------------------------


def write_causal(folder: Path, real: bool) -> None:
    from tools.models import tiny_causal

    tiny_causal.make(folder)


def write_bert(folder: Path, real: bool) -> None:
    from tools.models import tiny_retrieval

    tiny_retrieval.tiny_bge(folder)
    if real:
        for name, values in (
            ("1_Pooling/config.json", {"word_embedding_dimension": 1024}),
            ("sentence_bert_config.json", {"max_seq_length": 512}),
            ("tokenizer_config.json", {"model_max_length": 512}),
        ):
            path = folder / name
            path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write_whisper(folder: Path, real: bool) -> None:
    from tools.models import tiny_whisper

    if real:  # large-v3 has 50,257 tokens of text
        tiny_whisper.make(folder, mels=128, vocabulary=50_257, taught=False)
    else:
        tiny_whisper.make(folder, width=64, taught=False)


def write_florence2(folder: Path, real: bool) -> None:
    from tools.models import tiny_florence2

    tiny_florence2.make(folder, **({"image_size": 768, "window": 12} if real else {}))


def write_llava(folder: Path, real: bool) -> None:
    """llava-1.5's vision tower sees 336 pixels a side, in 24 x 24 patches."""
    from tools.models import tiny_llava

    tiny_llava.make(folder, fit=False)
    if real:
        tiny_llava.processor(size=336, patch=14).save_pretrained(folder)


LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "max_position_embeddings": 8192,
    "initializer_range": 0.02, "tie_word_embeddings": True,
}  # fmt: skip
BERT_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "vocab_size": 30_522, "max_position_embeddings": 512,
}  # fmt: skip
WHISPER_LARGE = {
    "d_model": 1280, "encoder_layers": 32, "decoder_layers": 32, "num_hidden_layers": 32,
    "encoder_attention_heads": 20, "decoder_attention_heads": 20, "encoder_ffn_dim": 5120,
    "decoder_ffn_dim": 5120,
}  # fmt: skip
FLORENCE2_LARGE = {
    "vision_config": {
        "depths": [1, 1, 9, 1], "embed_dim": [256, 512, 1024, 2048], "num_heads": [8, 16, 32, 64],
        "num_groups": [8, 16, 32, 64], "window_size": 12, "projection_dim": 1024,
        "max_temporal_embeddings": 100, "max_position_embeddings": 50, "initializer_range": 0.02,
    },
    "text_config": {
        "d_model": 1024, "encoder_layers": 12, "decoder_layers": 12, "num_hidden_layers": 12,
        "encoder_attention_heads": 16, "decoder_attention_heads": 16, "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096, "max_position_embeddings": 4096, "vocab_size": 51_289, "init_std": 0.02,
    },
}  # fmt: skip
LLAVA_7B = {
    "image_seq_length": 576,
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 768, "image_size": 336,
        "patch_size": 14, "num_hidden_layers": 24, "num_attention_heads": 16,
    },
    "text_config": {
        "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32_064, "max_position_embeddings": 4096,
    },
}  # fmt: skip


def completion_tokens(output: Any, tiny: bool) -> int:
    return int(output["usage"]["completion_tokens"])


def prompt_tokens(output: Any, tiny: bool) -> int:
    return int(output["usage"]["prompt_tokens"])


CASES: dict[str, Case] = {
    "huggingface": Case(
        "Llama 1B", write_causal, "LlamaForCausalLM", LLAMA_1B,
        lambda n, tiny: {"prompt": text(n, 8 if tiny else 60), "temperature": 0,
                         "max_tokens": 4 if tiny else 128},
        encoder=r"layers\.", decoder=".", positions=prompt_tokens, tokens=completion_tokens, streams=True,
        env={"MAX_BATCH_SIZE": "64"},
    ),
    "llava": Case(
        "LLaVA 7B", write_llava, "LlavaForConditionalGeneration", LLAVA_7B,
        lambda n, tiny: {"image": picture(n, 32 if tiny else 336), "prompt": text(n, 8),
                         "max_tokens": 4 if tiny else 64},
        encoder=r"language_model.*layers\.", decoder=r"language_model|lm_head", positions=prompt_tokens,
        tokens=completion_tokens, streams=True, env={"MAX_BATCH_SIZE": "64"},
    ),
    "whisper": Case(
        "Whisper large-v3", write_whisper, "WhisperForConditionalGeneration", WHISPER_LARGE,
        lambda n, tiny: {"audio": noise(n, 1 if tiny else 29), "vad": False, "fallback": False,
                         "language": "en"},
        encoder=r"encoder\.", decoder=r"decoder\.", positions=lambda output, tiny: 1500,
        tokens=lambda output, tiny: max(1, sum(len(s["tokens"]) for s in output["segments"])),
    ),
    "florence2": Case(
        "Florence-2-large", write_florence2, "Florence2ForConditionalGeneration", FLORENCE2_LARGE,
        lambda n, tiny: {"image": picture(n, 64 if tiny else 768), "task": "CAPTION",
                         "max_tokens": 4 if tiny else 64},
        encoder=r"language_model\.encoder", decoder=r"language_model\.decoder|lm_head",
        positions=lambda output, tiny: 5 if tiny else 577, tokens=lambda output, tiny: 4 if tiny else 64,
        env={"MAX_BATCH_ROWS": "192"},
    ),
    "sentence-transformers": Case(
        "bge-large", write_bert, "BertModel", BERT_LARGE, embed, encoder=r"encoder\.",
    ),
    "bge": Case(
        "bge-large", write_bert, "BertModel", BERT_LARGE, embed, encoder=r"encoder\.",
        env={"SERVED_MODEL_NAME": "random/bge-large-en"},
    ),
}  # fmt: skip


# ---- weights -------------------------------------------------------------------------------------------


def make(
    worker: str,
    folder: Path,
    *,
    tiny: bool,
    device: torch.device,
    dtype: torch.dtype,
    layers: int | None = None,
) -> Path:
    """Write the model of `worker` into `folder`, its weights drawn on `device`.

    tiny: keep the small sizes. layers: so many in place of the real ones.
    """
    import transformers

    case = CASES[worker]
    folder.mkdir(parents=True, exist_ok=True)
    case.write(folder, not tiny)
    model_class = getattr(transformers, case.model_class)
    config = model_class.config_class.from_pretrained(folder)
    generation = transformers.GenerationConfig.from_pretrained(folder) if model_class.can_generate() else None
    if not tiny:
        _resize(config, case.sizes, layers)
    torch.manual_seed(0)
    with device:
        model = model_class._from_config(config, dtype=dtype).eval()
    if generation is not None:
        model.generation_config = generation
    model.save_pretrained(folder)
    return folder


def main(part: Part) -> None:
    """Make the model of a worker, unless its folder is given, and say how large it is."""
    begin = time.perf_counter()
    if not part.folder.exists():
        make(part.worker, part.folder, tiny=part.tiny, device=part.device, dtype=part.dtype)
        part.row("seconds to make and write it", time.perf_counter() - begin)
    count, size = weights(part.folder, "")
    part.row("shape", CASES[part.worker].shape + (", made tiny" if part.tiny else ""))
    part.row("matrices' weights, millions", count / 1e6)
    part.row("their bytes, GB", size / 1e9)


def _resize(config: Any, sizes: Mapping[str, Any], layers: int | None) -> None:
    for name, value in sizes.items():
        if isinstance(value, Mapping):
            _resize(getattr(config, name), value, layers)
        elif layers and name.endswith("_layers"):
            setattr(config, name, layers)
        else:
            setattr(config, name, value)


def weights(folder: Path, pattern: str) -> tuple[int, int]:
    """How many weights have a name that matches `pattern`, and their bytes, by the headers of the files.

    Matrices only: the products with them are what takes the time.
    """
    from safetensors import safe_open

    count = size = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                view = file.get_slice(name)
                shape = view.get_shape()
                if len(shape) < 2 or not re.search(pattern, name):
                    continue
                numel = torch.Size(shape).numel()
                count += numel
                size += numel * (4 if view.get_dtype() == "F32" else 2)
    return count, size
