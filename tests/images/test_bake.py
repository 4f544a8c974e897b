"""docker-bake.hcl as buildx resolves it.

Skipped where there is no docker; tests/house/test_folders.py still holds its table of workers to the folders.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tools import bake
from tools.workers import worker_names


def buildx() -> bool:
    if not shutil.which("docker"):
        return False
    return subprocess.run(["docker", "buildx", "version"], capture_output=True, check=False).returncode == 0


needs_buildx = pytest.mark.skipif(not buildx(), reason="docker with buildx is not installed")


def test_the_kept_copy_has_every_worker() -> None:
    assert sorted(bake.kept()) == sorted(name + end for name in worker_names() for end in ("", "-release"))


@needs_buildx
def test_targets_are_the_kept_ones() -> None:
    """A misspelt attribute is no error in buildx 0.13: it just is not there."""
    assert bake.resolve() == bake.kept(), "if the change is meant: make docs"


@needs_buildx
@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("dev", ["dev", "sha-0123456789ab"]),
        ("1.4.2", ["1.4.2", "1.4.2-cuda13.0", "sha-0123456789ab"]),
        ("1.4.2-rc.1", ["1.4.2-rc.1", "1.4.2-rc.1-cuda13.0", "sha-0123456789ab"]),
    ],
)
def test_tags(tag: str, expected: list[str]) -> None:
    targets = bake.resolve(TAG=tag, REVISION="0123456789abcdef", REGISTRY="r.example/me")
    image = "r.example/me/worker-sentence-transformers"
    assert targets["sentence-transformers"]["tags"] == [f"{image}:{part}" for part in expected]


@needs_buildx
def test_a_tag_that_is_no_version_is_refused() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        bake.resolve(TAG="latest")
    assert "pattern did not match" in caught.value.stderr


@needs_buildx
def test_cache_and_secret_are_there_when_asked_for() -> None:
    targets = bake.resolve(CACHE="registry", MODEL_NAME="some/model", REGISTRY="r.example/me")
    built, released = targets["sentence-transformers"], targets["sentence-transformers-release"]
    assert built["cache-from"][0]["ref"] == "r.example/me/worker-sentence-transformers:buildcache"
    assert "cache-to" not in built
    assert released["cache-to"][0]["mode"] == "max"
    assert built["secret"] == [{"id": "HF_TOKEN", "env": "HF_TOKEN"}]
    assert "HF_TOKEN" not in built["args"]
