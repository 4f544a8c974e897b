"""The tiny model on both engines."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.workers.whisper.support import ENGINES, RecordingEngine, replace_engine
from tools.models import local_env
from workers.whisper import handler as worker


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models are converted to."""
    return tmp_path_factory.mktemp("cache")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The handler is tested on both engines, what stands between it and them on one."""
    if "loaded" in metafunc.fixturenames:
        engines = ENGINES if metafunc.module.__name__.endswith("test_handler") else ENGINES[:1]
        metafunc.parametrize("loaded", engines, indirect=True, scope="module")


@pytest.fixture(scope="module")
def loaded(request: pytest.FixtureRequest, cache: Path) -> Iterator[Any]:
    """The handler's Model with the tiny model on one of the engines, as `prepare()` leaves it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**local_env("whisper"), "ENGINE": request.param}.items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setenv("RUNPOD_VOLUME_PATH", str(cache / "none"))
        worker.prepare()
        yield worker.model
        del worker.model


@pytest.fixture
def engine(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> RecordingEngine:
    """The loaded engine, recording what it is asked."""
    recording = RecordingEngine(loaded.transcriber.engine)
    replace_engine(monkeypatch, loaded, recording)
    return recording
