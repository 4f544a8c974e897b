"""Where a model's files are: found whole on this machine, or downloaded once for all workers.

    model = resolve_model("sentence-transformers/all-MiniLM-L6-v2", token=token)
    AutoModel.from_pretrained(model.path)

The order: a local folder; baked into the image (BAKED_MODEL_DIR, /models); RunPod's host cache, in both of
its layouts; the hub cache on the network volume (RUNPOD_VOLUME_PATH, /runpod-volume); the one on the
container's disk; a download into the volume's cache, or the disk's where the volume is absent, read-only or
full.

A whole copy at hand is used as it is, without a request to the hub: without a revision, a model that has
moved on the hub is not fetched anew at a cold start. To get another one, name its revision.

What makes a copy whole is the hub's list of files and sizes, kept beside the snapshot before the first byte
is fetched. huggingface_hub renames a file into place when it has all of it, so what a killed download leaves
does not match its list. A copy that came without a list gets one from the hub, once; one that is read-only,
or whose hub does not answer, has to prove itself (`shared.snapshot.flaw`).

`python -m shared.volume bake NAME [--revision R] --to /models` downloads a model into an image.
"""

from __future__ import annotations

import argparse
import errno
import glob
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from shared.errors import StartError
from shared.lock import every, lock
from shared.logs import log
from shared.snapshot import (
    Sizes,
    choose_files,
    fits,
    flaw,
    has_weights,
    read_list,
    size_of,
    write_list,
    write_whole,
)

Source = Literal["local", "baked", "host-cache", "volume", "disk", "download"]
T = TypeVar("T")

RETRY_S = (1.0, 2.0, 4.0, 8.0)  # waits between tries; a download that gets on begins anew at the first
SAY_S = 10.0  # a download shows in the log
_ABANDONED_S = 600.0  # a partial file that did not grow for so long is nobody's
_SECRET = Path("/run/secrets/HF_TOKEN")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class HubUnreachable(RuntimeError):
    """The hub does not answer, and no whole copy is at hand. A new try can mend it."""


@dataclass(frozen=True)
class ModelPath:
    """A whole model on this machine.

    name: the id as the user gave it. revision: the commit, None where unknown. source: where it was found;
    `download` when this start fetched it. bytes: of the files that count.
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
    extra: glob patterns of files to take beside those that `shared.snapshot.choose_files` takes.

    Raises StartError with the code model_not_found, revision_not_found, gated, bad_token, no_weights,
    incomplete, no_space, read_only or offline; HubUnreachable when a new try may go well.
    """
    global _offline_is_ours
    offline = _is_offline() and not _offline_is_ours
    if offline or _offline_is_ours:
        _set_offline(offline)
    wish = _Wish(name, revision or None, token, tuple(extra))
    model = _find(wish)
    if model is None and offline:
        message = f"No whole copy of {name} is at hand and HF_HUB_OFFLINE is set. Unset it to download one."
        raise StartError(message, code="offline")
    model = model or _download(wish, [hub for source, hub in _caches() if source != "baked"])
    _set_offline(True)
    _offline_is_ours = not offline
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
        "HF_MODULES_CACHE": _own_cache() / "modules",  # code is imported from there: small, each host's own
        "TORCHINDUCTOR_CACHE_DIR": volume / ".cache" / "torchinductor",
        "TRITON_CACHE_DIR": volume / ".cache" / "triton",
        "VLLM_CACHE_ROOT": volume / ".cache" / "vllm",
    }
    for name, path in variables.items():
        os.environ.setdefault(name, str(path))
    return volume


# ---- find -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wish:
    name: str
    revision: str | None
    token: str | None
    extra: tuple[str, ...]

    @property
    def repo(self) -> str:
        """The model's folder in a hub cache."""
        return "models--" + self.name.replace("/", "--")


def _volume() -> Path:
    return Path(os.environ.get("RUNPOD_VOLUME_PATH") or "/runpod-volume")


def _own_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"


def _caches() -> list[tuple[Source, Path]]:
    """The hub caches. The user's HF_HOME counts as the container's disk, unless it is on the volume."""
    home = Path(os.environ.get("HF_HOME") or _own_cache())
    disk = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    if disk.is_relative_to(_volume()):
        disk = _own_cache() / "hub"
    baked = Path(os.environ.get("BAKED_MODEL_DIR") or "/models")
    return [("baked", baked), ("volume", _volume() / "huggingface-cache" / "hub"), ("disk", disk)]


