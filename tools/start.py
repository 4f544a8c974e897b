"""`make run-<worker>` and `make serve-<worker>`: `python -m local`, with a model that is at hand.

That model is the one of tools/models, which needs no hub, account or GPU; MODEL_NAME in the environment
takes another. With IMAGE set, the worker's image runs in the place of its handler's file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from local.__main__ import main
from tools.images import image
from tools.models import NOTES, engine_env, local_env, vllm_cpu
from tools.workers import load_module


def image_env(worker: str) -> dict[str, str]:
    """Environment variables with which the image of `worker` runs on this machine, engine and all its own."""
    not_there = ("ENGINE_COMMAND", "PATH")
    return {name: value for name, value in local_env(worker).items() if name not in not_there}


def mounts(env: Mapping[str, str]) -> list[str]:
    """Options of `docker run` that put the files which `env` names where they are here, read-only."""
    paths = sorted({value for value in env.values() if value.startswith("/") and Path(value).exists()})
    return [f"--volume={path}:{path}:ro" for path in paths]


def in_image(worker: str, env: Mapping[str, str]) -> list[str]:
    """Arguments of `python -m local` that run the image of `worker` with `env`, and with the settings of
    the worker that this process's environment has. Raises SystemExit when the image is not built.
    """
    name = image(worker)
    if subprocess.run(["docker", "image", "inspect", name], capture_output=True, check=False).returncode:
        raise SystemExit(f"No image {name}: make build-{worker}")
    settings = [field.upper() for field in load_module(worker, "schemas").Settings.model_fields]
    names = {*env, *(setting for setting in settings if os.environ.get(setting))}
    given = {variable: os.environ[variable] for variable in names if variable in os.environ} | dict(env)
    options = [f"--docker={option}" for option in mounts(given)]
    return [f"--image={name}", *(f"--env={variable}" for variable in sorted(names)), *options]


if __name__ == "__main__":
    command, worker, *rest = sys.argv[1:]
    in_container = bool(os.environ.get("IMAGE"))
    if in_container:
        env = {} if os.environ.get("MODEL_NAME") else image_env(worker)
    else:
        env = engine_env(worker) if os.environ.get("MODEL_NAME") else local_env(worker)
        if worker == "vllm" and (reason := vllm_cpu.missing()):
            sys.exit(f"No vLLM on this machine: {reason}.")
    os.environ.update(env)
    if in_container:
        rest = [*in_image(worker, env), *rest]
    elif "PATH" in env:  # where a stand-in for its engine is
        print(NOTES[worker], file=sys.stderr, flush=True)
    sys.exit(main([command, worker, *rest]))
