"""A model's folder: a complete copy on this machine, or one downloaded once for all workers.

    model = resolve_model("sentence-transformers/all-MiniLM-L6-v2", token=token)
    AutoModel.from_pretrained(model.path)

The order: a local folder; the cache of HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE or HF_HOME; baked into the image
(BAKED_MODEL_DIR, /models); RunPod's host cache, in both of its layouts; the hub cache on the network volume
(RUNPOD_VOLUME_PATH, /runpod-volume); the one on the container's disk; a download into the volume's cache, or
the disk's where the volume is absent, read-only or full.

A complete copy is used without a request to the hub: without a revision, a model that has moved on the hub
is not downloaded again at a cold start. To get another one, name its revision.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Literal

from shared import hub
from shared.errors import StartError
from shared.hub import HubUnreachable, ModelRequest
from shared.logs import log
from shared.snapshot import COMMIT, choose_files, files_below, read_tree, why_incomplete

Source = Literal["local", "baked", "host-cache", "volume", "disk", "download"]

LEASE_S = 30.0  # a lease without a heartbeat for so long has lost its holder
HEARTBEAT_S = 3.0
LOG_S = 10.0  # between two log lines of a wait


@dataclass(frozen=True)
class ModelPath:
    """A complete model on this machine.

    name: the id as the user gave it. revision: the commit, None where unknown. source: where it lies;
    `download` when this start downloaded it. bytes: of the files that are loaded.
    """

    path: Path
    name: str
    revision: str | None
    source: Source
    bytes: int


def resolve_model(
    name: str, revision: str | None = None, *, token: str | None = None, extra: Sequence[str] = ()
) -> ModelPath:
    """The folder with all of the model's files, downloaded if need be. Sets the offline flags afterwards.

    name: an id on the hub, or a folder. revision: branch, tag or commit; None is the copy at hand, or "main".
    extra: glob patterns of files to take besides those that `shared.snapshot.choose_files` takes.

    Raises StartError with the code model_not_found, revision_not_found, gated, bad_token, no_weights,
    incomplete, no_space, read_only or offline; HubUnreachable when a later attempt may succeed.
    """
    leave_offline()
    request = ModelRequest(name, revision or None, token, tuple(extra))
    model = _find(request) or download(request, _download_caches())
    _go_offline()
    log.info("model=%s revision=%s source=%s path=%s", name, model.revision, model.source, model.path)
    return model


def use_volume() -> Path | None:
    """Put the hub's cache and the compile caches of torch, Triton and vLLM on the network volume.

    To be called before those are imported. Sets variables that are not set, and none where no writable volume
    is mounted. Returns the volume, or None.
    """
    volume = _volume()
    if not os.access(volume, os.W_OK):
        return None
    variables = {
        "HF_HOME": volume / "huggingface-cache",
        "HF_MODULES_CACHE": _default_home() / "modules",  # code is imported from there: small, per host
        "TORCHINDUCTOR_CACHE_DIR": volume / ".cache" / "torchinductor",
        "TRITON_CACHE_DIR": volume / ".cache" / "triton",
        "VLLM_CACHE_ROOT": volume / ".cache" / "vllm",
    }
    for name, path in variables.items():
        os.environ.setdefault(name, str(path))
    return volume


@contextmanager
def lease(path: Path) -> Iterator[None]:
    """Hold the lease that is the file `path`, alone among the processes of all hosts that share its folder.

    Waits for as long as the holder lives. flock is not used: on a network file system it may hold within one
    host only. A holder that was paused may resume beside its successor, so work under a lease has to be safe
    then, if wasteful. Raises OSError where the folder cannot be written.
    """
    from filelock import SoftFileLease, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    held = SoftFileLease(path, lease_duration=LEASE_S, heartbeat_interval=min(HEARTBEAT_S, LEASE_S / 10))
    begin = time.monotonic()
    for timeout in chain([0.0], repeat(LOG_S)):
        try:
            held.acquire(timeout, poll_interval=0.2)
            break
        except Timeout:
            log.info("waiting for another worker, %.0f s so far: %s", time.monotonic() - begin, path)
    try:
        yield
    finally:
        held.release()


# ---- offline --------------------------------------------------------------------------------------------

_flags_are_ours = False  # a second model may be downloaded although the flags are set


def is_offline() -> bool:
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


def leave_offline() -> None:
    """Clear the offline flags that `resolve_model` has set. Those of the user stay."""
    global _flags_are_ours
    if _flags_are_ours:
        hub.set_flags(HF_HUB_OFFLINE=False, TRANSFORMERS_OFFLINE=False)
    _flags_are_ours = False


def _go_offline() -> None:
    """The libraries load from the disk from now on, without a request to the hub."""
    global _flags_are_ours
    _flags_are_ours = not is_offline()
    hub.set_flags(HF_HUB_OFFLINE=True, TRANSFORMERS_OFFLINE=True)


# ---- find -----------------------------------------------------------------------------------------------


def _volume() -> Path:
    return Path(os.environ.get("RUNPOD_VOLUME_PATH") or "/runpod-volume")


def _default_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"


def _caches() -> tuple[Path | None, Path, Path]:
    """The hub caches of the user, where one is set, of the network volume, and of the container's disk."""
    get = os.environ.get
    user = get("HF_HUB_CACHE") or get("HUGGINGFACE_HUB_CACHE")
    if not user and (home := get("HF_HOME")):
        user = f"{home}/hub"
    volume, disk = _volume() / "huggingface-cache/hub", _default_home() / "hub"
    return Path(user).expanduser() if user else None, volume, disk


