"""The tgi worker in the process of the tests, with the stand-in for TGI's server; see test_stand_in.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from tools.models import local_env, tiny_causal
from tools.workers import load_handler

KEPT: list[Any] = []  # an engine's session must exist until the loop of the test that uses it ends


@contextmanager
def prepared(**env: str) -> Iterator[ModuleType]:
    """The handler's module as `prepare()` leaves it, for a while."""
    module = load_handler("tgi")
    before = getattr(module, "engine", None)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**local_env("tgi"), **env}.items():
            patch.setenv(name, value)
        # In a thread of its own: the test's loop runs already.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(module.prepare).result()
    engine = module.engine
    KEPT.append(engine)
    try:
        yield module
    finally:
        engine.client.stop()
        module.__dict__["engine"] = before


def with_bos(source: Path, folder: Path) -> Path:
    """The model in `source` with its template where TGI looks for it, and a token before every text."""
    (folder / "config.json").write_text((source / "config.json").read_text())
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }}" + tiny_causal.CHAT_TEMPLATE
    config["bos_token"] = "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
