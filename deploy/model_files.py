"""What a model is made of, from its folder or the hub: its config.json and the bytes of its weights by dtype.

Of the weights only headers are read. HF_ENDPOINT and HF_TOKEN are honoured.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_local_safetensors_metadata, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, NotASafetensorsRepoError

from deploy.config import ConfigError
from shared.errors import StartError
from shared.hub import HubUnreachable, ModelRequest, with_retries
from shared.snapshot import choose_files, files_below

# Formats whose dtypes are not in a header that can be read alone.
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Model:
    """config: that of config.json; empty if there is none. weights: bytes by safetensors' name of the dtype,
    as stored; `unknown` for files of another format, whole.
    """

    name: str
    config: dict[str, Any]
    weights: dict[str, int]

    @property
    def quantised(self) -> bool:
        return bool(self.config.get("quantization_config"))

    def loaded(self, dtype_bytes: int = 2) -> int:
        """Bytes in memory at `dtype_bytes` a parameter; quantised weights, and unknown ones, as stored."""
        widths = {} if self.quantised else {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
        return sum(
            size // widths[dtype] * dtype_bytes if dtype in widths else size
            for dtype, size in self.weights.items()
        )


def read_model(name: str, revision: str | None = None) -> Model:
    """The model in the folder `name`, or of that id on the hub. Raises ConfigError: what is missing."""
    token = os.environ.get("HF_TOKEN") or None
    folder = Path(name)
    try:
        if folder.is_dir():
            file = folder / "config.json"
            return Model(name, json.loads(file.read_text()) if file.exists() else {}, _local_weights(folder))
        request = ModelRequest(name, revision, token)
        return with_retries(lambda: _from_hub(name, revision, token), request, waits=())
    except (StartError, HubUnreachable, OSError, ValueError) as error:
        raise ConfigError(str(error)) from None


def _from_hub(name: str, revision: str | None, token: str | None) -> Model:
    try:
        path = hf_hub_download(name, "config.json", revision=revision, token=token)
        config = json.loads(Path(path).read_text())
    except EntryNotFoundError:
        config = {}
    return Model(name, config, _hub_weights(name, revision, token))


def _local_weights(folder: Path) -> dict[str, int]:
    try:
        return _by_dtype(get_local_safetensors_metadata(folder).files_metadata)
    except NotASafetensorsRepoError:
        return _whole(folder.name, {file: (folder / file).stat().st_size for file in files_below(folder)})


def _hub_weights(name: str, revision: str | None, token: str | None) -> dict[str, int]:
    api = HfApi(token=token)
    try:
        return _by_dtype(api.get_safetensors_metadata(name, revision=revision).files_metadata)
    except NotASafetensorsRepoError:
        files = api.model_info(name, revision=revision, files_metadata=True).siblings or []
        return _whole(name, {file.rfilename: file.size or 0 for file in files})


def _by_dtype(files: Mapping[str, Any]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for file in files.values():
        for tensor in file.tensors.values():
            begin, end = tensor.data_offsets
            sizes[tensor.dtype] += end - begin
    return dict(sizes)


def _whole(name: str, sizes: dict[str, int]) -> dict[str, int]:
    """The files of other formats that a worker loads. Raises ConfigError when there are none."""
    total = sum(sizes[file] for file in choose_files(sizes) if file.endswith((*_PICKLED, ".safetensors")))
    if not total:
        raise ConfigError(
            f"{name} has no weights in a format that a worker loads (safetensors, {', '.join(_PICKLED)})."
        )
    return {"unknown": total}
