"""Every worker's Dockerfile keeps the rules of the images. What buildx makes of them: tests/images."""

from __future__ import annotations

import fnmatch
import re
from functools import cache
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tools import bake, changed, locks
from tools.workers import ROOT, worker_names

each_worker = pytest.mark.parametrize("name", worker_names())


@cache
def read(path: str) -> str:
    return (ROOT / path).read_text()


def dockerfile(name: str) -> str:
    return read(f"workers/{name}/Dockerfile")


def instructions(name: str) -> list[str]:
    """The instructions of a worker's Dockerfile, comments and empty lines left out."""
    lines = [line for line in dockerfile(name).splitlines() if line.strip() and not line.startswith("#")]
    return re.split(r"\n(?=[A-Z]+ )", "\n".join(lines))


def admitted(path: Path) -> bool:
    """Whether .dockerignore lets a file into the build context."""
    patterns = [line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")]
    return any(fnmatch.fnmatchcase(str(path), pattern.replace("**/", "*")) for pattern in patterns)


@each_worker
def test_dockerfile_builds_from_the_root_with_no_argument(name: str) -> None:
    text = dockerfile(name)
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
    """Neither BuildKit nor buildx reports other arguments. A worker without a model takes its base only."""
    taken = set(re.findall(r"^ARG ([A-Z_]+)=", dockerfile(name), re.MULTILINE))
    given = set(bake.kept()[name]["args"]) - {"SOURCE_DATE_EPOCH"}  # BuildKit's own
    assert taken == (given if "MODEL_NAME" in taken else {"BASE_IMAGE"})


@each_worker
def test_dockerfile_builds_from_source_what_has_no_wheel_and_nothing_else(name: str) -> None:
    locked = {canonicalize_name(pin) for pin in locks.pins(ROOT / "workers" / name / "requirements.txt")}
    source = sorted(locked & set(locks.FROM_SOURCE))
    text = dockerfile(name)
    assert re.findall(r"--no-binary (\S+)", text) == ([",".join(source)] if source else [])
    assert ("--no-build-isolation" in text) == bool(source), "what builds it would not be pinned"


@each_worker
def test_dockerfile_hashes_everything_it_installs(name: str) -> None:
    for line in instructions(name):
        if "pip install" in line:
            assert "--require-hashes" in line
            assert "--no-deps" in line
            assert "SOURCE_DATE_EPOCH=" in line, "bytecode would carry times"


def test_torch_images_share_their_lower_layers() -> None:
    lower = {}
    for name in worker_names():
        installs_torch = "source=workers/torch.txt" in dockerfile(name)
        assert installs_torch == locks.uses_torch(ROOT / "workers" / name / "requirements.in"), name
        if installs_torch:
            steps = instructions(name)
            last = next(number for number, step in enumerate(steps) if "source=workers/torch.txt" in step)
            lower[name] = steps[: last + 1]
    first = next(iter(lower.values()))
    for name, steps in lower.items():
        assert steps == first, name


def test_cuda_of_the_images_is_that_of_torch() -> None:
    """In tags and labels; RunPod places workers by it (minCudaVersion)."""
    python = re.search(r'python = \{.*cuda = "(.*?)"', read("docker-bake.hcl"))
    assert python is not None
    assert locks.pins(ROOT / locks.TORCH_LOCK)["cuda-toolkit"].startswith(python[1] + ".")


def test_no_image_is_called_latest() -> None:
    names = [f"workers/{name}/Dockerfile" for name in worker_names()]
    for path in [*names, "docker-bake.hcl", ".github/workflows/images.yml"]:
        code = re.sub(r"#.*", "", read(path))
        assert not re.search(r":latest|\"latest\"", code), path
