"""Which files count, and when a copy without a list is whole."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.snapshot import choose_files, flaw, has_weights
from tests.hub import safetensors

SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]

# name: (what is taken, what is left)
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
def test_takes_what_is_loaded_and_nothing_else(name: str) -> None:
    taken, left = (files.split() for files in REPOSITORIES[name])
    assert choose_files([*left, *taken]) == sorted(taken)
    assert has_weights(taken)


def test_extra_patterns_are_taken_besides() -> None:
    files = ["config.json", "x.Q4_K_M.gguf", "x.Q8_0.gguf", "model.safetensors", "sparse_linear.pt"]
    assert choose_files(files, ["*Q4_K_M.gguf", "sparse_*"]) == [
        "config.json", "model.safetensors", "sparse_linear.pt", "x.Q4_K_M.gguf",
    ]  # fmt: skip
    assert not has_weights(choose_files(["config.json", "x.Q8_0.gguf"]))
    assert has_weights(["x.Q8_0.gguf"], ["*.gguf"])


# ---- whole or not, without a list -----------------------------------------------------------------------


def pickled(size: int = 1000) -> bytes:
    """As torch.save writes it: a zip file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", b"x" * size)
    return file.getvalue()


MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]
INDEX = {"weight_map": {f"w{n}": name for n, name in enumerate(SHARDS)}}
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "modules.json": json.dumps(MODULES).encode(),
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    **{name: safetensors(1000, n) for n, name in enumerate(SHARDS)},
    "1_Pooling/config.json": b"{}",
    "2_Dense/config.json": b"{}",
    "2_Dense/pytorch_model.bin": pickled(),
    "onnx/model.onnx": b"broken, and nobody's business",
}


def write(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def hub_cache(root: Path, files: dict[str, bytes] = FILES) -> Path:
    """A snapshot as another tool's download leaves it: links to blobs with hashes for names, no list."""
    repo = root / "models--org--name"
    snapshot = repo / "snapshots" / ("c" * 40)
    (repo / "blobs").mkdir(parents=True)
    for path, data in files.items():
        large = path.endswith((".safetensors", ".bin"))
        sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        blob = repo / "blobs" / (hashlib.sha256(data).hexdigest() if large else sha1)
        blob.write_bytes(data)
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).symlink_to(blob)
    return snapshot


@pytest.mark.parametrize("make", [write, hub_cache])
def test_a_whole_copy_has_no_flaw(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    assert flaw(make(tmp_path)) is None


def edit(path: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes(change((folder / path).read_bytes()))


def drop(path: str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights a byte short": (edit(SHARDS[1], lambda data: data[:-1]), SHARDS[1]),
    "weights a byte long": (edit(SHARDS[1], lambda data: data + b"\0"), SHARDS[1]),
    "weights are zeros": (edit(SHARDS[1], lambda data: bytes(len(data))), SHARDS[1]),
    "weights are text": (edit(SHARDS[1], lambda _: b"version https://git-lfs.github.com/spec/v1"), SHARDS[1]),
    "weights empty": (edit(SHARDS[1], lambda _: b""), SHARDS[1]),
    "a shard missing": (drop(SHARDS[2]), SHARDS[2]),
    "the index missing": (drop("model.safetensors.index.json"), "model.safetensors.index.json"),
    "index and a shard missing": (
        lambda folder: (drop("model.safetensors.index.json")(folder), drop(SHARDS[0])(folder)),
        SHARDS[0],
    ),
    "the index cut": (edit("model.safetensors.index.json", lambda data: data[:-5]), "index.json"),
    "the index strange": (edit("model.safetensors.index.json", lambda _: b"[1]"), "can not be read"),
    "no configuration": (
        lambda folder: (drop("config.json")(folder), drop("modules.json")(folder)),
        "config.json",
    ),
    "no weights": (
        lambda folder: [drop(name)(folder) for name in (*SHARDS, "2_Dense/pytorch_model.bin")],
        "weights",
    ),
    "JSON cut": (edit("tokenizer.json", lambda data: data[:-1]), "tokenizer.json"),
    "a part missing": (lambda folder: shutil.rmtree(folder / "1_Pooling"), "1_Pooling"),
    "a part without its weights": (drop("2_Dense/pytorch_model.bin"), "2_Dense/(weights)"),
    "a pickle cut": (edit("2_Dense/pytorch_model.bin", lambda data: data[:-1]), "2_Dense/pytorch_model.bin"),
    "a link to nowhere": (
        lambda folder: (drop("tokenizer.json")(folder), (folder / "tokenizer.json").symlink_to("gone")),
        "tokenizer.json",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_copy_is_not_whole(tmp_path: Path, name: str) -> None:
    damage, word = DAMAGE[name]
    damage(write(tmp_path))
    assert word in (flaw(tmp_path) or "")


def test_a_blob_has_to_have_the_hash_that_is_its_name(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    (snapshot / "tokenizer.json").resolve().write_bytes(b'{"version": "2.0"}')
    assert "tokenizer.json" in (flaw(snapshot) or "")


def test_a_broken_off_download_proves_nothing_without_a_list(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    (snapshot.parent.parent / "blobs" / f"{'d' * 64}.incomplete").touch()
    assert "broken off" in (flaw(snapshot) or "")


@given(st.integers(0, len(safetensors(1000)) - 1))
def test_no_beginning_of_a_weights_file_is_whole(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    folder = tmp_path_factory.getbasetemp() / "beginning"
    write(folder, {"config.json": b"{}", "model.safetensors": safetensors(1000)})
    assert flaw(folder) is None
    (folder / "model.safetensors").write_bytes(safetensors(1000)[:size])
    assert flaw(folder) is not None