def _download_caches() -> list[Path]:
    user, volume, disk = _caches()
    return [volume, disk if user is None or user.is_relative_to(_volume()) else user]


def _find(request: ModelRequest) -> ModelPath | None:
    folder = Path(os.path.expanduser(request.name))
    if folder.is_dir():
        if reason := why_incomplete(folder, request.extra):
            raise StartError(f"MODEL_NAME={request.name} is incomplete: {reason}.", code="incomplete")
        return _model_path(request, folder, "local")
    if request.name.startswith(("/", ".", "~")):
        raise StartError(f"MODEL_NAME={request.name}: there is no such folder.", code="model_not_found")
    rejected = []
    for source, folder in _candidates(request):
        reason = why_incomplete(folder, request.extra)
        if not reason and source in ("volume", "disk") and not is_offline() and read_tree(folder) is None:
            with suppress(HubUnreachable, StartError, OSError):
                hub.fetch_tree(request, folder)
            reason = why_incomplete(folder, request.extra)
        if not reason:
            return _model_path(request, folder, source)
        log.info("incomplete: %s: %s", folder, reason)
        rejected.append(f"{folder} is incomplete: {reason}")
    if is_offline():
        copies = f" ({'; '.join(rejected)})" if rejected else ""
        message = f"No complete copy of {request.name} is at hand{copies} and HF_HUB_OFFLINE is set."
        raise StartError(f"{message} Unset it to download one.", code="offline")
    return None


def _model_path(request: ModelRequest, folder: Path, source: Source) -> ModelPath:
    commit = folder.name if COMMIT.fullmatch(folder.name) else None
    size = sum((folder / path).stat().st_size for path in choose_files(files_below(folder), request.extra))
    return ModelPath(folder, request.name, commit, source, size)


def _candidates(request: ModelRequest) -> Iterator[tuple[Source, Path]]:
    """Folders that may hold the requested model, best first."""
    user, volume, disk = _caches()
    if user is not None and user != volume:
        yield from _cached(request, user, "volume" if user.is_relative_to(_volume()) else "disk")
    baked = Path(os.environ.get("BAKED_MODEL_DIR") or "/models")
    for folder in _match(baked, request.name):
        yield "baked", folder
    yield from _cached(request, baked, "baked")
    store = Path(os.environ.get("RUNPOD_MODEL_STORE") or "/runpod/model-store/huggingface")
    for model in _match(store, request.name):
        yield from (("host-cache", folder) for folder in _revisions(request, model, model / "refs"))
    yield from _cached(request, volume, "volume")
    if user != disk:
        yield from _cached(request, disk, "disk")


def _cached(request: ModelRequest, cache: Path, source: Source) -> Iterator[tuple[Source, Path]]:
    for repo in _match(cache, request.folder):
        # RunPod mounts its host cache at the address of the volume's, read-only. Its names may be lower-case.
        is_ours = source == "baked" or (repo.name == request.folder and os.access(repo, os.W_OK))
        for folder in _revisions(request, repo / "snapshots", repo / "refs"):
            yield source if is_ours else "host-cache", folder


def _match(root: Path, name: str) -> list[Path]:
    """The folders `name` below `root`, compared without case, the exact one first."""
    folders = [root]
    for part in name.split("/"):
        folders = [child for at in folders for child in _children(at) if child.name.lower() == part.lower()]
    return sorted(folders, key=lambda folder: folder != root / name)


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _revisions(request: ModelRequest, root: Path, refs: Path) -> list[Path]:
    """The folders of the requested revision; without one, main's and then the others, newest first."""
    revision = request.revision or "main"
    try:
        commit = (refs / revision).read_text().strip()
    except (OSError, ValueError):
        commit = revision
    folders = [folder for folder in _children(root) if folder.is_dir()]
    if request.revision is None:
        return sorted(folders, key=lambda folder: (folder.name != commit, -folder.lstat().st_mtime))
    if revision == commit == "main" and is_offline() and len(folders) == 1:
        return folders  # no ref names main's commit, and the hub may not be asked
    return [folder for folder in folders if folder.name == commit]


# ---- download -------------------------------------------------------------------------------------------


def download(request: ModelRequest, caches: Sequence[Path]) -> ModelPath:
    """Download into the first of the hub caches that takes it, unless another worker has done so."""
    refused: list[OSError] = []
    for cache in caches:
        if cache.is_relative_to(_volume()) and not _volume().is_dir():
            continue
        revision = (request.revision or "main").replace("/", "--")
        try:
            with lease(cache / ".locks" / f"{request.folder}@{revision}.lease"):
                return _find(request) or _model_path(request, hub.fetch_model(request, cache), "download")
        except OSError as error:
            if error.errno not in (*hub.DISK_FULL, *hub.READ_ONLY):
                raise
            log.warning("no download into %s: %s", cache, error.strerror)
            refused.append(OSError(error.errno, f"{cache}: {error.strerror}"))
    is_full = any(error.errno in hub.DISK_FULL for error in refused)
    code, advice = "read_only", "Mount the network volume writable, or set HF_HOME to a writable folder."
    if is_full:
        code = "no_space"
        advice = "Give the endpoint a larger container disk or network volume, or use a smaller model."
    reasons = "; ".join(str(error.strerror) for error in refused)
    raise StartError(f"{request.name} cannot be stored: {reasons}. {advice}", code=code)
