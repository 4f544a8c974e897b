"""Who imports whom: handler -> the worker's modules -> serving -> shared, and never back.

Imports are read from the source, those inside functions too. A block under `if TYPE_CHECKING` runs nowhere,
so an image needs no module of it.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools.workers import ROOT, worker_names

PACKAGES = ("shared", "serving", "workers")
# An engine takes plain values and can be used without a job: a module that imports one of these at its top
# imports nothing of the job boundary.
MODEL_LIBRARIES = {
    "torch",
    "transformers",
    "numpy",
    "ctranslate2",
    "faster_whisper",
    "TTS",
    "peft",
    "tokenizers",
}
JOB_BOUNDARY = {"shared.jobs", "shared.settings", "shared.prewarm"}


@dataclass(frozen=True)
class Import:
    """An absolute dotted name. It may name what a module defines: then its parent is the module."""

    name: str
    top: bool  # not inside a function
    typing_only: bool


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


@functools.cache
def imports(path: Path, root: Path) -> tuple[Import, ...]:
    """Everything that the file imports."""
    package = path.relative_to(root).parent.parts

    def walk(node: ast.AST, top: bool, typing_only: bool) -> Iterator[Import]:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        yield from (Import(name, top, typing_only) for name in names)
        for child in ast.iter_child_nodes(node):
            inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            skipped = isinstance(node, ast.If) and is_type_checking(node.test) and child in node.body
            yield from walk(child, top and not inner, typing_only or skipped)

    return tuple(walk(ast.parse(path.read_text()), top=True, typing_only=False))


def module_file(name: str, root: Path) -> Path | None:
    """The file of the module or package `name`, or of the module that defines it; None for a folder.

    Raises AssertionError for a module of this repository that does not exist.
    """
    path = root.joinpath(*name.split("."))
    for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
        if file.is_file():
            return file
    if path.is_dir():
        return None
    parent = module_file(name.rpartition(".")[0], root) if "." in name else None
    assert parent is not None and parent.name != "__init__.py", f"there is no module {name}"  # noqa: PT018
    return parent


def closure(start: Path, root: Path) -> set[Path]:
    """The files of this repository that importing `start`, and calling its functions, can import."""
    files, queue = set(), [start]
    while queue:
        file = queue.pop()
        if file in files:
            continue
        files.add(file)
        parents = [folder / "__init__.py" for folder in file.parents if folder.is_relative_to(root)]
        queue += [path for path in parents if path.is_file()]
        for found in imports(file, root):
            if found.name.split(".")[0] in PACKAGES and not found.typing_only:
                imported = module_file(found.name, root)
                queue += [imported] if imported else []
    return {file.relative_to(root) for file in files}


def copied(dockerfile: Path, root: Path, lines: str = r"serving\b.*") -> set[Path]:
    """The modules of the COPY instructions that match `lines`. Asserts that each keeps its path."""
    text = re.sub(r"\\\n", " ", dockerfile.read_text())
    files: set[Path] = set()
    for line in re.findall(rf"^COPY +({lines})$", text, re.MULTILINE):
        *sources, target = line.split()
        for source in sources:
            path = root / source
            assert path.exists(), f"{source} does not exist"
            kept = Path(target, path.name) if target.endswith("/") and path.is_file() else Path(target)
            assert kept == Path(source), f"{source} becomes {kept}"
            files.update([path] if path.is_file() else path.rglob("*.py"))
    return {file.relative_to(root) for file in files}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    return {found.name for found in imports(path, ROOT)}


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("shared", ("serving", "workers", "local", "deploy", "tools", "tests", "benchmarks")),
        ("serving", ("workers", "local", "deploy", "tools", "tests", "benchmarks")),
        ("workers", ("local", "deploy", "tools", "tests", "benchmarks")),
    ],
)
def test_imports_point_one_way(package: str, forbidden: tuple[str, ...]) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imported_names(path)
        if within(name, *forbidden)
    ]
    assert wrong == []


def test_workers_do_not_import_each_other() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources("workers")
        for name in imported_names(path)
        if within(name, "workers") and not within(name, f"workers.{path.relative_to(ROOT).parts[1]}")
    ]
    assert wrong == []


def test_engines_do_not_know_the_job_boundary() -> None:
    wrong = []
    for path in sources("serving", "workers"):
        found = imports(path, ROOT)
        if any(within(each.name, *MODEL_LIBRARIES) and each.top and not each.typing_only for each in found):
            names = {each.name for each in found if within(each.name, *JOB_BOUNDARY)}
            wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in names]
    assert wrong == []


def test_nothing_imports_a_handler() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(*PACKAGES)
        for name in imported_names(path)
        if re.match(r"workers\.[^.]+\.handler\b", name)
    ]
    assert wrong == []


def test_packages_import_nothing() -> None:
    files = [path for path in sources(*PACKAGES) if path.name == "__init__.py"]
    assert [path for path in files if imported_names(path) - {"__future__.annotations"}] == []


IMPORT = """
import importlib, pathlib, sys
for path in sorted(pathlib.Path("shared").glob("*.py")):
    importlib.import_module(f"shared.{path.stem}")
print(*sys.modules)
"""


def test_shared_loads_no_model_library() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = MODEL_LIBRARIES | {"runpod", "huggingface_hub", "PIL", "av", "soundfile"}
    assert heavy & set(done.stdout.split()) == set()


@pytest.mark.parametrize("name", worker_names())
def test_dockerfile_copies_what_the_handler_imports(name: str) -> None:
    folder = ROOT / "workers" / name
    needed = {path for path in closure(folder / "handler.py", ROOT) if path.parts[0] == "serving"}
    assert sorted(copied(folder / "Dockerfile", ROOT)) == sorted(needed)


@pytest.mark.parametrize("name", worker_names())
def test_dockerfile_bakes_with_what_the_bake_imports(name: str) -> None:
    """An edit of any other module keeps the baked model. An image without a bake has no such line."""
    files = copied(ROOT / "workers" / name / "Dockerfile", ROOT, r"shared/.*")
    assert sorted(files) in ([], sorted(closure(ROOT / "shared/bake.py", ROOT)))


# ---- the rules above, on a tree of their own -----------------------------------------------------------
