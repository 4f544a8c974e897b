"""Tiny models of the families that this worker knows, made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tools.models import tiny_retrieval as tiny
from tools.workers import load_handler, load_module


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models, each named so that its family is known.

    Those whose name ends in `-bare` have no files of sentence-transformers.
    """
    root = tmp_path_factory.mktemp("models")
    tiny.write_modules(tiny.bert(root / "bge-small-en"), "cls")
    tiny.write_modules(tiny.bert(root / "e5-small"), "mean")
    tiny.write_modules(tiny.xlm_roberta(root / "bge-m3"), "cls")
    tiny.write_modules(tiny.qwen3(root / "qwen3-embedding"), "lasttoken")
    tiny.bert(root / "bge-small-en-bare")
    tiny.bert(root / "e5-small-bare")
    tiny.bert(root / "gte-small-bare")
    tiny.qwen3(root / "qwen3-embedding-bare")
    tiny.write_modules(tiny.bert(root / "e5-small-own"), "mean", {"query": "find: ", "passage": "text: "})
    tiny.reranker(root / "rank-bert")
    tiny.reranker(root / "bge-reranker-base", architecture="xlm-roberta")
    return root


@functools.cache
def load(folder: Path, **settings: Any) -> Any:
    settings_class = load_module("bge", "schemas").Settings
    return load_handler("bge").load(settings_class(model_name=str(folder), **settings))


@pytest.fixture
def use(models: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Puts a model into the handler's module, as `prepare()` does, and returns it."""

    def use(name: str, **settings: Any) -> Any:
        engine = load(models / name, **settings)
        monkeypatch.setattr(load_handler("bge"), "engine", engine, raising=False)
        return engine

    return use
