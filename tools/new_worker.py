"""Scaffolds a worker: `make new-worker NAME=my-model`.

Copies tools/template/ to workers/<name>/ and its test to tests/workers/<name>/, adds the line of
docker-bake.hcl, and fills the tables. What comes out is a small worker whose tests pass, to be replaced from
top to bottom.
Needs no network and no docker.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tools import bake, docs
from tools.workers import ROOT, worker_names

PLACEHOLDER = "template-worker"
ABOUT = "Counts words: a scaffold"


def make(name: str, root: Path = ROOT) -> list[Path]:
    """Write the files of the worker `name` and return the new ones, relative to `root`.

    Raises SystemExit when the name cannot be a folder, an image and a make target, or is taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise SystemExit(
            "NAME is missing or wrong: lower-case letters, digits and hyphens, as in NAME=my-model"
        )
    if name in worker_names(root) or name.endswith("-release"):
        raise SystemExit(f"{name} is taken.")
    template = root / "tools" / "template"
    test = Path("tests", "workers", name, "test_handler.py")
    written = []
    for source in sorted(path for path in template.iterdir() if path.is_file()):
        target = test if source.name == test.name else Path("workers", name, source.name)
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / target).write_text(source.read_text().replace(PLACEHOLDER, name))
        written.append(target)
    bake.add(name, like="sentence-transformers", about=ABOUT, root=root)
    docs.stale(root, write=True)
    return written


def main() -> None:
    for path in make(" ".join(sys.argv[1:])):
        print(path)
    print("Next: make test-fast, then what CONTRIBUTING.md says under `A new worker`.")


if __name__ == "__main__":
    main()
