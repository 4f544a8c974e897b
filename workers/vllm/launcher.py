"""vllm serve as a child process: the model's folder, the command line, and a second try with less memory."""

from __future__ import annotations

import os
from collections.abc import Callable

from serving.engine_server.process import EngineServer
from shared import startup
from shared.errors import JobError, StartError
from shared.logs import log

from .command_line import Command, build_command, engine_env
from .schemas import Settings
from .variables import advice

# What a start that ran out of memory is tried again with, except for flags that the user has set.
SMALLER = {
    "max-model-len": ["auto"],
    "max-num-seqs": ["64"],
    "max-num-batched-tokens": ["2048"],
    "enforce-eager": [],
}


def start(settings: Settings, on_death: Callable[[JobError], None]) -> tuple[EngineServer, Command]:
    """Start the engine and wait until it is ready. Raises StartError, EngineFailed."""
    for line in advice(os.environ):
        log.warning(line)
    offline = os.environ.get("HF_HUB_OFFLINE")  # as the user has it: `resolve` sets it
    model = startup.resolve(settings, settings.model_name)
    command = build_command(settings, model, os.environ)
    server = EngineServer(
        "vllm",
        command,
        port=settings.vllm_port,
        env=engine_env(command, online=not offline),
        start_timeout=settings.vllm_startup_timeout,
        hang_timeout=settings.health_timeout,
        on_death=on_death,
    )
    with startup.phase("load"):
        try:
            server.start()
        except StartError as error:
            if error.code != "out_of_memory":
                raise
            lowered = [flag for flag, arguments in SMALLER.items() if command.default(flag, *arguments)]
            if "less than desired" in error.message and command.default("gpu-memory-utilization", "0.8"):
                lowered.append("gpu-memory-utilization")
            if not lowered:
                raise
            log.warning("%s Trying once more with smaller settings: %s", error.message, ", ".join(lowered))
            server.start()
    return server, command
