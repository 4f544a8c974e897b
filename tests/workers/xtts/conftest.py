"""The worker's module with a small random XTTS of the real classes: it babbles, in several voices."""

from __future__ import annotations

import warnings
from collections.abc import Awaitable, Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from shared.settings import read_settings
from tests.helpers import send
from tools.models import local_env
from tools.workers import load_handler

ENV = {"HF_HUB_OFFLINE": "1", "MAX_BATCH_SIZE": "8", "VOICE_CACHE_SIZE": "4"}


@pytest.fixture(scope="session")
def load() -> Callable[..., Any]:
    """The engine that the handler loads, with environment variables on top of ENV."""

    def load(**env: str) -> Any:
        module = load_handler("xtts")
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # importing TTS
            for name, value in {**local_env("xtts"), **ENV, **env}.items():
                patch.setenv(name, value)
            return module.load(read_settings(module.Settings))

    return load


@pytest.fixture(scope="session")
def worker(load: Callable[..., Any]) -> Iterator[ModuleType]:
    """The handler's module with an engine."""
    module = load_handler("xtts")
    module.engine = load()
    yield module
    module.engine.synthesizer.engine.close()


@pytest.fixture(scope="session")
def synthesizer(worker: ModuleType) -> Any:
    return worker.engine.synthesizer


@pytest.fixture(scope="session")
def say(worker: ModuleType) -> Callable[..., Awaitable[dict[str, Any]]]:
    """The handler's answer to a text, which must not be an error."""

    async def say(text: str = "Hello world.", **payload: Any) -> dict[str, Any]:
        answer: dict[str, Any] = await send(worker.handler, text=text, **payload)
        assert "error" not in answer, answer["error"]
        return answer

    return say
