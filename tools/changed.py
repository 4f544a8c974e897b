"""Prints the workers whose images a change touches, as JSON: `python -m tools.changed BASE [HEAD]`.
With `--tag whisper-v1.4.2`, those of a release: that one; of `v1.4.2`, every worker.

BASE and HEAD are commits; without BASE, or with one that this clone does not have, every worker is printed.
What touches an image is read from its Dockerfile: whatever it copies or mounts from the repository.
Standard library only, so that CI can run it before it installs anything.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tools.workers import ROOT, worker_names

# What decides how every image is built.
FOR_ALL = {"docker-bake.hcl", ".dockerignore", ".github/workflows/images.yml"}
# Kept out of the build by .dockerignore.
NEVER = (".md", ".in", "/deploy.toml")


def sources(dockerfile: str) -> set[str]:
    """The paths of the build context that a Dockerfile's text reads."""
    text = re.sub(r"\\\n", " ", dockerfile)
    paths = set(re.findall(r"--mount=type=bind,source=([^,\s]+)", text))
    for arguments in re.findall(r"^(?:COPY|ADD)\s+(.+)$", text, re.MULTILINE):
        if "--from=" not in arguments:
            paths.update(path for path in arguments.split()[:-1] if not path.startswith("--"))
    return {path.rstrip("/") for path in paths}


def affected(paths: Iterable[str], root: Path = ROOT) -> list[str]:
    """The workers whose images read one of the changed `paths`."""
    changed = [path for path in paths if not path.endswith(NEVER)]
    names = worker_names(root)
    if FOR_ALL & set(changed):
        return names
    workers = []
    for name in names:
        dockerfile = f"workers/{name}/Dockerfile"
        reads = sources((root / dockerfile).read_text()) | {dockerfile}
        if any(path == source or path.startswith(source + "/") for path in changed for source in reads):
            workers.append(name)
    return workers


def changed_paths(base: str, head: str, root: Path = ROOT) -> list[str] | None:
    """Paths that differ between where `head` left `base` and `head`; None when git lacks one of them."""
    command = ["git", "diff", "--name-only", "--no-renames", f"{base}...{head}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else None


def released(tag: str, root: Path = ROOT) -> list[str]:
    """The workers of a release's tag. Raises SystemExit for a worker that there is not."""
    match = re.fullmatch(r"(?:(?P<worker>.+)-)?v\d+\.\d+\.\d+(?:-[0-9A-Za-z.]+)?", tag)
    names = worker_names(root)
    if match is None or match["worker"] not in (None, *names):
        raise SystemExit(f"{tag} names no release: v1.4.2, or <worker>-v1.4.2 of one of {', '.join(names)}.")
    return [match["worker"]] if match["worker"] else names


def main() -> None:
    base, head = [*sys.argv[1:], "", ""][:2]
    if base == "--tag":
        print(json.dumps(released(head)))
        return
    paths = changed_paths(base, head or "HEAD") if base else None
    print(json.dumps(worker_names() if paths is None else affected(paths)))


if __name__ == "__main__":
    main()
