"""text-generation-launcher as a child process: its command line, its environment, its model."""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path

from serving.engine_server.process import EngineServer
from shared import startup
from shared.errors import JobError, StartError
from shared.logs import log
from shared.volume import use_volume

from .schemas import Settings

GRACE_S = 10  # from SIGTERM to SIGKILL; by then the jobs are done
IMAGE_HF_HOME = "/data"  # HF_HOME of TGI's image, on the container's disk
# What the worker passes on the command line, or TGI must not have: with a key it would refuse the worker.
_OWN_VARIABLES = ("API_KEY", "DTYPE", "REVISION", "TRUST_REMOTE_CODE")
_OWN_FLAGS = {
    "--api-key", "--graceful-termination-timeout", "--hostname", "--model-id", "--port", "-p",
    "--usage-stats",
}  # fmt: skip


def start(settings: Settings, on_death: Callable[[JobError], None]) -> tuple[EngineServer, str | None]:
    """Start TGI and wait until it is ready; returns it and the model's commit, if known.

    Raises StartError, EngineFailed.
    """
    name, revision, commit = settings.model_name, settings.model_revision, None
    model, template = name, None
    downloads = settings.downloads_adapters
    try:
        resolved = startup.resolve(settings, name)
        model, revision, commit = str(resolved.path), None, resolved.revision
        template = tokenizer_config(resolved.path)
    except StartError as error:
        if error.code not in ("no_weights", "incomplete") or Path(name).is_dir():
            raise
        log.warning("%s Left to TGI: it knows other formats.", error.message)
        downloads = True
    env = environment(settings, offline=not downloads)
    if template and not os.environ.get("TOKENIZER_CONFIG_PATH"):
        env["TOKENIZER_CONFIG_PATH"] = template
    server = EngineServer(
        "tgi",
        lambda port: command(settings, model, revision, port),
        env=env,
        start_timeout=settings.tgi_startup_timeout,
        hang_timeout=settings.health_timeout,
        grace=GRACE_S,
        on_death=on_death,
    )
    with startup.phase("load"):
        server.start()
    return server, commit


def command(settings: Settings, model: str, revision: str | None, port: int) -> list[str]:
    """The launcher's command line. Raises StartError for an invalid TGI_EXTRA_ARGS."""
    flags = {
        "--model-id": model,
        "--max-concurrent-requests": settings.max_concurrent_requests
        or max(128, 2 * settings.max_concurrency),
        "--payload-limit": settings.payload_limit,
        "--hostname": "127.0.0.1",
        "--port": port,
        "--usage-stats": "off",
        "--graceful-termination-timeout": GRACE_S,
    }
    if revision:
        flags["--revision"] = revision
    if settings.dtype != "auto":
        flags["--dtype"] = settings.dtype
    argv = ["text-generation-launcher", *(str(word) for flag in flags.items() for word in flag)]
    if settings.trust_remote_code:
        argv.append("--trust-remote-code")
    return argv + _extra_arguments(settings)


def _extra_arguments(settings: Settings) -> list[str]:
    try:
        extra = shlex.split(settings.tgi_extra_args)
    except ValueError as error:
        raise StartError(f"TGI_EXTRA_ARGS: {error}.", code="bad_setting") from None
    # -p5 is -p 5
    flags = {word.partition("=")[0] if word.startswith("--") else word[:2] for word in extra}
    if own := _OWN_FLAGS & flags:
        raise StartError(
            f"TGI_EXTRA_ARGS: {min(own)} is set by the worker. Leave it out.", code="bad_setting"
        )
    return extra


def environment(settings: Settings, *, offline: bool) -> dict[str, str | None]:
    """What differs from this process's environment; None removes a variable.

    TGI refuses empty variables. CUDA's hides all GPUs while it is empty.
    """
    empty = [name for name, value in os.environ.items() if not value.strip() and not name.startswith("CUDA")]
    env: dict[str, str | None] = dict.fromkeys([*_OWN_VARIABLES, *empty])
    if settings.hf_token:
        env["HF_TOKEN"] = settings.hf_token.get_secret_value()
    if not offline:
        env |= {"HF_HUB_OFFLINE": None, "TRANSFORMERS_OFFLINE": None}
    return env


def tokenizer_config(model: Path) -> str | None:
    """The path of a new tokenizer_config.json with the template of chat_template.jinja, which TGI does not
    read; None where it is not needed.
    """
    template, config = model / "chat_template.jinja", model / "tokenizer_config.json"
    if not template.is_file() or not config.is_file():
        return None
    content = json.loads(config.read_text())
    if content.get("chat_template"):
        return None
    path = Path(tempfile.mkdtemp(prefix="tgi-")) / config.name
    path.write_text(json.dumps({**content, "chat_template": template.read_text()}))
    return str(path)


def use_volume_for_tgi() -> None:
    """Let TGI's own downloads go to the network volume, if there is one, in spite of the image's HF_HOME."""
    if os.environ.get("HF_HOME") == IMAGE_HF_HOME:
        del os.environ["HF_HOME"]
        use_volume()
        os.environ.setdefault("HF_HOME", IMAGE_HF_HOME)
