"""docker-bake.hcl, read: the table of workers, and the resolved targets beside the kept copy.

`python -m tools.bake` writes the kept copy, tests/images/bake.json, anew.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

from tools.workers import ROOT

KEPT = Path("tests/images/bake.json")
LINE = re.compile(
    r'^  (?P<name>[a-z0-9-]+) += \{ base = "(?P<base>[a-z0-9-]+)", +about = "(?P<about>[^"]+)" \}$'
)
# Every variable of the file. Set in somebody's environment, they would change what is compared.
VARIABLE = re.compile(r'^variable "([A-Z_]+)"', re.MULTILINE)

Targets = dict[str, dict[str, Any]]


def table(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """The lines of the WORKERS table: name -> {"base": ..., "about": ...}."""
    text = (root / "docker-bake.hcl").read_text()
    lines = text.split("WORKERS = {\n", 1)[1].split("\n}", 1)[0].splitlines()
    workers = {}
    for line in lines:
        match = LINE.match(line)
        if not match:
            raise ValueError(f"docker-bake.hcl: not a line of the WORKERS table: {line}")
        workers[match["name"]] = {"base": match["base"], "about": match["about"]}
    return workers


def plain(targets: Targets) -> Targets:
    """Targets with options as mappings: buildx prints them as strings before 0.20 and as objects since."""
    options = ("attest", "output", "secret", "cache-from", "cache-to")

    def split(option: str | dict[str, str]) -> dict[str, str]:
        return dict(part.split("=", 1) for part in option.split(",")) if isinstance(option, str) else option

    return {
        name: {key: [split(o) for o in value] if key in options else value for key, value in target.items()}
        for name, target in sorted(targets.items())
    }


def resolve(root: Path = ROOT, **variables: str) -> Targets:
    """Every target as `docker buildx bake --print` resolves it.

    Raises FileNotFoundError without docker, subprocess.CalledProcessError for a file that does not parse.
    """
    known = VARIABLE.findall((root / "docker-bake.hcl").read_text())
    environment = {name: value for name, value in os.environ.items() if name not in known} | variables
    command = ["docker", "buildx", "bake", "--file", "docker-bake.hcl", "--print", "default", "release"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    targets: Targets = json.loads(done.stdout)["target"]
    return plain(targets)


def kept(root: Path = ROOT) -> Targets:
    targets: Targets = json.loads((root / KEPT).read_text())
    return targets


def keep(targets: Targets, root: Path = ROOT) -> None:
    (root / KEPT).write_text(json.dumps(targets, indent=2, sort_keys=True) + "\n")


def add(name: str, *, like: str, about: str, root: Path = ROOT) -> None:
    """Add a worker to the table, and to the kept copy, as the twin of the worker `like`. Needs no docker."""
    workers = table(root)
    twin = workers[like]
    text = (root / "docker-bake.hcl").read_text()
    workers[name] = {"base": twin["base"], "about": about}
    head, rest = text.split("WORKERS = {\n", 1)
    tail = rest.split("\n}", 1)[1]
    width = max(map(len, workers))
    lines = [
        f'  {worker:<{width}} = {{ base = "{entry["base"]}", about = "{entry["about"]}" }}'
        for worker, entry in sorted(workers.items())
    ]
    (root / "docker-bake.hcl").write_text(head + "WORKERS = {\n" + "\n".join(lines) + "\n}" + tail)
    targets = kept(root)
    for suffix in ("", "-release"):
        copy = json.dumps(targets[like + suffix]).replace(twin["about"], about).replace(like, name)
        targets[name + suffix] = json.loads(copy)
    keep(targets, root)


if __name__ == "__main__":
    keep(resolve())
