"""OpenAI's request for speech, translated."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import JobError
from shared.requests import validate
from tools.models.tiny_xtts import SPEAKERS
from workers.xtts.openai_speech import to_xtts_request
from workers.xtts.schemas import SpeechRequest, XttsRequest


def speech(**body: Any) -> XttsRequest:
    request = validate(SpeechRequest, {"input": "Hello.", "voice": "nova", **body})
    assert isinstance(request, SpeechRequest)
    return to_xtts_request(request, voices=SPEAKERS, served=["xtts"])


def test_a_request_becomes_the_workers_own() -> None:
    request = speech()
    assert (request.text, request.speaker, request.response_format) == ("Hello.", "Daisy Studious", "mp3")
    assert speech(voice="onyx").speaker is None, "a voice that this model lacks is the default one"
    assert speech(voice={"id": SPEAKERS[0]}).speaker == SPEAKERS[0]
    assert speech(voice="bob").speaker == "bob", "the synthesizer refuses it"
    assert speech(speed=1.5, instructions="Cheerfully.", model="XTTS").speed == 1.5
    assert speech(speaker_wav="abc").speaker is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": "aac"}, "response_format"),
        ({"speed": 4.0}, "speed"),
        ({"stream_format": "sse"}, "stream_format"),
        ({"model": "tts-1"}, "model"),
        ({"input": 5}, "input"),
        ({"response_format": "opus", "sample_rate": 44100}, "sample_rate"),
    ],
)
def test_refused_requests(body: dict[str, Any], param: str) -> None:
    with pytest.raises(JobError) as caught:
        speech(**body)
    assert caught.value.param == param
