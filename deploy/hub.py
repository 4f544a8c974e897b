"""`python -m deploy hub-export <worker>`: a repository of its own for a worker, as RunPod's Hub wants it.

The Hub lists one worker a repository, and builds its Dockerfile from the root.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from deploy.bodies import PORT
from deploy.config import ROOT, Config, ConfigError, load_config
from deploy.examples import test_input
from deploy.hub_rules import problems
from tools import bake, changed
from tools.workers import load_module, worker_names

_CATEGORIES = {
    **dict.fromkeys(("bge", "sentence-transformers"), "embedding"),
    **dict.fromkeys(("whisper", "xtts"), "audio"),
    **dict.fromkeys(("florence2", "llava"), "image"),
}
# What RunPod's machines have; an image runs with its own and newer ones.
_CUDA = ("12.4", "12.5", "12.6", "12.7", "12.8", "12.9", "13.0")
# The type that the Hub's tests get most easily.
_TEST_GPU = "NVIDIA GeForce RTX 4090"
# Milliseconds of a test, the download of the model within.
_TEST_TIMEOUT = 900_000
Schema = dict[str, Any]
_TYPES = {"integer": "number", "number": "number", "boolean": "boolean"}
_HANDLER = '''"""The worker, where the Hub looks for it. The image starts the module itself."""

import runpy

if __name__ == "__main__":
    runpy.run_module("workers.{worker}.handler", run_name="__main__")
'''
_NOTE = """
> Made by `make hub-export-{worker}` from a repository of several workers, which has the `make` commands and
> the folders named here. Here, `docker build .` makes the image.
"""


def export(worker: str, target: Path, env: dict[str, str] | None = None) -> None:
    """Write the tree into the folder `target`, which is replaced where it is an earlier export.

    env: variables of the Hub's test. Raises ConfigError: what is missing, or breaks the Hub's rules.
    """
    config = load_config(worker)
    if missing := set(config.required) - (env or {}).keys():
        raise ConfigError(f"The Hub's test needs {min(missing)}: give --env {min(missing)}=...")
    if target.exists() and any(target.iterdir()) and not (target / ".runpod/hub.json").is_file():
        raise ConfigError(f"{target} is not empty, and no earlier export.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        tree = Path(folder)
        _write(worker, config, tree, env or {})
        if found := problems(tree):
            raise ConfigError("The Hub would refuse it. " + "; ".join(found))
        _replace(tree, target)


def hub_json(worker: str, config: Config) -> dict[str, Any]:
    about = bake.table()[worker]["about"]
    http = config.type == "http"
    return {
        "title": worker,
        "description": about,
        "type": "serverless",
        "category": _CATEGORIES.get(worker, "language"),
        "config": {
            "runsOn": "GPU",
            **({"endpointType": "LB"} if http else {}),
            "containerDiskInGb": config.disk_gb,
            "gpuCount": config.gpu_count,
            "gpuIds": ",".join([*config.pools, *(f"-{name}" for name in config.excluded_types)]),
            "allowedCudaVersions": _cuda(config),
            "env": _variables(worker, config, http),
        },
    }


def tests_json(worker: str, config: Config, env: dict[str, str]) -> dict[str, Any]:
    variables = [{"key": key, "value": value} for key, value in {**config.env, **env}.items()]
    return {
        "tests": [{"name": "test_input", "input": test_input(worker)["input"], "timeout": _TEST_TIMEOUT}],
        "config": {
            "gpuTypeId": _TEST_GPU,
            "gpuCount": config.gpu_count,
            "allowedCudaVersions": _cuda(config),
            "env": variables,
        },
    }


def _cuda(config: Config) -> list[str]:
    floor = tuple(map(int, config.cuda.split(".")))
    return [version for version in _CUDA if tuple(map(int, version.split("."))) >= floor] or [config.cuda]


def _variables(worker: str, config: Config, http: bool) -> list[dict[str, Any]]:
    """The Settings as fields of the form. An endpoint's type sets the mode."""
    fixed = {"SERVE_MODE": "http", "PORT": PORT, "PORT_HEALTH": PORT} if http else {}
    variables: list[dict[str, Any]] = [{"key": key, "value": value} for key, value in fixed.items()]
    schema = load_module(worker, "schemas").Settings.model_json_schema(by_alias=False)
    names = {name.upper(): name for name in schema["properties"] if name != "serve_mode"}
    for key, name in names.items():
        field = _input(name, schema["properties"][name], schema.get("$defs", {}), config.env.get(key))
        required = key in config.required or name in schema.get("required", ())
        plain = required or name in ("model_name", "hf_token")
        variables.append({"key": key, "input": {**field, "required": required, "advanced": not plain}})
    others = config.env.keys() - names.keys() - fixed.keys()
    return [*variables, *({"key": key, "value": config.env[key]} for key in sorted(others))]