def _find(wish: _Wish) -> ModelPath | None:
    folder = Path(os.path.expanduser(wish.name))
    if folder.is_dir():
        if reason := flaw(folder, wish.extra):
            raise StartError(f"MODEL_NAME={wish.name} is not a whole model: {reason}.", code="incomplete")
        return _found(wish, folder, "local")
    if wish.name.startswith(("/", ".", "~")):
        raise StartError(f"MODEL_NAME={wish.name}: there is no such folder.", code="model_not_found")
    for source, folder in _candidates(wish):
        reason = flaw(folder, wish.extra)
        unproven = source in ("volume", "disk") and read_list(folder) is None
        if not reason and unproven and not _is_offline():
            with suppress(HubUnreachable, StartError, OSError):
                write_list(folder, _ask_hub(wish, folder.name, waits=())[1])
                reason = flaw(folder, wish.extra)
        if not reason:
            return _found(wish, folder, source)
        log.info("not whole: %s: %s", folder, reason)
    return None


def _found(wish: _Wish, folder: Path, source: Source) -> ModelPath:
    commit = folder.name if _COMMIT.fullmatch(folder.name) else None
    return ModelPath(folder, wish.name, commit, source, size_of(folder, wish.extra))


def _candidates(wish: _Wish) -> Iterator[tuple[Source, Path]]:
    """Folders that may hold the wished model, best first."""
    (_, baked), *caches = _caches()
    for folder in _named(baked, wish.name):
        yield "baked", folder
    for repo in _named(baked, wish.repo):
        yield from (("baked", folder) for folder in _snapshots(repo, wish))
    store = Path(os.environ.get("RUNPOD_MODEL_STORE") or "/runpod/model-store/huggingface")
    for model in _named(store, wish.name):
        names = [wish.revision] if wish.revision else ["main", *(folder.name for folder in _ls(model))]
        yield from (("host-cache", model / name) for name in dict.fromkeys(names) if (model / name).is_dir())
    for source, hub in caches:
        for repo in _named(hub, wish.repo):
            # RunPod's own cache has the address of ours. Its names may be lower-case, and it is read-only.
            ours = repo.name == wish.repo and (os.access(repo, os.W_OK) or (repo / "files").is_dir())
            yield from ((source if ours else "host-cache", folder) for folder in _snapshots(repo, wish))


def _named(root: Path, name: str) -> list[Path]:
    """The folders `name` below `root`, compared without case, the exact one first."""
    found = [root]
    for part in name.split("/"):
        found = [child for at in found for child in _ls(at) if child.name.lower() == part.lower()]
    return sorted(found, key=lambda folder: folder != root / name)


