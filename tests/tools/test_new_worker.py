"""The tools behind make: what CI builds, the tables in the READMEs, set-up, and a worker from scratch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field

from tools import bake, changed, docs, environment, new_worker
from tools.workers import ROOT, load_handler, worker_names

NAME = "my-worker-2"


# ---- which images a change touches ---------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two workers with torch, one without."""
    for name, first in {"a": "torch.txt", "b": "torch.txt", "c": "c/own.txt"}.items():
        folder = tmp_path / "workers" / name
        folder.mkdir(parents=True)
        (folder / "Dockerfile").write_text(
            f"FROM x\nRUN --mount=type=bind,source=workers/{first},target=/tmp/x \\\n    pip install\n"
            f"COPY shared shared\nCOPY --from=build /x /y\n"
            f"COPY workers/{name}/handler.py \\\n     workers/{name}/test_input.json ./\n"
        )
    return tmp_path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("workers/a/handler.py", ["a"]),
        ("workers/a/test_input.json", ["a"]),
        ("workers/b/Dockerfile", ["b"]),
        ("workers/torch.txt", ["a", "b"]),
        ("workers/c/own.txt", ["c"]),
        ("shared/volume.py", ["a", "b", "c"]),
        ("docker-bake.hcl", ["a", "b", "c"]),
        ("shared/requirements.in", []),
        ("workers/a/README.md", []),
        ("workers/a/requirements.in", []),
        ("workers/gone/handler.py", []),
        ("tests/tools/test_tools.py", []),
        ("shared_things/x.py", []),
    ],
)
def test_changed(repository: Path, path: str, expected: list[str]) -> None:
    assert changed.affected(["README.md", path], repository) == expected