def _input(
    name: str, field: dict[str, Any], definitions: dict[str, Any], value: str | None
) -> dict[str, Any]:
    options = [option for option in field.get("anyOf", [field]) if option.get("type") != "null"]
    one = options[0] if len(options) == 1 else {}
    if "$ref" in one:
        one = definitions[one["$ref"].rpartition("/")[2]]
    kind = "huggingface" if name == "model_name" else _TYPES.get(one.get("type", ""), "string")
    words = name.replace("_", " ")
    entry = {"name": words[0].upper() + words[1:], "type": kind, "description": field.get("description", "")}
    default = value if value is not None else field.get("default")
    if default is not None:
        if kind in ("number", "boolean"):
            entry["default"] = json.loads(default) if isinstance(default, str) else default
        else:
            entry["default"] = default if isinstance(default, str) else json.dumps(default)
    if kind == "boolean":
        entry |= {"trueValue": "true", "falseValue": "false"}
    if "enum" in one:
        entry["options"] = [{"label": choice, "value": choice} for choice in map(str, one["enum"])]
    bounds = {"min": one.get("minimum"), "max": one.get("maximum")} if kind == "number" else {}
    return entry | {key: bound for key, bound in bounds.items() if bound is not None}


def _write(worker: str, config: Config, tree: Path, env: dict[str, str]) -> None:
    folder = ROOT / "workers" / worker
    dockerfile = (folder / "Dockerfile").read_text()
    ignore = (ROOT / ".dockerignore").read_text()
    admitted = [line[1:].replace("**/", "*") for line in ignore.splitlines() if line.startswith("!")]
    for source in sorted(changed.sources(dockerfile)):
        path = ROOT / source
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            name = file.relative_to(ROOT)
            if file.is_file() and any(fnmatch.fnmatchcase(str(name), pattern) for pattern in admitted):
                _copy(file, tree / name)
    for file in (folder / "deploy.toml", folder / "test_input.json", ROOT / "LICENSE", ROOT / "HTTP.md"):
        _copy(file, tree / file.name)
    (tree / ".dockerignore").write_text(ignore)
    (tree / "Dockerfile").write_text(dockerfile.replace(f" -f workers/{worker}/Dockerfile", ""))
    (tree / "handler.py").write_text(_HANDLER.format(worker=worker))
    readme = re.sub(r"\]\((\.\./)+", "](", (folder / "README.md").read_text())
    title, _, text = readme.partition("\n")
    (tree / "README.md").write_text(f"{title}\n{_NOTE.format(worker=worker)}{text}")
    (tree / ".runpod").mkdir()
    files = {"hub": hub_json(worker, config), "tests": tests_json(worker, config, env)}
    for what, content in files.items():
        (tree / ".runpod" / f"{what}.json").write_text(json.dumps(content, indent=2) + "\n")


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)


def _replace(tree: Path, target: Path) -> None:
    """Put the files of `tree` into `target`. Its .git stays, and so the repository's history."""
    target.mkdir(exist_ok=True)
    for old in target.iterdir():
        if old.name == ".git":
            continue
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    for new in tree.iterdir():
        shutil.move(new, target / new.name)


def main(argv: list[str]) -> int:
    """Export and print what comes next. Raises ConfigError."""
    parser = argparse.ArgumentParser(prog="python -m deploy hub-export", description=__doc__)
    parser.add_argument("worker", choices=worker_names())
    parser.add_argument("--to", type=Path, help="the folder (dist/hub/worker-<worker>)")
    parser.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="of the Hub's test")
    options = parser.parse_args(argv)
    target = options.to or ROOT / "dist" / "hub" / f"worker-{options.worker}"
    env = dict(pair.partition("=")[::2] for pair in options.env)
    export(options.worker, target, env)
    print(f"{os.path.relpath(target)}: commit it to a repository of its own, and make a release on GitHub.")
    print("The Hub builds a release in at most 30 minutes, and runs .runpod/tests.json on a GPU.")
    return 0
