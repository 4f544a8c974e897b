"""Requests to the Hugging Face Hub: a model's files, their download, retries, and what a failure means."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import StartError
from shared.logs import log
from shared.snapshot import Sizes, choose_files, files_below, has_size, has_weights

T = TypeVar("T")
RETRY_S = (1.0, 2.0, 4.0, 8.0)  # waits between attempts; the first one is next after any progress
LOG_S = 10.0  # between two log lines of a download
_ABANDONED_S = 600.0  # a partial file that did not grow for so long belongs to a killed download
RATE_LIMIT_S = 300.0  # the longest wait that the hub may ask for, which is its window of a rate limit
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class HubUnreachable(RuntimeError):
    """The hub does not answer or refuses for too many requests. A later attempt may succeed."""


@dataclass(frozen=True)
class ModelRequest:
    """name: the id on the hub. revision: branch, tag or commit. extra: glob patterns of additional files."""

    name: str
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    extra: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The name of the model's folder in a hub cache."""
        return "models--" + self.name.replace("/", "--")


# ---- files -------------------------------------------------------------------------------------------


def repo_files(
    request: ModelRequest, revision: str | None, *, waits: Sequence[float] | None = None
) -> tuple[str, Sizes]:
    """The commit of a revision, and the sizes of its files. Raises as `with_retries` does."""

    def ask() -> tuple[str, Sizes]:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=request.token)
        info = api.model_info(request.name, revision=revision or "main", files_metadata=True, timeout=10)
        return str(info.sha), {file.rfilename: file.size for file in info.siblings or []}

    return with_retries(ask, request, waits=waits)


def _snapshot_download(request: ModelRequest, commit: str, files: Collection[str], cache: Path) -> None:
    """Write the tree of the commit to the hub cache, then those of `files` that are not there yet."""
    from huggingface_hub import snapshot_download

    snapshot_download(
        request.name,
        revision=commit,
        cache_dir=cache,
        token=request.token,
        endpoint=os.environ.get("HF_ENDPOINT"),
        allow_patterns=[glob.escape(path) for path in files],
    )


def fetch_model(request: ModelRequest, cache: Path) -> Path:
    """The snapshot, downloaded into a hub cache whose lease is held. Raises as `with_retries` does."""
    commit, sizes = repo_files(request, request.revision)
    files = choose_files(sizes, request.extra)
    if not has_weights(files, request.extra):
        message = f"{request.name} has no weights that this worker loads, safetensors, .bin, .pt or .pth."
        raise StartError(f"{message} Use another model.", code="no_weights")
    repo = cache / request.folder
    snapshot, blobs = repo / "snapshots" / commit, repo / "blobs"

    def missing() -> list[str]:
        return [path for path in files if not has_size(snapshot / path, sizes[path])]

    def attempt() -> None:
        for path in missing():  # huggingface_hub would keep a file of the wrong size
            (snapshot / path).resolve().unlink(missing_ok=True)
            (snapshot / path).unlink(missing_ok=True)
        _snapshot_download(request, commit, files, cache)
        if missing():
            raise RuntimeError(f"{missing()[0]} is missing")

    def received() -> int:
        with suppress(OSError):
            return sum(blob.stat().st_size for blob in set(blobs.iterdir()) - before)
        return 0

    def report() -> None:
        while not done.wait(LOG_S):
            log.info("downloaded %s of %s", _mb(received()), _mb(need))

    for partial in blobs.glob("*.incomplete"):
        with suppress(OSError):
            if partial.stat().st_mtime < time.time() - _ABANDONED_S:
                partial.unlink()
    need, free = sum(sizes[path] or 0 for path in missing()), shutil.disk_usage(cache).free
    if need > free:
        raise OSError(errno.ENOSPC, f"{_mb(need)} needed, {_mb(free)} free")
    log.info("download model=%s revision=%s bytes=%d to=%s", request.name, commit, need, cache)
    before, begin, done = set(blobs.glob("*")), time.monotonic(), threading.Event()
    threading.Thread(target=report, daemon=True).start()
    try:
        with_retries(attempt, request, progress=received)
    except OSError:
        for blob in set(blobs.glob("*")) - before:
            blob.unlink(missing_ok=True)
        raise
    finally:
        done.set()
    log.info("downloaded model=%s bytes=%d seconds=%.1f", request.name, need, time.monotonic() - begin)
    if request.revision != commit:
        ref = repo / "refs" / (request.revision or "main")
        with suppress(OSError):  # without a ref the next start asks the hub
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit)
    return snapshot


