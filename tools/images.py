"""The images in the local engine: what they are called, and which layers they have.

    python -m tools.images WORKER        the name of an image: REGISTRY/worker-<name>:TAG

Standard library only: it runs before there is an environment.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass

from tools.workers import ROOT

# A history's entries with a layer behind them; the others change the configuration only.
_MAKES_A_LAYER = re.compile(
    r"(RUN|COPY|ADD|WORKDIR) |/bin/sh -c (?!#\(nop\))|/bin/sh -c #\(nop\) +(COPY|ADD|WORKDIR) "
)


@dataclass(frozen=True)
class Layer:
    """digest: of its uncompressed contents. bytes: on disk. made_by: the instruction."""

    digest: str
    bytes: int
    made_by: str


Layers = list[Layer]


def variable(name: str) -> str:
    """A variable of docker-bake.hcl: from the environment, else its default there."""
    text = (ROOT / "docker-bake.hcl").read_text()
    default = re.search(rf'^variable "{name}" {{\n  default = "(.*)"', text, re.MULTILINE)
    assert default is not None, name
    return os.environ.get(name) or default[1]


def image(worker: str) -> str:
    """What the image of a worker is called, as `make build-<worker>` tags it."""
    return f"{variable('REGISTRY')}/worker-{worker}:{variable('TAG')}"


def layers(name: str) -> Layers | None:
    """An image's layers, lowest first; None when the engine has no such image.

    Raises FileNotFoundError without docker, ValueError when history and layers do not fit together.
    """
    command = ["docker", "image", "inspect", "--format={{json .RootFS.Layers}}", name]
    inspected = subprocess.run(command, capture_output=True, text=True, check=False)
    if inspected.returncode:
        if "No such image" in inspected.stderr:
            return None
        raise SystemExit(inspected.stderr.strip())
    command = ["docker", "history", "--no-trunc", "--human=false", "--format={{json .}}", name]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    entries = [json.loads(line) for line in reversed(lines)]
    return assign(
        json.loads(inspected.stdout), [(entry["CreatedBy"], int(entry["Size"])) for entry in entries]
    )


def assign(digests: list[str], history: list[tuple[str, int]]) -> Layers:
    """Each layer with its size. Docker's history names no digests, but it is in the same order.

    history: (instruction, bytes), oldest first, with entries that made no layer among them.
    """
    made = [(by, size) for by, size in history if size > 0 or _MAKES_A_LAYER.match(by)]
    if len(made) != len(digests):
        raise ValueError(f"{len(digests)} layers, but {len(made)} entries of the history that made one")
    return [Layer(digest, size, by) for digest, (by, size) in zip(digests, made, strict=True)]


if __name__ == "__main__":
    print(image(sys.argv[1]))
