"""Which files of a repository a worker loads, and when a copy without the hub's tree is complete."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.snapshot import choose_files, has_weights, why_incomplete
from tests.machine import write

SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]

# name: (chosen, not chosen)
REPOSITORIES: dict[str, tuple[str, str]] = {
    "all-MiniLM-L6-v2": (
        "1_Pooling/config.json config.json config_sentence_transformers.json model.safetensors modules.json "
        "sentence_bert_config.json special_tokens_map.json tokenizer.json tokenizer_config.json vocab.txt",
        ".gitattributes README.md onnx/model.onnx onnx/model_O4.onnx openvino/openvino_model.bin "
        "openvino/openvino_model.xml pytorch_model.bin rust_model.ot tf_model.h5",
    ),
    "bge-m3, pickled only": (
        "config.json colbert_linear.pt sparse_linear.pt pytorch_model.bin sentencepiece.bpe.model "
        "modules.json 1_Pooling/config.json tokenizer.json",
        "imgs/bm25.jpg onnx/model.onnx onnx/model.onnx_data onnx/config.json README.md .gitattributes",
    ),
    "Dense still pickled": (
        "config.json modules.json model.safetensors 1_Pooling/config.json 2_Dense/config.json "
        "2_Dense/pytorch_model.bin",
        "pytorch_model.bin flax_model.msgpack",
    ),
    "Llama, sharded": (
        " ".join([*SHARDS, "model.safetensors.index.json config.json generation_config.json tokenizer.json"]),
        "original/consolidated.00.pth original/params.json LICENSE.md USE_POLICY.md "
        "pytorch_model-00001-of-00002.bin pytorch_model-00002-of-00002.bin pytorch_model.bin.index.json",
    ),
    "Mistral": (
        " ".join([*SHARDS, "model.safetensors.index.json config.json params.json tekken.json"]),
        "consolidated.safetensors consolidated.safetensors.index.json",
    ),
    "Mistral's own format alone": ("consolidated.safetensors params.json tekken.json", ""),
    "whisper": (
        "config.json generation_config.json merges.txt model.safetensors normalizer.json vocab.json",
        "model.fp32-00001-of-00002.safetensors model.fp32-00002-of-00002.safetensors flax_model.msgpack "
        "model.safetensors.index.fp32.json pytorch_model.fp32-00001-of-00002.bin pytorch_model.bin",
    ),
    "a precision that is the only one": ("config.json model.fp16.safetensors", ""),
    "diffusion": (
        "model_index.json unet/config.json unet/diffusion_pytorch_model.safetensors "
        "text_encoder/model.safetensors scheduler/scheduler_config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.bin "
        "text_encoder/model.fp16.safetensors text_encoder/pytorch_model.bin sample.png",
    ),
    "XTTS": (
        "config.json model.pth dvae.pth mel_stats.pth speakers_xtts.pth vocab.json hash.md5",
        "README.md",
    ),
    "voices beside": ("config.json model.safetensors voices/af.pt voices/bf.pt", "kokoro.pth"),
    "CTranslate2": (
        "config.json model.bin tokenizer.json vocabulary.txt preprocessor_config.json",
        "README.md",
    ),
    "fresh from training": (
        "config.json pytorch_model.bin tokenizer.json trainer_state.json",
        "training_args.bin optimizer.pt scheduler.pt rng_state_0.pth checkpoint-500/pytorch_model.bin "
        "checkpoint-500/config.json runs/Jan01/events.out.tfevents.1 global_step9/mp_rank_00_model_states.pt",
    ),
    "own code": ("config.json model.safetensors modeling_x.py configuration_x.py chat_template.jinja", ""),
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_only_files_that_are_loaded_are_chosen(name: str) -> None:
    chosen, rest = (files.split() for files in REPOSITORIES[name])
    assert choose_files([*rest, *chosen]) == sorted(chosen)
    assert has_weights(chosen)


def test_extra_patterns_are_chosen_too() -> None:
    files = ["config.json", "x.Q4_K_M.gguf", "x.Q8_0.gguf", "model.safetensors", "sparse_linear.pt"]
    assert choose_files(files, ["*Q4_K_M.gguf", "sparse_*"]) == [
        "config.json", "model.safetensors", "sparse_linear.pt", "x.Q4_K_M.gguf",
    ]  # fmt: skip
    assert not has_weights(choose_files(["config.json", "x.Q8_0.gguf"]))
    assert has_weights(["x.Q8_0.gguf"], ["*.gguf"])


# ---- complete or not, without the hub's tree --------------------------------------------------------------

INDEX = {"weight_map": {f"w{n}": name for n, name in enumerate(SHARDS)}}
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    **dict.fromkeys(SHARDS, b"x"),
    "onnx/model.onnx": b"x",
}


def drop(*paths: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / path).unlink() for path in paths]


def replace(path: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes(data)


def link_to_nowhere(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("gone")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard missing": (drop(SHARDS[2]), SHARDS[2]),
    "the index missing": (drop("model.safetensors.index.json"), "model.safetensors.index.json"),
    "index and a shard missing": (drop("model.safetensors.index.json", SHARDS[0]), SHARDS[0]),
    "the index cut": (
        replace("model.safetensors.index.json", FILES["model.safetensors.index.json"][:-5]),
        "index cannot be read",
    ),
    "the index of another form": (replace("model.safetensors.index.json", b"[1]"), "index cannot be read"),
    "no configuration": (drop("config.json"), "config.json"),
    "no weights": (drop(*SHARDS), "weights"),
    "a link to nowhere": (link_to_nowhere, "tokenizer.json"),
}


def test_a_complete_copy(tmp_path: Path) -> None:
    assert why_incomplete(write(tmp_path, FILES)) is None
    drop("onnx/model.onnx")(tmp_path)
    assert why_incomplete(tmp_path) is None


@pytest.mark.parametrize("name", DAMAGE)
def test_an_incomplete_copy(tmp_path: Path, name: str) -> None:
    damage, part = DAMAGE[name]
    damage(write(tmp_path, FILES))
    assert part in (why_incomplete(tmp_path) or "")