def test_changed_reads_git_and_falls_back_to_every_worker(repository: Path) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]

    def git(*arguments: str) -> None:
        subprocess.run(["git", *identity, *arguments], cwd=repository, check=True, capture_output=True)

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    (repository / "workers/a/handler.py").write_text("")
    git("add", ".")
    git("commit", "--quiet", "-m", "two")
    assert changed.changed_paths("HEAD~1", "HEAD", repository) == ["workers/a/handler.py"]
    assert changed.changed_paths("0" * 40, "HEAD", repository) is None
    done = subprocess.run(
        [sys.executable, "-m", "tools.changed"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(worker_names()).replace("'", '"')


# ---- tables --------------------------------------------------------------------------------------------


class Part(BaseModel):
    size: int = Field(ge=1, le=9, description="How much")


class Example(BaseModel):
    name: str = Field(description="A name | or two", min_length=1)
    form: Literal["float", "base64"] = Field("float", description="The form")
    share: float | None = Field(None, gt=0, lt=1)
    parts: list[Part] = Field(default=[], max_length=4, description="Parts")
    one: Part = Part(size=2)


class Answer(BaseModel):
    count: int = Field(description="How many")


def test_model_table() -> None:
    assert docs.model_table(Example, "Field").splitlines() == [
        "| Field | Type | Default | Description |",
        "| --- | --- | --- | --- |",
        "| `name` | string, not empty | required | A name \\| or two |",
        "| `form` | `float`, `base64` | `float` | The form |",
        "| `share` | number, more than 0, less than 1 | unset |  |",
        "| `parts` | list of object, at most 4 items | `[]` | Parts |",
        "| `parts[].size` | integer, 1 to 9 | required | How much |",
        '| `one` | object | `{"size": 2}` |  |',
        "| `one.size` | integer, 1 to 9 | required | How much |",
    ]
    assert docs.model_table(Answer, "Field").splitlines()[0] == "| Field | Type | Description |"


def test_render_writes_between_its_markers_and_nowhere_else() -> None:
    name = worker_names()[0]
    module = load_handler(name)
    text = "before\n<!-- settings -->\nold\n<!-- /settings -->\nafter\n"
    new = docs.render(text, module)
    assert new.startswith("before\n<!-- settings -->\n| Variable |")
    assert new.endswith("<!-- /settings -->\nafter\n")
    assert "`HF_TOKEN`" in new
    assert docs.render(new, module) == new
    with pytest.raises(AttributeError):
        docs.render("<!-- fields NoSuchModel -->\n<!-- /fields -->", module)


# ---- set-up --------------------------------------------------------------------------------------------


def test_set_up_names_the_python_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit, match=r"^Missing: Python 3\.11 or newer"):
        environment.check_python()


def test_set_up_without_a_package_index_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    arguments = ["--target", str(tmp_path), "--require-hashes", "--no-deps", "-r", str(environment.LOCK)]
    with pytest.raises(SystemExit, match=r"^Missing: a package index"):
        environment.install(Path(sys.executable), "packages", *arguments)


def test_a_fresh_environment_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").touch()
    (tmp_path / ".made").write_text(environment.wanted())
    monkeypatch.setattr(environment, "install", lambda *_, **__: pytest.fail("installed again"))
    environment.main(tmp_path)
    monkeypatch.setenv("TORCH_INDEX", "https://example.com")
    assert (tmp_path / ".made").read_text() != environment.wanted()


# ---- a new worker --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with a worker scaffolded into it."""
    root = tmp_path_factory.mktemp("house") / "copy"
    shutil.copytree(
        ROOT, root, ignore=shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", ".hypothesis")
    )
    subprocess.run(
        [sys.executable, "-m", "tools.new_worker", NAME], cwd=root, check=True, capture_output=True
    )
    return root


def pytest_in(root: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_new_worker_passes_its_own_tests(house: Path) -> None:
    assert " passed" in pytest_in(house, "tests/workers/my-worker-2/test_handler.py")


def test_new_worker_fits_into_the_house(house: Path) -> None:
    """Without what needs a network, and what is told of the other workers."""
    others = " or ".join(worker_names())
    shown = pytest_in(
        house,
        *("-rA", "tests/house", "tests/images"),
        *("-k", f"not compile_to and not finds_a_wheel and ({NAME} or not ({others}))"),
    )
    assert f"test_has_the_files_of_every_worker[{NAME}]" in shown
    assert "test_the_kept_copy_has_every_worker" in shown


def test_new_worker_is_clean(house: Path) -> None:
    """Style only: the types do not depend on the name, and `make lint` checks them in the template."""
    files = [f"workers/{NAME}/handler.py", "tests/workers/my-worker-2/test_handler.py"]
    for command in (["check"], ["format", "--check"]):
        ruff = [Path(sys.executable).parent / "ruff", *command, *files]
        done = subprocess.run(ruff, cwd=house, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_new_worker_is_in_every_table(house: Path) -> None:
    assert bake.table(house)[NAME] == {"base": "python", "about": new_worker.ABOUT}
    assert f"[{NAME}](workers/{NAME}/README.md)" in (house / "README.md").read_text()
    assert "| `min_letters` | integer, 1 to 100 | `1` |" in (house / f"workers/{NAME}/README.md").read_text()


@pytest.mark.parametrize(
    "name", ["", "My-Model", "a/b", "a b", "a_b", "1st", "a-", worker_names()[0], "x-release"]
)
def test_new_worker_refuses_a_name_that_cannot_be(name: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        new_worker.make(name)


@pytest.mark.parametrize("loads", [True, False])
def test_libraries_of_another_torch_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: bool
) -> None:
    """A package that, like torchaudio, loads its library where there is one."""
    package = tmp_path / "torchaudio"
    (package / "lib").mkdir(parents=True)
    library = package / "lib" / "_torchaudio.abi3.so"
    library.touch()
    load = "" if loads else f"import os\nif os.path.exists({str(library)!r}): raise OSError('no libcudart')\n"
    (package / "__init__.py").write_text(load)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    environment.drop_what_does_not_load(Path(sys.executable))
    assert library.exists() == loads
    assert [pin.split("==")[0] for pin in environment.audio()] == ["torchaudio", "torchcodec"]
