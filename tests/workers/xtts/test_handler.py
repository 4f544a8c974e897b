"""The handler: the licence, the routes, both forms of an answer."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

from shared import startup
from shared.errors import StartError
from tests.helpers import error, error_of, openai, send, stream
from tests.workers.xtts.sounds import decoded
from tools.models.tiny_xtts import LANGUAGES, SPEAKERS
from tools.workers import load_handler


@pytest.mark.parametrize("value", [None, "", "0", "false"])
def test_the_licence_comes_before_loading(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COQUI_TOS_AGREED", raising=False)
    if value is not None:
        monkeypatch.setenv("COQUI_TOS_AGREED", value)
    with pytest.raises(StartError, match=r"non-commercial.*COQUI_TOS_AGREED=1") as caught:
        load_handler("xtts").prepare()
    assert caught.value.code == "licence_not_agreed"
    assert startup.classify(caught.value) is caught.value


@pytest.mark.engine
async def test_voices_and_languages_are_listed(worker: ModuleType, say: Any) -> None:
    assert await send(worker.handler, voices=True) == {
        "voices": list(SPEAKERS),
        "default": "Ana Florence",
        "languages": [language for language in LANGUAGES if language != "ja" or find_spec("cutlet")],
        "formats": ["wav", "flac", "mp3", "opus", "pcm"],
    }
    assert (await say())["speaker"] == "Ana Florence"


@pytest.mark.engine
async def test_openai_routes(worker: ModuleType) -> None:
    models = await openai(worker.handler, "/v1/models")
    assert [model["id"] for model in models["data"]] == ["tiny-random/xtts"]
    answer = await openai(worker.handler, "/v1/audio/speech", input="Hello.", voice="nova")
    assert (answer["speaker"], answer["format"]) == ("Daisy Studious", "mp3")
    assert decoded(answer).any()
    refused = await openai(worker.handler, "/v1/audio/speech", input="Hello.", voice="bob")
    problem = error_of(refused)
    assert (problem["param"], problem["code"]) == ("voice", "unknown_voice")
    problem = error_of(await openai(worker.handler, "/v1/audio/speech", input="👋", voice="nova"))
    assert problem["message"].startswith("input: ")


@pytest.mark.engine
async def test_the_two_forms(worker: ModuleType) -> None:
    """A complete answer is one part of the generator's; a stream is refused where the endpoint has none."""
    problem = await error(worker.handler, text="Hello.", stream=True)
    assert (problem["param"], problem["code"]) == ("stream", "unsupported")
    (listed,) = await stream(worker.handler, voices=True)
    assert listed["voices"] == list(SPEAKERS)
    (answer,) = await stream(worker.handler, text="Hello.")
    assert decoded(answer).any()
    (refused,) = await stream(worker.handler, text="", stream=True)
    assert error_of(refused)["code"] == "nothing_to_say"