def _ls(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _snapshots(repo: Path, wish: _Wish) -> list[Path]:
    """The snapshot of the wished revision; without one, main's and then the others, the newest first."""
    commit = wish.revision
    with suppress(OSError, ValueError):
        commit = (repo / "refs" / (wish.revision or "main")).read_text().strip()
    found = _ls(repo / "snapshots")
    if wish.revision:
        return [folder for folder in found if folder.name == commit]
    return sorted(found, key=lambda folder: (folder.name != commit, -folder.lstat().st_mtime))


# ---- download -------------------------------------------------------------------------------------------


def _download(wish: _Wish, hubs: Sequence[Path]) -> ModelPath:
    """Into the first cache that takes it."""
    refused: list[OSError] = []
    for hub in hubs:
        if hub.is_relative_to(_volume()) and not _volume().is_dir():
            continue
        try:
            with lock(hub / ".locks" / f"{wish.repo}@{(wish.revision or 'main').replace('/', '--')}"):
                return _find(wish) or _fetch(wish, hub)  # who held the lock before may have brought it
        except OSError as error:
            if error.errno not in (*_FULL, *_READ_ONLY):
                raise
            log.warning("no download into %s: %s", hub, error.strerror)
            refused.append(OSError(error.errno, f"{hub}: {error.strerror}"))
    advice = "Give the endpoint a larger container disk or network volume, or use a smaller model."
    reasons = "; ".join(str(error.strerror) for error in refused)
    code = "no_space" if any(error.errno in _FULL for error in refused) else "read_only"
    raise StartError(f"No place for {wish.name}: {reasons}. {advice}", code=code)


def _fetch(wish: _Wish, hub: Path) -> ModelPath:
    """Download into `hub`, whose lock is held."""
    commit, sizes = _ask_hub(wish, wish.revision, waits=RETRY_S)
    chosen = choose_files(sizes, wish.extra)
    if not has_weights(chosen, wish.extra):
        message = f"{wish.name} has no weights that this worker loads, safetensors, .bin, .pt or .pth."
        raise StartError(f"{message} Use another model.", code="no_weights")
    repo = hub / wish.repo
    snapshot, blobs = repo / "snapshots" / commit, repo / "blobs"

    def missing() -> list[str]:
        return [path for path in chosen if not fits(snapshot / path, sizes[path])]

    def get() -> None:
        from huggingface_hub import snapshot_download

        for path in missing():
            _remove(snapshot / path)
        snapshot_download(
            wish.name,
            revision=commit,
            cache_dir=hub,
            token=wish.token,
            endpoint=os.environ.get("HF_ENDPOINT"),
            allow_patterns=[glob.escape(path) for path in chosen],
        )
        if reason := flaw(snapshot, wish.extra):
            raise RuntimeError(reason)

    write_list(snapshot, sizes)
    _sweep(blobs, older_than=(repo / "files" / f"{commit}.json").stat().st_mtime - _ABANDONED_S)
    need, free = sum(sizes[path] or 0 for path in missing()), shutil.disk_usage(hub).free
    if need > free:
        raise OSError(errno.ENOSPC, f"{_mb(need)} needed, {_mb(free)} free")
    log.info("download model=%s revision=%s bytes=%d to=%s", wish.name, commit, need, hub)
    before, begin = set(_ls(blobs)), time.monotonic()

    def got() -> int:
        new = (blob for blob in _ls(blobs) if blob not in before)
        return sum(blob.lstat().st_size for blob in new if blob.exists())

    try:
        with every(SAY_S, lambda: log.info("downloaded %s of %s", _mb(got()), _mb(need))):
            _with_retries(get, wish, RETRY_S, progress=got)
    except OSError:
        for blob in set(_ls(blobs)) - before:
            blob.unlink(missing_ok=True)
        raise
    log.info("downloaded model=%s bytes=%d seconds=%.1f", wish.name, need, time.monotonic() - begin)
    with suppress(OSError):  # a copy without its ref costs the next start a question to the hub
        if wish.revision != commit:
            write_whole(repo / "refs" / (wish.revision or "main"), commit)
    return _found(wish, snapshot, "download")


def _sweep(blobs: Path, *, older_than: float) -> None:
    """Remove what killed downloads left. Both times are this file system's own."""
    for part in blobs.glob("*.incomplete"):
        with suppress(OSError):
            if part.stat().st_mtime < older_than:
                part.unlink()


def _remove(pointer: Path) -> None:
    """Remove a file of the wrong size, which huggingface_hub would take for good."""
    blob = pointer.resolve()
    pointer.unlink(missing_ok=True)
    if blob.parent.name == "blobs":
        blob.unlink(missing_ok=True)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


# ---- the hub --------------------------------------------------------------------------------------------


def _ask_hub(wish: _Wish, revision: str | None, *, waits: Sequence[float]) -> tuple[str, Sizes]:
    """The commit behind a revision, and the sizes of its files."""

    def ask() -> tuple[str, Sizes]:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=wish.token)
        info = api.model_info(wish.name, revision=revision or "main", files_metadata=True, timeout=10)
        return str(info.sha), {file.rfilename: file.size for file in info.siblings or []}

    return _with_retries(ask, wish, waits)


