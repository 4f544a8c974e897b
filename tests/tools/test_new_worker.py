"""`make new-worker`: a worker from scratch passes its own tests and those of the house."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import bake, new_worker
from tools.workers import ROOT, worker_names

NAME = "my-worker-2"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with a worker scaffolded into it."""
    root = tmp_path_factory.mktemp("house") / "copy"
    shutil.copytree(
        ROOT, root, ignore=shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", ".hypothesis")
    )
    command = [sys.executable, "-m", "tools.new_worker", NAME]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    return root


def test_new_worker_passes_its_own_tests_and_those_of_the_house(house: Path) -> None:
    """Without those of the other workers."""
    folders = [f"tests/workers/{NAME}", "tests/house", "tests/images"]
    others = f"{NAME} or not ({' or '.join(worker_names())})"
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", *folders, "-k", others]
    done = subprocess.run(command, cwd=house, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for test in ("test_example", f"test_has_the_files_of_every_worker[{NAME}]", "kept_copy_has_every_worker"):
        assert test in done.stdout


def test_new_worker_is_clean_and_in_every_table(house: Path) -> None:
    """Style only: the types do not depend on the name, and `make lint` checks them in the template."""
    for command in ("check", "format --check"):
        ruff = [Path(sys.executable).parent / "ruff", *command.split()]
        done = subprocess.run([*ruff, f"workers/{NAME}", f"tests/workers/{NAME}"], cwd=house, check=False)
        assert done.returncode == 0
    assert bake.table(house)[NAME] == {"base": "python", "about": new_worker.ABOUT}
    assert f"[{NAME}](workers/{NAME}/README.md)" in (house / "README.md").read_text()
    assert "| `min_letters` | integer, 1 to 100 | `1` |" in (house / f"workers/{NAME}/README.md").read_text()


@pytest.mark.parametrize(
    "name", ["", "My-Model", "a/b", "a b", "a_b", "1st", "a-", worker_names()[0], "x-release"]
)
def test_new_worker_refuses_a_name_that_cannot_be(name: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        new_worker.make(name)