def fetch_tree(request: ModelRequest, snapshot: Path) -> None:
    """Add the hub's tree to a copy in a hub cache that lacks it. One attempt; raises as `with_retries`."""
    repo_files(request, snapshot.name, waits=())  # has a time limit, which snapshot_download has not
    files, cache = choose_files(files_below(snapshot), request.extra), snapshot.parents[2]
    with_retries(lambda: _snapshot_download(request, snapshot.name, files, cache), request, waits=())


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


# ---- retries and refusals ------------------------------------------------------------------------------


def with_retries(
    call: Callable[[], T],
    request: ModelRequest,
    *,
    waits: Sequence[float] | None = None,
    progress: Callable[[], int] = lambda: 0,
) -> T:
    """`call()`, repeated after each wait (RETRY_S by default) while it fails.

    The waits start over when `progress()` has grown. A longer wait that the hub asks for is kept to.

    Raises StartError where another attempt is useless, OSError where the disk is full or read-only, and
    HubUnreachable after the last attempt.
    """
    # The store of blobs that repositories share is guarded by flock alone, which a network file system may
    # not keep between hosts. Telemetry costs a request.
    for feature in ("PROGRESS_BARS", "SHARED_BLOBS", "TELEMETRY"):
        set_flags(**{f"HF_HUB_DISABLE_{feature}": True})
    waits = RETRY_S if waits is None else waits
    left, best = list(waits), progress()
    while True:
        try:
            return call()
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (*DISK_FULL, *READ_ONLY):
                raise
            # Xet, huggingface_hub's other transport, reports a full disk as text.
            if re.search("No space left|quota exceeded", str(error), re.IGNORECASE):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            if refusal := _refusal(error, request):
                raise refusal from None
            if (now := progress()) > best:
                left, best = list(waits), now
            if not left:
                raise HubUnreachable(_why_unreachable(error, request)) from error
            delay = max(left.pop(0), min(_retry_after(error), RATE_LIMIT_S))
            log.warning("%s: %s, next attempt in %g s", request.name, _root(error), delay)
            time.sleep(delay)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _root(error: BaseException) -> str:
    """The type and status of the first cause. Its text may hold a signed address."""
    *_, root = _causes(error)
    return f"{type(root).__name__} {_status(root) or ''}".strip()


def _retry_after(error: BaseException) -> float:
    """Seconds that the hub asks to wait for; 0 where it does not."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    for cause in _causes(error):
        headers: Mapping[str, Any] = getattr(getattr(cause, "response", None), "headers", {})
        if (limit := parse_ratelimit_headers(headers)) and limit.remaining == 0:
            return limit.reset_in_seconds
        if (seconds := headers.get("Retry-After", "")).isdigit():
            return float(seconds)
    return 0.0


def _has_token(request: ModelRequest) -> bool:
    from huggingface_hub import get_token

    return bool(request.token or get_token())


def _why_unreachable(error: BaseException, request: ModelRequest) -> str:
    if any(_status(cause) == 429 for cause in _causes(error)):
        advice = "Start fewer workers at once" if _has_token(request) else "Set HF_TOKEN to raise the limit"
        return f"{request.name}: the hub refuses for too many requests (HTTP 429). {advice}."
    return f"{request.name}: no answer from the hub ({_root(error)})."


def _refusal(error: BaseException, request: ModelRequest) -> StartError | None:
    """The permanent cause of an exception of huggingface_hub."""
    from huggingface_hub import errors

    name, page = request.name, f"https://huggingface.co/{request.name}"
    no_access = "HF_TOKEN has no access to it" if _has_token(request) else "HF_TOKEN is not set"
    for cause in _causes(error):
        if isinstance(cause, errors.GatedRepoError) or _status(cause) == 403:
            message = f"{name} is gated and {no_access}. Ask for access at {page}, then set HF_TOKEN."
            return StartError(message, code="gated")
        if isinstance(cause, errors.RevisionNotFoundError):
            message = f"{name} has no revision {request.revision or 'main'}. Correct MODEL_REVISION."
            return StartError(message, code="revision_not_found")
        if isinstance(cause, errors.RepositoryNotFoundError | errors.HFValidationError):
            message = f"The hub has no model {name}, or it is private and {no_access}. Check MODEL_NAME."
            return StartError(message, code="model_not_found")
        if _status(cause) == 401:
            message = "The hub refuses HF_TOKEN as invalid. Set a valid one, or none for a public model."
            return StartError(message, code="bad_token")
    return None


def set_flags(**flags: bool) -> None:
    """Set flags of huggingface_hub, which reads them from the environment when it is imported."""
    constants = sys.modules.get("huggingface_hub.constants")
    for name, on in flags.items():
        os.environ[name] = "1" if on else "0"
        if hasattr(constants, name):
            setattr(constants, name, on)
