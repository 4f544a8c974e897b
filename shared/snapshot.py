"""A model's files in a folder: which of them count, and whether they are all there in their full length."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

Sizes = Mapping[str, int | None]
"""A repository's files, as paths below its root, and their bytes; None where the hub does not say."""

# ---- which files count ----------------------------------------------------------------------------------

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = (".safetensors", *_PICKLED)
_NEVER = (
    *(".onnx", ".onnx_data", ".h5", ".msgpack", ".ot", ".gguf", ".ggml", ".tflite", ".mlmodel", ".pb"),
    *(".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4", ".pdf", ".ipynb"),
    *(".parquet", ".arrow", ".incomplete"),
)
_ASIDE = re.compile(
    r"(^|/)(\.[^/]*|onnx|openvino|coreml|tflite|gguf|original|metal|runs|checkpoint-\d+|global_step\d+)(/|$)"
    r"|(^|/)(openvino_model[^/]*|events\.out\.tfevents[^/]*|[^/]*\.index\.[^./]+\.json)$"
    r"|(^|/)(training_args|optimizer|scheduler|scaler|rng_state)[^/]*\.(bin|pt|pth)$"
)
_SHARD = re.compile(r"-\d{5}-of-(\d{5})(?=\.)")
_VARIANT = re.compile(r"^([^.]+)\.[^.]+(\.[a-z]+)$")


def choose_files(files: Collection[str], extra: Sequence[str] = ()) -> list[str]:
    """Of a repository's files, those that a worker loads.

    safetensors, and where a folder has none, its .bin, .pt, .pth or .ckpt. Not: the same weights again in
    another format or precision (`model.fp16.safetensors` beside `model.safetensors`, `consolidated*` beside
    either), what training left behind, documentation. Whatever matches a glob pattern of `extra` is taken.
    """
    unsharded = {_SHARD.sub("", path) for path in files}
    safe = {os.path.split(path) for path in files if path.endswith(".safetensors")}
    has_safe = {folder for folder, _ in safe}
    has_model = {folder for folder, base in safe if not base.startswith("consolidated")}

    def counts(path: str) -> bool:
        folder, base = os.path.split(path)
        weights = base.removesuffix(".index.json")
        if weights.endswith(_NEVER) or _ASIDE.search(path):
            return False
        if weights.endswith(_PICKLED) and folder in has_safe:
            return False
        if weights.startswith("consolidated") and folder in has_model:
            return False
        variant = _VARIANT.match(_SHARD.sub("", base)) if base.endswith(_WEIGHTS) else None
        return variant is None or os.path.join(folder, variant[1] + variant[2]) not in unsharded

    return sorted(path for path in files if counts(path) or any(fnmatch(path, p) for p in extra))


def has_weights(files: Collection[str], extra: Sequence[str] = ()) -> bool:
    """Whether there is something to load among `files`, as `choose_files` gave them."""
    return any(path.endswith(_WEIGHTS) or any(fnmatch(path, p) for p in extra) for path in files)


# ---- whole or not ---------------------------------------------------------------------------------------


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent)
    try:
        with open(handle, "w") as file:
            file.write(text)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def write_list(snapshot: Path, sizes: Sizes) -> None:
    """Keep the hub's list beside a snapshot of a hub cache."""
    kept = {"files": {path: {"size": sizes[path]} for path in sorted(sizes)}}
    write_whole(snapshot.parent.parent / "files" / f"{snapshot.name}.json", json.dumps(kept))


def read_list(snapshot: Path) -> Sizes | None:
    """The list that `write_list` kept, or the one that huggingface_hub 2 keeps; None without either."""
    for kind in ("files", "trees"):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            kept = (snapshot.parent.parent / kind / f"{snapshot.name}.json").read_text()
            return {path: info["size"] for path, info in json.loads(kept)["files"].items()}
    return None


def size_of(folder: Path, extra: Sequence[str] = ()) -> int:
    """Bytes of the files that count."""
    return sum((folder / path).stat().st_size for path in choose_files(_walk(folder), extra))


def fits(path: Path, size: int | None) -> bool:
    """Whether the file is there, with this many bytes."""
    try:
        return path.stat().st_size == size or size is None
    except OSError:
        return False


