"""The images in the local engine: `make size` prints how large each is, and how much of it no other one has.

    python -m tools.images [size] [WORKER ...]
    python -m tools.images name WORKER          what an image is called: REGISTRY/worker-<name>:TAG

Standard library only: it runs before there is an environment.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from tools.workers import ROOT, worker_names

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
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        if "No such image" in found.stderr:
            return None
        raise SystemExit(found.stderr.strip())
    command = ["docker", "history", "--no-trunc", "--human=false", "--format={{json .}}", name]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    entries = [json.loads(line) for line in reversed(lines)]
    return assign(json.loads(found.stdout), [(entry["CreatedBy"], int(entry["Size"])) for entry in entries])


def assign(digests: list[str], history: list[tuple[str, int]]) -> Layers:
    """Each layer with its size. Docker's history names no digests, but it is in the same order.

    history: (instruction, bytes), oldest first, with entries that made no layer among them.
    """
    made = [(by, size) for by, size in history if size > 0 or _MAKES_A_LAYER.match(by)]
    if len(made) != len(digests):
        raise ValueError(f"{len(digests)} layers, but {len(made)} entries of the history that made one")
    return [Layer(digest, size, by) for digest, (by, size) in zip(digests, made, strict=True)]


def unique(images: Mapping[str, Layers]) -> dict[str, Layers]:
    """For each image the layers that a host with all the others lacks.

    An engine keeps a layer together with those below it, so what two images share is their common beginning.
    """
    chains = {
        name: [tuple(layer.digest for layer in found[: end + 1]) for end in range(len(found))]
        for name, found in images.items()
    }
    result = {}
    for name, found in images.items():
        others = {chain for other, its in chains.items() if other != name for chain in its}
        result[name] = [
            layer for layer, chain in zip(found, chains[name], strict=True) if chain not in others
        ]
    return result


def table(images: Mapping[str, Layers]) -> str:
    """A line for each image, and one for all together."""
    total = dict[tuple[str, ...], int]()
    for found in images.values():
        for end, layer in enumerate(found):
            total[tuple(each.digest for each in found[: end + 1])] = layer.bytes
    own = unique(images)
    rows = [("image", "size", "unique", "")]
    for name, found in images.items():
        whole, alone = (sum(layer.bytes for layer in part) for part in (found, own[name]))
        rows.append((name, megabytes(whole), megabytes(alone), f"{alone / whole:.1%}" if whole else ""))
    rows.append(("all together", megabytes(sum(total.values())), "", ""))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{row[0]:<{width}} {row[1]:>12} {row[2]:>12} {row[3]:>7}".rstrip() for row in rows)


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def size(workers: list[str]) -> None:
    """Print the table of the images that are built, and name those that are not."""
    found = {worker: layers(image(worker)) for worker in workers}
    built = {worker: its for worker, its in found.items() if its is not None}
    if not built:
        raise SystemExit(f"None of the images is built. make build-{workers[0]} builds one.")
    print(table(built))
    print("\nunique: what a machine pulls and keeps besides, if it has all the other images of this table")
    if missing := [worker for worker in workers if worker not in built]:
        print(f"not built: {', '.join(missing)}")


def main() -> None:
    command, *workers = sys.argv[1:] or ["size"]
    if command == "name":
        print(image(workers[0]))
    elif command == "size":
        try:
            size(workers or worker_names())
        except FileNotFoundError:
            raise SystemExit("Missing: docker") from None
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
