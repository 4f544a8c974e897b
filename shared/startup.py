"""The start of a worker: its phases in the log, and what follows when it fails.

A permanent cause, which a new attempt cannot remove, is answered to every job. Any other failure exits, and
RunPod replaces the worker. A crash loop is billed by the second, an answer once.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared import telemetry
from shared.device import is_out_of_memory
from shared.errors import JobError, StartError
from shared.jobs import JobHandler, start_config
from shared.logs import log, redact
from shared.settings import HttpSettings, WorkerSettings, read_settings
from shared.volume import ModelPath, resolve_model, use_volume

Config = dict[str, Any]
POST_S = 15.0  # what the SDK may take to post the errors of the jobs in flight


def _process_start() -> float:
    """The start of this process on the clock of time.monotonic(): Linux counts both from boot."""
    try:
        with open("/proc/self/stat") as stat:
            ticks = int(stat.read().rpartition(")")[2].split()[19])
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return time.monotonic()


@dataclass
class Phase:
    """A running phase. bytes: what it read or allocated; logged when set."""

    bytes: int | None = None


def log_phase(name: str, seconds: float, size: int | None = None) -> None:
    """Log `phase=<name> seconds=<s> [bytes=<n>]`."""
    telemetry.phases[name] = seconds
    log.info("phase=%s seconds=%.3f%s", name, seconds, "" if size is None else f" bytes={size}")


@contextmanager
def phase(name: str) -> Iterator[Phase]:
    """Time a phase of the start, and log it unless it raises."""
    begin = time.monotonic()
    current = Phase()
    yield current
    log_phase(name, time.monotonic() - begin, current.bytes)


def resolve(settings: WorkerSettings, name: str, *, extra: Sequence[str] = ()) -> ModelPath:
    """The folder of the model `name`, as the phase `resolve`; see `shared.volume.resolve_model`."""
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    with phase("resolve") as current:
        model = resolve_model(name, settings.model_revision, token=token, extra=extra)
        current.bytes = model.bytes
    return model


def log_ready() -> None:
    """Log the phase `ready`: seconds since the process began."""
    log_phase("ready", time.monotonic() - _process_start())


# Messages of transformers 5.x and sentence-transformers 6.x for failures that the same image would repeat.
_PERMANENT = (
    ("does not recognize this architecture", "unsupported_architecture"),
    ("Unrecognized model in", "unsupported_architecture"),
    ("Unrecognized configuration class", "unsupported_architecture"),
    ("trust_remote_code", "needs_remote_code"),
    ("packages that were not found in your environment", "missing_package"),
)
_ADVICE = {
    "unsupported_architecture": "Use a model that this image's libraries know, or a newer image.",
    "needs_remote_code": "Set TRUST_REMOTE_CODE=true if you trust the code in the model's repository.",
    "missing_package": "Use another model, or add the package to the worker's requirements.in.",
}


def classify(error: BaseException) -> StartError | None:
    """The permanent cause of `error`, or None when a new attempt may succeed."""
    if isinstance(error, StartError):
        return error
    if is_out_of_memory(error):
        return StartError(
            "The model does not fit into memory. Use a larger GPU, a smaller model or DTYPE=float16.",
            code="out_of_memory",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StartError("The disk is full. Give the endpoint a larger container disk.", code="no_space")
    text = str(error)
    for message, code in _PERMANENT:
        if message in text:
            return StartError(f"{redact(text.strip().splitlines()[0])[:300]} {_ADVICE[code]}", code=code)
    return None


def refuse(cause: StartError) -> Config:
    """A configuration for `runpod.serverless.start` whose handler answers every job with `cause`."""
    answer = JobError(cause.message, code=cause.code, type="server_error").json()

    async def handler(job: dict[str, Any]) -> dict[str, Any]:
        return {"error": answer}

    return {"handler": handler, "concurrency_modifier": lambda _: 16}


def log_versions(worker: str) -> None:
    """Log one line with the worker, its model, and the versions of Python, CUDA, the SDK and libraries."""
    parts = [f"worker={worker}", f"python={platform.python_version()}"]
    for package in ("runpod", "torch", "transformers"):
        try:
            parts.append(f"{package}={importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    parts.append(f"cuda={cuda_version() or 'none'}")
    log.info("versions %s model=%s", " ".join(parts), redact(os.environ.get("MODEL_NAME", "default")))


def cuda_version() -> str | None:
    """The CUDA version that torch was built for, None for a build without CUDA.

    Read from torch's files, because its import takes seconds; without torch, from the base image's
    CUDA_VERSION.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return os.environ.get("CUDA_VERSION")
    text = Path(spec.origin).with_name("version.py").read_text()
    match = re.search(r"^cuda\b.*= *['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


Prepare = Callable[[], WorkerSettings]
"""Reads the settings, loads and prewarms the model, and returns the settings."""


def load(prepare: Prepare, *, worker: str) -> WorkerSettings | StartError:
    """The settings of a worker whose model is ready, or the permanent cause why it cannot be.

    Any other failure exits with status 1, so that RunPod replaces the worker.
    """
    use_volume()
    log_versions(worker)
    try:
        settings = prepare()
    except Exception as error:
        cause = classify(error)
        if cause is None:
            log.exception("The worker could not start, and RunPod will replace it.")
            raise SystemExit(1) from None
        log.error("start failed code=%s: %s", cause.code, cause.message)
        return cause
    # What is loaded stays. The garbage collector would walk through it, for 0.7 s, in the middle of jobs.
    gc.freeze()
    return settings


def run(handler: JobHandler, prepare: Prepare, *, worker: str) -> Config:
    """`load` the model, import the SDK at the same time, and return the SDK's configuration.

    After a permanent failure its handler answers every job with the cause.
    """
    # The SDK's default, DEBUG, writes every input and output into the log.
    if "RUNPOD_DEBUG_LEVEL" not in os.environ:
        os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")
    _end_at_sigterm()
    # Most of the SDK's import is a wait for another process, which a thread overlaps with the load. An import
    # that fails here fails again in `serve`, with its traceback.
    sdk = threading.Thread(target=_import_quietly, args=("runpod",), daemon=True)
    sdk.start()
    loaded = load(prepare, worker=worker)
    if isinstance(loaded, StartError):
        return refuse(loaded)
    sdk.join()
    log_ready()
    return start_config(handler, loaded)


def serve(handler: JobHandler, prepare: Prepare, *, worker: str) -> None:
    """Start the worker in its SERVE_MODE: HTTP, or the SDK's loop, until the worker is stopped.

    A worker whose engine process has died exits with status 1, after what was in flight is answered.
    """
    _bound_arenas()
    mode: telemetry.Mode = "http" if os.environ.get("SERVE_MODE", "").strip() == "http" else "queue"
    flush = telemetry.start_otlp(worker, mode)

    def end_worker(_: JobError) -> None:
        """From another thread: the SDK's loop may wait 90 s for a job before it ends."""
        deadline = time.monotonic() + POST_S
        while handler.in_flight and time.monotonic() < deadline:
            time.sleep(0.05)
        flush()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(1)

    handler.on_engine_death = end_worker
    try:
        if mode == "http":
            _serve_http(handler, prepare, worker)
        else:
            config = run(handler, prepare, worker=worker)
            telemetry.add_sink("queue", telemetry.log_line)
            import runpod

            runpod.serverless.start(config)
    finally:
        flush()


def _serve_http(handler: JobHandler, prepare: Prepare, worker: str) -> None:
    _end_at_sigterm(os._exit)  # a thread that loads a model cannot be unwound
    loading: Future[WorkerSettings | StartError | None] = Future()

    def load_model() -> None:
        loaded = None  # a failure that exits: see `load`
        try:
            loaded = load(prepare, worker=worker)
        finally:
            loading.set_result(loaded)

    try:
        settings = read_settings(HttpSettings)
    except StartError as cause:  # answered on the port that is known, or on the default
        log.error("start failed code=%s: %s", cause.code, cause.message)
        port = os.environ.get("PORT", "").strip()
        settings = HttpSettings.model_construct(port=int(port) if port.isdecimal() else 8000)
        loading.set_result(cause)
    else:
        # The server's import and the model's load overlap.
        threading.Thread(target=load_model, name="load", daemon=True).start()
    from shared import http_server

    http_server.serve(handler, loading, settings, worker=worker)


def _end_at_sigterm(leave: Callable[[int], object] = sys.exit) -> None:
    """Exit at SIGTERM until a server handles it: a container's first process ignores an unhandled signal."""
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda *_: leave(128 + signal.SIGTERM))


def _bound_arenas() -> None:
    """Give malloc two arenas, unless MALLOC_ARENA_MAX says how many.

    glibc makes up to eight a core, and each keeps freed memory. From the first to the last fifth of 2,000
    mixed jobs the sentence-transformers worker grew from 676 to 732 MiB, with two arenas from 700 to 716, in
    the same time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(-8, 2)  # M_ARENA_MAX of malloc.h; it has no effect once threads have made more


def _import_quietly(module: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:
        log.warning("import of %s during the load failed: %s", module, error)
