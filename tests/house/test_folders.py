"""Every folder under workers/ has what the others have, and its place in make, the bake file and CI."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import bake, changed
from tools.workers import ROOT, worker_names

FILES = {
    *("handler.py", "schemas.py", "test_input.json", "README.md", "deploy.toml"),
    *("Dockerfile", "requirements.in", "requirements.txt"),
}
VERBS = ("run", "serve", "build", "push", "shell")
DEPLOY_VERBS = ("plan", "deploy", "rollback", "status", "logs", "destroy")
OFFLINE_VERBS = ("size", "hub-export")
# Those that load seconds of code, and whatever imports one of them.
MODEL_LIBRARIES = {
    *("torch", "transformers", "sentence_transformers", "tokenizers", "ctranslate2", "faster_whisper", "TTS"),
    *("numpy", "scipy", "PIL", "av", "soundfile", "soxr", "peft", "vllm", "runpod"),
}

each_worker = pytest.mark.parametrize("name", worker_names())


def make(*arguments: str) -> str:
    """What `make` prints."""
    # --old-file: an environment that is out of date is not made anew by a test.
    command = ["make", "--old-file=.venv/.made", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@each_worker
def test_has_the_files_of_every_worker(name: str) -> None:
    assert {path.name for path in (ROOT / "workers" / name).iterdir()} >= FILES
    assert list((ROOT / "tests" / "workers" / name).glob("test_*.py"))


def test_bake_has_a_line_for_each_worker_and_no_other() -> None:
    assert sorted(bake.table()) == worker_names()


@each_worker
def test_make_has_its_targets(name: str) -> None:
    shown = make(
        "--dry-run",
        *(f"{verb}-{name}" for verb in (*VERBS, *DEPLOY_VERBS, *OFFLINE_VERBS)),
        "NAME=mine",
        "TYPE=http",
    )
    assert f"tools.start run {name}" in shown
    for verb in DEPLOY_VERBS:
        assert f"-m deploy {verb} {name} --name 'mine' --type 'http'" in " ".join(shown.split())
    for verb in OFFLINE_VERBS:
        assert f"-m deploy {verb} {name}" in shown


def test_make_help_lists_every_target_and_worker() -> None:
    shown = make("help")
    phony = re.search(r"^\.PHONY: ((?:[^\n]*\\\n)*[^\n]*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    targets = re.findall(r"^[a-z-]+$", "\n".join(phony[1].partition("$(foreach")[0].split()), re.MULTILINE)
    assert {"test", "push"} <= set(targets)
    for target in [*targets, *(f"{verb}-<worker>" for verb in (*VERBS, *DEPLOY_VERBS))]:
        assert re.search(rf"make {re.escape(target)} +\S", shown), target
    for name in worker_names():
        assert name in shown


IMPORT = """
import sys, time
import aiohttp, pydantic_settings  # what the SDK and every worker load in any case
started = time.process_time()
from tools.workers import load_handler
load_handler(sys.argv[1])
print(time.process_time() - started, *sorted(sys.modules))
"""


@each_worker
def test_importing_the_handler_and_its_schemas_loads_no_model_library(name: str) -> None:
    """Half a second of a core at most, the fastest of three; a fifth of that where this was written."""
    seconds: list[float] = []
    while len(seconds) < 3 and min(seconds, default=1.0) >= 0.5:
        command = [sys.executable, "-c", IMPORT, name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        first, *modules = done.stdout.split()
        seconds.append(float(first))
        assert f"workers.{name}.schemas" in modules
        assert not MODEL_LIBRARIES & set(modules)
    assert min(seconds) < 0.5


# ---- CI ------------------------------------------------------------------------------------------------


def jobs(workflow: str) -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / ".github/workflows" / workflow).read_text())
    return dict(loaded["jobs"])


def test_ci_builds_what_changed() -> None:
    images = jobs("images.yml")
    assert "python3 -m tools.changed" in json.dumps(images["plan"])
    matrix = images["build"]["strategy"]["matrix"]
    assert matrix == {"worker": "${{ fromJSON(needs.plan.outputs.workers) }}"}
    assert changed.affected(["docker-bake.hcl"]) == worker_names()


def test_a_release_of_one_worker_and_a_deploy_by_hand() -> None:
    assert "python3 -m tools.changed --tag" in json.dumps(jobs("images.yml")["plan"])
    triggers = yaml.safe_load((ROOT / ".github/workflows/deploy.yml").read_text())[True]  # `on`, in YAML 1.1
    inputs = triggers["workflow_dispatch"]["inputs"]
    assert set(inputs) == {"worker", "environment", "tag"}


@pytest.mark.parametrize(
    ("workflow", "job", "commands"),
    [
        ("ci.yml", "check", {"make lint", "make test"}),
        ("locks.yml", "check", {"make test-locks"}),
        ("soak.yml", "soak", {"make test-soak"}),
    ],
)
def test_ci_runs_what_make_runs(workflow: str, job: str, commands: set[str]) -> None:
    steps = jobs(workflow)[job]["steps"]
    run = [step["run"] for step in steps if "run" in step]
    assert all(command.startswith("make ") for command in run)
    assert commands <= set(run)


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda p: p.name)
def test_actions_are_pinned_by_commit(workflow: Path) -> None:
    for action in re.findall(r"uses: (\S+)", workflow.read_text()):
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), action
