"""What holds the house together: every folder under workers/ has what the others have, and says the truth."""

from __future__ import annotations

import fnmatch
import functools
import inspect
import json
import re
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from shared.jobs import Request, closest, validate
from tools import bake, changed, docs, lock
from tools.workers import ROOT, load_handler, worker_names

FILES = {"handler.py", "Dockerfile", "requirements.in", "requirements.txt", "test_input.json", "README.md"}
VERBS = ("run", "serve", "build", "push", "shell")
BIN = Path(sys.executable).parent
NO_NETWORK = re.compile(
    "Failed to fetch|error sending request|Request failed|network timeout|timed out|response body"
)

each_worker = pytest.mark.parametrize("name", worker_names())
each_lock = pytest.mark.parametrize("folder", lock.lock_folders(), ids=str)


@functools.cache
def read(path: str) -> str:
    return (ROOT / path).read_text()


def requirements(path: Path) -> list[Requirement]:
    """The lines of a requirements.in, `-r` followed."""
    found = []
    for line in path.read_text().splitlines():
        text = line.split("#")[0].strip()
        if text.startswith("-r "):
            found += requirements((path.parent / text[3:]).resolve())
        elif text and not text.startswith("-"):
            found.append(Requirement(text))
    return found


def pins(path: Path) -> dict[str, str]:
    return {str(canonicalize_name(name)): version for name, version in lock.pins(ROOT / path).items()}


def request_models(module: ModuleType) -> list[type[Request]]:
    """The models of the worker's own input: those that its handler function takes, OpenAI's left out."""
    work = inspect.unwrap(module.handler)
    hint = next(iter(typing.get_type_hints(work).values()))
    return [model for model in typing.get_args(hint) or (hint,) if issubclass(model, Request)]


