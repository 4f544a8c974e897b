"""Which images a change touches: those whose Dockerfile reads what changed, and no other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.test_imports import closure
from tools import changed
from tools.locks import uses_torch
from tools.workers import ROOT, worker_names

WORKERS = worker_names()
TORCH = [name for name in WORKERS if uses_torch(ROOT / "workers" / name / "requirements.in")]
SERVING = sorted(path.relative_to(ROOT) for path in (ROOT / "serving").rglob("*.py"))


@pytest.mark.parametrize("name", WORKERS)
@pytest.mark.parametrize("file", ["handler.py", "schemas.py", "Dockerfile", "requirements.txt"])
def test_an_edit_in_a_worker_builds_its_image_alone(name: str, file: str) -> None:
    assert changed.affected([f"workers/{name}/{file}"]) == [name]


@pytest.mark.parametrize("name", WORKERS)
def test_an_edit_in_serving_builds_an_image_that_imports_it_and_no_other(name: str) -> None:
    needed = closure(ROOT / "workers" / name / "handler.py", ROOT)
    built = {path for path in SERVING if name in changed.affected([str(path)])}
    assert built == needed & set(SERVING)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        *((path, WORKERS) for path in ("shared/volume.py", "docker-bake.hcl", ".dockerignore")),
        ("workers/torch.txt", TORCH),
        ("shared/requirements.in", []),
        ("workers/bge/README.md", []),
        ("workers/bge/deploy.toml", []),
        ("tests/tools/test_changed.py", []),
    ],
)
def test_what_else_builds_images(path: str, expected: list[str]) -> None:
    assert changed.affected(["README.md", path]) == expected


@pytest.mark.parametrize(
    ("tag", "workers"),
    [
        ("v1.4.2", WORKERS),
        ("whisper-v1.4.2", ["whisper"]),
        ("sentence-transformers-v1.4.2-rc.1", ["sentence-transformers"]),
    ],
)
def test_tag_of_a_release_names_its_workers(tag: str, workers: list[str]) -> None:
    assert changed.released(tag) == workers


@pytest.mark.parametrize("tag", ["nobody-v1.4.2", "whisper-1.4.2", "whisper-v1.4"])
def test_tag_of_no_release_is_refused(tag: str) -> None:
    with pytest.raises(SystemExit, match="names no release"):
        changed.released(tag)


def test_sources_are_what_a_dockerfile_copies_and_mounts() -> None:
    text = (
        "FROM x\nRUN --mount=type=bind,source=workers/a.txt,target=/tmp/x \\\n    pip install\n"
        "COPY --from=build /x /y\nCOPY --chmod=755 workers/a/one.py \\\n     workers/a/two/ ./\n"
    )
    assert changed.sources(text) == {"workers/a.txt", "workers/a/one.py", "workers/a/two"}


def test_changes_are_read_from_git(tmp_path: Path) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]

    def git(*arguments: str) -> None:
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "--quiet")
    for name in ("one", "two"):
        (tmp_path / name).touch()
        git("add", ".")
        git("commit", "--quiet", "-m", name)
    assert changed.changed_paths("HEAD~1", "HEAD", tmp_path) == ["two"]
    assert changed.changed_paths("0" * 40, "HEAD", tmp_path) is None


def test_without_a_base_every_image_is_built() -> None:
    command = [sys.executable, "-m", "tools.changed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == WORKERS
