"""`python -m deploy hub-export`: trees that keep the rules of RunPod's Hub and need nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.__main__ import main
from deploy.config import load_config
from deploy.hub import export
from deploy.hub_rules import problems
from tools.workers import worker_names


def exported(worker: str, tree: Path) -> Path:
    export(worker, tree, dict.fromkeys(load_config(worker).required, "1"))
    return tree


@pytest.mark.parametrize("worker", worker_names())
def test_tree_keeps_the_rules_and_imports_nothing_from_outside(worker: str, tmp_path: Path) -> None:
    tree = exported(worker, tmp_path / "tree")
    assert problems(tree) == []
    code = f"""
import importlib, sys
importlib.import_module("workers.{worker}.handler")
print(*(m.__file__ for n, m in sys.modules.items() if n.split(".")[0] in ("shared", "serving", "workers")
        and m.__file__), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(Path(file).is_relative_to(tree) for file in done.stdout.split())
    assert "docker build ." in (tree / "Dockerfile").read_text()
    assert (tree / "handler.py").is_file()


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        ("hub", lambda hub: hub.update(description="x" * 190), "description"),
        ("hub", lambda hub: hub.update(category="text"), "category"),
        ("hub", lambda hub: hub["config"].update(gpuIds="RTX 4090"), "gpuIds"),
        ("hub", lambda hub: hub["config"]["env"].append(hub["config"]["env"][0]), "in env twice"),
        ("hub", lambda hub: hub["config"]["env"][0].update(value="x"), "either a value or an input"),
        ("hub", lambda hub: hub["config"]["env"][0]["input"].update(type="text"), "input.type"),
        ("tests", lambda tests: tests.update(tests=[]), "tests"),
        ("tests", lambda tests: tests["tests"][0].update(timeout=1), "timeout"),
    ],
)
def test_broken_rule_is_named(
    tmp_path: Path, file: str, change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    tree = exported("sentence-transformers", tmp_path / "tree")
    path = tree / ".runpod" / f"{file}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    assert any(problem in line for line in problems(tree))
    (tree / "README.md").unlink()
    assert "README.md: missing" in problems(tree)


def test_second_export_keeps_the_history_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = exported("bge", tmp_path / "tree")
    for name in (".git", "old"):
        (tree / name).mkdir()
    assert main(["hub-export", "bge", f"--to={tree}"]) == 0
    assert (tree / ".git").is_dir()
    assert not (tree / "old").exists()
    assert main(["hub-export", "bge", f"--to={tmp_path}"]) == 2
    assert main(["hub-export", "xtts", f"--to={tree}"]) == 2
    assert "COQUI_TOS_AGREED" in capsys.readouterr().err
