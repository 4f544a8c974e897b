"""`make run-<worker>` and `make serve-<worker>`: `python -m local`, with a model that is at hand.

That model is real where tools/models/real.py has one for the worker, else a tiny one; neither needs a hub, an
account or a GPU. MODEL_NAME in the environment takes another. With IMAGE set, the worker's image runs in the
place of its handler's file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from local.__main__ import main
from tools import demos
from tools.images import image
from tools.models import NOTES, REAL, engine_env, local_env, real, real_env, vllm_cpu
from tools.workers import load_module


def model_env(worker: str) -> tuple[dict[str, str], bool]:
    """Environment variables with which `worker` runs on this machine, and whether its model is real."""
    if worker in REAL:
        try:
            return real_env(worker), True
        except real.Unavailable as problem:
            note(str(problem))
            note("A tiny model takes the real one's place. What it answers means nothing.")
    elif worker in NOTES:
        note(NOTES[worker])
    return local_env(worker), False


def in_any_place(env: Mapping[str, str]) -> dict[str, str]:
    """Of `env`, what an image takes too: it has an engine of its own."""
    return {name: value for name, value in env.items() if name not in ("ENGINE_COMMAND", "PATH")}


def image_env(worker: str) -> dict[str, str]:
    """Environment variables with which the image of `worker` runs on this machine, with a tiny model."""
    return in_any_place(local_env(worker))


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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


def start(command: str, worker: str, *rest: str) -> int:
    """The exit status of `python -m local`."""
    in_container, own_model = bool(os.environ.get("IMAGE")), bool(os.environ.get("MODEL_NAME"))
    if worker == "vllm" and not in_container and (reason := vllm_cpu.missing()):
        raise SystemExit(f"No vLLM on this machine: {reason}.")
    is_real = False
    env = {} if in_container else engine_env(worker)
    if not own_model:
        env, is_real = model_env(worker)
    if in_container:
        env = in_any_place(env)
    os.environ.update(env)
    arguments = in_image(worker, env) if in_container else []
    if is_real and "--input" not in rest and (job := demos.job_file(worker)):
        arguments.append(f"--input={job}")
    demo = demos.DEMOS.get(worker) if is_real and "--input" not in rest else None
    return main([command, worker, *arguments, *rest], show=demo.show if demo else None)


if __name__ == "__main__":
    sys.exit(start(*sys.argv[1:]))