def flaw(folder: Path, extra: Sequence[str] = ()) -> str | None:
    """Why the copy in `folder` is not whole, or None when it is.

    With a list of the hub beside it, the sizes decide. Without one, the files have to prove it themselves:
    configuration and weights are there, indexes and shard numbers complete, each file intact.
    """
    if (sizes := read_list(folder)) is not None:
        chosen = choose_files(sizes, extra)
        broken = (path for path in chosen if not fits(folder / path, sizes[path]))
        return next((f"{path} is missing or cut short" for path in broken), None)
    files = set(choose_files(_walk(folder), extra))
    if not files & {"config.json", "modules.json", "model_index.json", "adapter_config.json"}:
        return "config.json is missing"
    if not has_weights(files, extra):
        return "weights are missing"
    if folder.parent.name == "snapshots" and any((folder.parent.parent / "blobs").glob("*.incomplete")):
        return "a download was broken off, and nothing says what it was to fetch"
    for path in sorted(files):
        if not _intact(folder / path):
            return f"{path} is missing or cut short"
    try:
        missing = sorted(_named_by_others(folder, files) - files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"an index can not be read ({type(error).__name__})"
    return f"{missing[0]} is missing" if missing else None


# Parts of a sentence-transformers model with weights of their own. Only Normalize may have no file at all.
_WEIGHTED = re.compile(r"(Transformer|Dense|LayerNorm|LSTM|CNN|CLIPModel|Embeddings?|AutoEncoder)$").search


def _walk(folder: Path) -> list[str]:
    """Every file below `folder`, links included: one that leads nowhere is a file that is not there."""
    walk = os.walk(folder, followlinks=True)
    return [os.path.relpath(os.path.join(at, base), folder) for at, _, bases in walk for base in bases]


def _named_by_others(folder: Path, files: Collection[str]) -> set[str]:
    """The files that an index, the number in a shard's name, or modules.json says there must be."""
    named: set[str] = set()
    for path in files:
        if shard := _SHARD.search(path):
            numbers = range(1, int(shard[1]) + 1)
            named |= {_SHARD.sub(f"-{number:05d}-of-{shard[1]}", path) for number in numbers}
            named.add(_SHARD.sub("", path) + ".index.json")
        if path.removesuffix(".index.json").endswith(_WEIGHTS) and path.endswith(".json"):
            parts = json.loads((folder / path).read_text())["weight_map"].values()
            named |= {os.path.join(os.path.dirname(path), part) for part in parts}
    modules = json.loads((folder / "modules.json").read_text()) if "modules.json" in files else []
    for module in modules:
        inside = [path for path in files if path.startswith(os.path.join(module["path"], ""))]
        if _WEIGHTED(module["type"]) and not has_weights(inside):
            named.add(os.path.join(module["path"], "(weights)"))
        elif not inside and not module["type"].endswith("Normalize"):
            named.add(module["path"])
    return named


def _intact(path: Path) -> bool:
    """Whether the file has its full length, as far as it tells: many kinds do, some do not."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if path.suffix == ".safetensors":
                header = int.from_bytes(start, "little")
                if not 0 < header <= size - 8:
                    return False
                tensors: dict[str, Any] = json.loads(file.read(header))
                tensors.pop("__metadata__", None)
                return size == 8 + header + max((t["data_offsets"][1] for t in tensors.values()), default=0)
            if start.startswith(b"PK"):  # what torch.save writes; a zip file's directory is at its end
                return zipfile.is_zipfile(file)
            blob = path.resolve()
            file.seek(0)
            if blob.parent.name == "blobs" and len(blob.name) in (40, 64) and size < 1 << 26:
                # The name of a blob is the SHA-256 of a large file, and of a small one git's SHA-1.
                digest = hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(b"blob %d\0" % size)  # noqa: S324
                digest.update(file.read())
                return digest.hexdigest() == blob.name
            if path.suffix == ".json":  # not parsed: a vocabulary would take a tenth of a second
                return file.read().rstrip().endswith((b"}", b"]"))
        return size > 0 or path.suffix not in _WEIGHTS
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
