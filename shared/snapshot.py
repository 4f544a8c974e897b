"""A snapshot of a model: which of its files a worker loads, and whether they are all there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

Sizes = Mapping[str, int | None]
"""The files of a repository as paths below its root, and their bytes; None where the hub does not say."""

# ---- which files are loaded -----------------------------------------------------------------------------

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = (".safetensors", *_PICKLED)
_NEVER = (
    *(".onnx", ".onnx_data", ".h5", ".msgpack", ".ot", ".gguf", ".ggml", ".tflite", ".mlmodel", ".pb"),
    *(".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4", ".pdf", ".ipynb"),
    *(".parquet", ".arrow", ".incomplete"),
)
_OTHER_FORMATS_AND_TRAINING = re.compile(
    r"(^|/)(\.[^/]*|onnx|openvino|coreml|tflite|gguf|original|metal|runs|checkpoint-\d+|global_step\d+)(/|$)"
    r"|(^|/)(openvino_model[^/]*|events\.out\.tfevents[^/]*|[^/]*\.index\.[^./]+\.json)$"
    r"|(^|/)(training_args|optimizer|scheduler|scaler|rng_state)[^/]*\.(bin|pt|pth)$"
)
_SHARD = re.compile(r"-\d{5}-of-(\d{5})(?=\.)")
_VARIANT = re.compile(r"^([^.]+)\.[^.]+(\.[a-z]+)$")
COMMIT = re.compile(r"[0-9a-f]{40}")


def choose_files(files: Collection[str], extra: Sequence[str] = ()) -> list[str]:
    """The files of a repository that a worker loads.

    safetensors, and in a folder that has none its .bin, .pt, .pth or .ckpt. Excluded are the same weights in
    another format or precision (`model.fp16.safetensors` beside `model.safetensors`, `consolidated*` beside
    either), leftovers of training, and documentation. A file that matches a glob pattern of `extra` is
    included in any case.
    """
    unsharded = {_SHARD.sub("", path) for path in files}
    safe = {os.path.split(path) for path in files if path.endswith(".safetensors")}
    has_safe = {folder for folder, _ in safe}
    has_model = {folder for folder, base in safe if not base.startswith("consolidated")}

    def is_loaded(path: str) -> bool:
        folder, base = os.path.split(path)
        weights = base.removesuffix(".index.json")
        if weights.endswith(_NEVER) or _OTHER_FORMATS_AND_TRAINING.search(path):
            return False
        if weights.endswith(_PICKLED) and folder in has_safe:
            return False
        if weights.startswith("consolidated") and folder in has_model:
            return False
        variant = _VARIANT.match(_SHARD.sub("", base)) if base.endswith(_WEIGHTS) else None
        return variant is None or os.path.join(folder, variant[1] + variant[2]) not in unsharded

    return sorted(path for path in files if is_loaded(path) or any(fnmatch(path, p) for p in extra))


def has_weights(files: Collection[str], extra: Sequence[str] = ()) -> bool:
    """Whether `files`, as `choose_files` returns them, include anything to load."""
    return any(path.endswith(_WEIGHTS) or any(fnmatch(path, p) for p in extra) for path in files)


# ---- complete or not ------------------------------------------------------------------------------------


def read_tree(snapshot: Path) -> Sizes | None:
    """The hub's files of a snapshot and their sizes; None where the cache does not have them.

    huggingface_hub writes them to the cache before it downloads the first file.
    """
    from huggingface_hub import errors, get_cached_repo_tree

    repo = snapshot.parent.parent
    name = repo.name.removeprefix("models--").replace("--", "/")
    if snapshot.parent.name != "snapshots" or not COMMIT.fullmatch(snapshot.name):
        return None
    with suppress(errors.CachedRepoTreeNotFoundError, errors.HFValidationError):
        tree = get_cached_repo_tree(name, revision=snapshot.name, cache_dir=repo.parent)
        return {file.path: file.size for file in tree}
    return None


def why_incomplete(folder: Path, extra: Sequence[str] = ()) -> str | None:
    """Why the copy in `folder` is incomplete, or None when it is complete.

    The sizes in the hub's tree decide. Without a tree there have to be configuration, weights, and all files
    that an index or the number in a shard's name requires.
    """
    if (sizes := read_tree(folder)) is not None:
        missing = (path for path in choose_files(sizes, extra) if not has_size(folder / path, sizes[path]))
        return next((f"{path} is missing or cut short" for path in missing), None)
    files = choose_files(files_below(folder), extra)
    configs = {"config.json", "modules.json", "model_index.json", "adapter_config.json"}
    if configs.isdisjoint(files) or not has_weights(files, extra):
        if any(folder.glob("*.gguf")):
            return "GGUF files are for llama.cpp; use the model's safetensors files and its config.json"
        return "config.json is missing" if configs.isdisjoint(files) else "weights are missing"
    try:
        required = _required_files(folder, files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"an index cannot be read ({type(error).__name__})"
    missing = (path for path in sorted({*files, *required}) if not has_size(folder / path, None))
    return next((f"{path} is missing" for path in missing), None)


def has_size(path: Path, size: int | None) -> bool:
    """Whether the file is there with `size` bytes, or with any where `size` is None."""
    return path.is_file() and size in (None, path.stat().st_size)


def files_below(folder: Path) -> list[str]:
    """Every file below `folder`, links included, even those that lead nowhere."""
    walk = os.walk(folder, followlinks=True)
    return [os.path.relpath(os.path.join(at, base), folder) for at, _, bases in walk for base in bases]


def _required_files(folder: Path, files: Collection[str]) -> set[str]:
    """The files that an index of shards lists, or that the number in a shard's name implies."""
    required: set[str] = set()
    for path in files:
        if shard := _SHARD.search(path):
            numbers = range(1, int(shard[1]) + 1)
            required |= {_SHARD.sub(f"-{number:05d}-of-{shard[1]}", path) for number in numbers}
            required.add(_SHARD.sub("", path) + ".index.json")
        if path.endswith(tuple(f"{suffix}.index.json" for suffix in _WEIGHTS)):
            shards = json.loads((folder / path).read_text())["weight_map"].values()
            required |= {os.path.join(os.path.dirname(path), shard) for shard in shards}
    return required