def _with_retries(
    call: Callable[[], T], wish: _Wish, waits: Sequence[float], progress: Callable[[], int] = lambda: 0
) -> T:
    """`call()`, again after each wait while it fails, and from the first wait on again when it got on.

    Raises StartError where a new try is of no use, OSError when the disk does not take it.
    """
    # A line each ten seconds says more in a worker's log than bars do. The store of blobs that repositories
    # share is guarded by flock alone, which a network file system may not keep between hosts. Telemetry asks
    # the hub one question more.
    for feature in ("PROGRESS_BARS", "SHARED_BLOBS", "TELEMETRY"):
        _set_flag(f"HF_HUB_DISABLE_{feature}", True)
    to_come, best = list(waits), progress()
    while True:
        try:
            return call()
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (*_FULL, *_READ_ONLY):
                raise
            # Xet, huggingface_hub's other transport, says in words that a disk is full.
            if re.search("No space left|quota exceeded", str(error), re.IGNORECASE):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            if refusal := _refusal(error, wish):
                raise refusal from None
            if (now := progress()) > best:
                to_come, best = list(waits), now
            if not to_come:
                raise HubUnreachable(f"{wish.name}: no answer from the hub ({_root(error)}).") from error
            log.warning("%s: %s, next try in %g s", wish.name, _root(error), to_come[0])
            time.sleep(to_come.pop(0))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _root(error: BaseException) -> str:
    """What lies behind an error, without its text: that may hold a signed address."""
    *_, root = _causes(error)
    return f"{type(root).__name__} {_status(root) or ''}".strip()


def _refusal(error: BaseException, wish: _Wish) -> StartError | None:
    """The permanent cause behind what huggingface_hub raised."""
    from huggingface_hub import errors, get_token

    name, page = wish.name, f"https://huggingface.co/{wish.name}"
    has_token = bool(wish.token or get_token())
    for cause in _causes(error):
        if isinstance(cause, errors.GatedRepoError) or _status(cause) == 403:
            what = "HF_TOKEN has no access to it" if has_token else "HF_TOKEN is not set"
            message = f"{name} is gated and {what}. Ask for access at {page} and set that account's HF_TOKEN."
            return StartError(message, code="gated")
        if isinstance(cause, errors.RevisionNotFoundError):
            message = f"{name} has no revision {wish.revision or 'main'}. Set MODEL_REVISION to one it has."
            return StartError(message, code="revision_not_found")
        if isinstance(cause, errors.RepositoryNotFoundError | errors.HFValidationError):
            what = "HF_TOKEN has no access" if has_token else "HF_TOKEN is not set"
            message = f"No model {name} on the hub, or it is private and {what}. Check MODEL_NAME."
            return StartError(message, code="model_not_found")
        if _status(cause) == 401:
            message = "The hub refuses HF_TOKEN as invalid. Set a valid one, or none for a public model."
            return StartError(message, code="bad_token")
    return None


_offline_is_ours = False  # the flags were set here, and a second model may still be downloaded


def _is_offline() -> bool:
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


def _set_offline(on: bool) -> None:
    _set_flag("HF_HUB_OFFLINE", on)
    _set_flag("TRANSFORMERS_OFFLINE", on)


def _set_flag(name: str, on: bool) -> None:
    """huggingface_hub reads its flags at its import, which may have been already."""
    os.environ[name] = "1" if on else "0"
    constants = sys.modules.get("huggingface_hub.constants")
    if hasattr(constants, name):
        setattr(constants, name, on)


# ---- python -m shared.volume ----------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """`bake`: download a model into a folder of an image. The token: the secret or the variable HF_TOKEN."""
    parser = argparse.ArgumentParser(prog="python -m shared.volume")
    bake = parser.add_subparsers(required=True).add_parser("bake", help="download a model into an image")
    bake.add_argument("name", help="its id on the Hugging Face Hub")
    bake.add_argument("--revision", help="branch, tag or commit (main)")
    bake.add_argument("--to", type=Path, default=Path("/models"), help="folder of the models (/models)")
    bake.add_argument("--extra", action="append", default=[], help="glob pattern of files to take besides")
    options = parser.parse_args(arguments)
    token = _SECRET.read_text() if _SECRET.is_file() else os.environ.get("HF_TOKEN", "")
    wish = _Wish(options.name, options.revision or None, token.strip() or None, tuple(options.extra))
    os.environ["BAKED_MODEL_DIR"] = str(options.to)
    try:
        # What the libraries leave in their home does not belong into the layer.
        with tempfile.TemporaryDirectory() as os.environ["HF_HOME"]:
            _download(wish, [options.to])
    except (StartError, HubUnreachable) as error:
        print(f"bake: {error}", file=sys.stderr)
        return 1
    shutil.rmtree(options.to / ".locks", ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