def instructions(dockerfile: str) -> list[str]:
    """A Dockerfile's instructions, comments and empty lines left out."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.startswith("#")]
    return re.split(r"\n(?=[A-Z]+ )", "\n".join(lines))


# ---- the folder and its place in the house -------------------------------------------------------------


@each_worker
def test_has_the_files_of_every_worker(name: str) -> None:
    assert {path.name for path in (ROOT / "workers" / name).iterdir()} >= FILES
    assert (ROOT / f"tests/workers/{name}/test_handler.py").exists()


def test_bake_has_a_line_for_each_worker_and_no_other() -> None:
    assert sorted(bake.table()) == worker_names()


@each_worker
def test_make_has_its_targets(name: str) -> None:
    targets = [f"{verb}-{name}" for verb in VERBS]
    # --old-file: an environment that is out of date is not made anew by a test.
    done = subprocess.run(
        ["make", "--dry-run", "--old-file=.venv/.made", *targets], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"tools.start run {name}" in done.stdout


def test_make_help_lists_every_target_and_worker() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: ([^\\\n]+)", read("Makefile"), re.MULTILINE)
    assert phony is not None
    for target in [*phony[1].split(), *(f"{verb}-<worker>" for verb in VERBS)]:
        assert re.search(rf"make {re.escape(target)} +\S", shown), target
    for name in worker_names():
        assert name in shown


def test_ci_builds_what_changed() -> None:
    jobs = yaml.safe_load(read(".github/workflows/images.yml"))["jobs"]
    assert "python3 -m tools.changed" in json.dumps(jobs["plan"])
    assert jobs["build"]["strategy"]["matrix"] == {"worker": "${{ fromJSON(needs.plan.outputs.workers) }}"}
    assert changed.affected(["docker-bake.hcl"]) == worker_names()


def test_ci_runs_what_make_runs() -> None:
    steps = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["check"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    assert all(command.startswith("make ") for command in commands)
    assert {"make lint", "make test"} <= set(commands)


def test_actions_are_pinned_by_commit() -> None:
    for workflow in (ROOT / ".github/workflows").glob("*.yml"):
        for action in re.findall(r"uses: (\S+)", workflow.read_text()):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), f"{workflow.name}: {action}"


# ---- locks ---------------------------------------------------------------------------------------------


@each_lock
def test_lock_satisfies_its_requirements(folder: Path) -> None:
    locked = pins(folder / "requirements.txt")
    if lock.uses_torch(ROOT / folder / "requirements.in"):
        locked |= pins(lock.TORCH_LOCK)
    for requirement in requirements(ROOT / folder / "requirements.in"):
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{requirement}: run make lock"
        assert requirement.specifier.contains(locked[name]), f"{requirement}, locked at {locked[name]}"


@each_lock
def test_lock_repeats_nothing_of_torch_and_agrees_with_development(folder: Path) -> None:
    own, torch, development = (
        pins(folder / "requirements.txt"),
        pins(lock.TORCH_LOCK),
        pins(lock.DEV_LOCK),
    )
    # Of CUDA's packages, and those that need its torch, development has none.
    shared = {
        name: version
        for name, version in own.items()
        if name not in lock.BESIDE_TORCH and not lock.CUDA_ONLY.fullmatch(name)
    }
    assert shared.items() <= development.items()
    if lock.uses_torch(ROOT / folder / "requirements.in"):
        assert not own.keys() & torch.keys()
    # What torch needs beside CUDA is in the development lock, at the same versions.
    plain = {name: version for name, version in torch.items() if not lock.CUDA_ONLY.fullmatch(name)}
    assert plain.items() <= development.items()


@pytest.mark.parametrize(
    "path",
    [
        lock.TORCH_LOCK,
        lock.DEV_LOCK,
        lock.VLLM_LOCK,
        *(f / "requirements.txt" for f in lock.lock_folders()),
    ],
    ids=str,
)
def test_lock_is_pinned_hashed_and_names_no_source(path: Path) -> None:
    text = (ROOT / path).read_text()
    for entry in re.split(r"\n(?=[A-Za-z0-9])", text)[1:]:
        assert re.match(r"[A-Za-z0-9._-]+==\S+", entry), entry.splitlines()[0]
        assert "--hash=sha256:" in entry, entry.splitlines()[0]
    assert not re.search(r"https?://|file:|--(extra-)?index-url|--find-links", text)


def compiled(path: Path) -> list[str]:
    """A lock without hashes (a release may gain wheels) and without comments."""
    return [line for line in path.read_text().splitlines() if re.match(r"[A-Za-z0-9]", line)]


@pytest.mark.parametrize(
    "path", [lock.TORCH_LOCK, lock.DEV_LOCK, lock.VLLM_LOCK, *lock.lock_folders()], ids=str
)
def test_lock_is_what_its_requirements_compile_to(path: Path, tmp_path: Path) -> None:
    """Compiles again, from PyPI, holding on to the versions that are locked."""
    kept = ROOT / (path if path.suffix else path / "requirements.txt")
    again = tmp_path / "lock.txt"
    again.write_text(kept.read_text())
    try:
        if path == lock.TORCH_LOCK:
            lock.lock_torch(output=again)
        elif path == lock.DEV_LOCK:
            lock.lock_dev(output=again)
        elif path == lock.VLLM_LOCK:
            lock.lock_vllm(output=again)
        else:
            lock.lock_worker(path, output=again)
    except SystemExit as error:
        if NO_NETWORK.search(str(error)):
            pytest.skip("PyPI does not answer, so the lock cannot be compiled again")
        raise
    assert compiled(again) == compiled(kept), "run make lock"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize(
    "path", [lock.TORCH_LOCK, *(f / "requirements.txt" for f in lock.lock_folders())], ids=str
)
def test_image_finds_a_wheel_of_every_package(path: Path, python: str, tmp_path: Path) -> None:
    """Images build nothing from source: that would run unpinned code, and need a compiler.

    Save what lock.FROM_SOURCE names, for whose Dockerfiles see below.
    """
    entries = re.split(r"\n(?=[A-Za-z0-9])", (ROOT / path).read_text())
    wheels = tmp_path / "lock.txt"
    wheels.write_text("\n".join(entry for entry in entries if entry.split("==")[0] not in lock.FROM_SOURCE))
    command = ["pip", "install", "--dry-run", "--quiet", "--target", str(tmp_path), "--no-deps"]
    command += ["--require-hashes", "--only-binary", ":all:", "--requirement", str(wheels)]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
    done = subprocess.run([BIN / "uv", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if NO_NETWORK.search(done.stderr):
        pytest.skip("PyPI does not answer, so there is no telling which wheels it has")
    assert done.returncode == 0, done.stderr


# ---- the handler ---------------------------------------------------------------------------------------

IMPORT = """
import sys, time
import aiohttp, pydantic_settings  # what the SDK and every worker load in any case
started = time.process_time()
from tools.workers import load_handler
load_handler(sys.argv[1])
print(time.process_time() - started, *sorted(sys.modules))
"""


@each_worker
def test_importing_the_handler_loads_nothing(name: str) -> None:
    """Half a second of a core at most, the fastest of three; a fifth of that where this was written."""
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", IMPORT, name], cwd=ROOT, capture_output=True, text=True, check=True
        )
        first, *modules = done.stdout.split()
        seconds.append(float(first))
        assert not {"torch", "transformers", "numpy", "runpod", "PIL", "soundfile"} & set(modules)
    assert min(seconds) < 0.5


@each_worker
def test_examples_are_requests(name: str) -> None:
    """test_input.json, and every {"input": ...} in the README."""
    models = request_models(load_handler(name))
    blocks = re.findall(r"```json\n(.*?)```", read(f"workers/{name}/README.md"), re.DOTALL)
    examples = [json.loads(block) for block in [read(f"workers/{name}/test_input.json"), *blocks]]
    requests = [example["input"] for example in examples if "input" in example]
    assert len(requests) >= 2, "the README shows no request"
    for request in requests:
        if "openai_route" not in request:
            validate(closest(models, request), request)


@each_worker
def test_every_field_is_described(name: str) -> None:
    module = load_handler(name)
    models = [module.Settings, *request_models(module)]
    fields: list[tuple[str, Any]] = [(n, f) for model in models for n, f in model.model_fields.items()]
    assert [field_name for field_name, field in fields if not field.description] == []


@each_worker
def test_readme_has_its_tables(name: str) -> None:
    markers = [(what, model) for _, what, model, _ in docs.MARKED.findall(read(f"workers/{name}/README.md"))]
    assert ("settings", "") in markers
    for model in request_models(load_handler(name)):
        assert ("fields", model.__name__) in markers


def test_readmes_say_what_the_code_says() -> None:
    assert docs.stale() == [], "run make docs"


# ---- the image -----------------------------------------------------------------------------------------


@each_worker
def test_dockerfile_is_clean(name: str) -> None:
    done = subprocess.run(
        [BIN / "hadolint", f"workers/{name}/Dockerfile"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def admitted(path: Path) -> bool:
    """Whether .dockerignore lets a file into the build context."""
    patterns = [line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")]
    return any(fnmatch.fnmatchcase(str(path), pattern.replace("**/", "*")) for pattern in patterns)


@each_worker
def test_dockerfile_builds_from_the_root_with_no_argument(name: str) -> None:
    text = read(f"workers/{name}/Dockerfile")
    for source in changed.sources(text):
        path = ROOT / source
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        assert any(admitted(file.relative_to(ROOT)) for file in files), source
    for argument in re.findall(r"^ARG (.*)$", text, re.MULTILINE):
        assert "=" in argument, f"ARG {argument} has no default"
    # Newer BuildKit only; RunPod's builder and older engines stop at these.
    assert not re.search(r"^# *syntax=|<<-?\w+$|--link|required=true", text, re.MULTILINE)


@each_worker
def test_bake_gives_arguments_that_the_dockerfile_takes(name: str) -> None:
    """Nobody complains of others: not BuildKit, not buildx. A worker without a model takes its base only."""
    taken = set(re.findall(r"^ARG ([A-Z_]+)=", read(f"workers/{name}/Dockerfile"), re.MULTILINE))
    given = set(bake.kept()[name]["args"]) - {"SOURCE_DATE_EPOCH"}  # BuildKit's own
    assert taken == (given if "MODEL_NAME" in taken else {"BASE_IMAGE"})


@each_worker
def test_dockerfile_builds_from_source_what_has_no_wheel_and_nothing_else(name: str) -> None:
    source = sorted(pins(Path("workers", name, "requirements.txt")).keys() & set(lock.FROM_SOURCE))
    text = read(f"workers/{name}/Dockerfile")
    assert re.findall(r"--no-binary (\S+)", text) == ([",".join(source)] if source else [])
    assert ("--no-build-isolation" in text) == bool(source), "what builds it would not be pinned"


@each_worker
def test_dockerfile_hashes_everything_it_installs(name: str) -> None:
    for line in instructions(read(f"workers/{name}/Dockerfile")):
        if "pip install" in line:
            assert "--require-hashes" in line
            assert "--no-deps" in line
            assert "SOURCE_DATE_EPOCH=" in line, "bytecode would carry times"


def test_torch_images_share_their_lower_layers() -> None:
    lower = {}
    for name in worker_names():
        text = read(f"workers/{name}/Dockerfile")
        installs_torch = "source=workers/torch.txt" in text
        assert installs_torch == lock.uses_torch(ROOT / "workers" / name / "requirements.in"), name
        if installs_torch:
            steps = instructions(text)
            last = next(number for number, step in enumerate(steps) if "source=workers/torch.txt" in step)
            lower[name] = steps[: last + 1]
    first = next(iter(lower.values()))
    for name, steps in lower.items():
        assert steps == first, name


def test_cuda_of_the_images_is_that_of_torch() -> None:
    """In tags and labels; RunPod places workers by it (minCudaVersion)."""
    python = re.search(r'python = \{.*cuda = "(.*?)"', read("docker-bake.hcl"))
    assert python is not None
    assert pins(lock.TORCH_LOCK)["cuda-toolkit"].startswith(python[1] + ".")


def test_no_image_is_called_latest() -> None:
    names = [f"workers/{name}/Dockerfile" for name in worker_names()]
    for path in [*names, "docker-bake.hcl", ".github/workflows/images.yml"]:
        code = re.sub(r"#.*", "", read(path))
        assert not re.search(r":latest|\"latest\"", code), path
