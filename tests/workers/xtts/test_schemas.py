"""Requests of the xtts worker, without a model."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import JobError
from shared.requests import parse, validate
from workers.xtts.schemas import SpeechRequest, VoicesRequest, XttsRequest


@pytest.mark.parametrize(
    ("payload", "param", "code"),
    [
        ({}, "text", "missing_field"),
        ({"text": 5}, "text", "invalid_value"),
        ({"text": "a" * 50_001}, "text", "invalid_value"),
        ({"text": "a", "speeker": "Ana"}, "speeker", "unknown_field"),
        ({"text": "a", "language": "la"}, "language", "invalid_value"),
        ({"text": "a", "speaker": "A", "speaker_wav": "B"}, "speaker", "invalid_value"),
        ({"text": "a", "speaker_wav": []}, "speaker_wav", "invalid_value"),
        ({"text": "a", "speaker_wav": ["x"] * 9}, "speaker_wav", "invalid_value"),
        ({"text": "a", "speaker_wav": ["x", ""]}, "speaker_wav.1", "invalid_value"),
        ({"text": "a", "speed": 0.4}, "speed", "invalid_value"),
        ({"text": "a", "speed": 2.1}, "speed", "invalid_value"),
        ({"text": "a", "temperature": -1}, "temperature", "invalid_value"),
        ({"text": "a", "top_p": 0}, "top_p", "invalid_value"),
        ({"text": "a", "top_k": 0}, "top_k", "invalid_value"),
        ({"text": "a", "repetition_penalty": 0.5}, "repetition_penalty", "invalid_value"),
        ({"text": "a", "seed": 1.5}, "seed", "invalid_value"),
        ({"text": "a", "response_format": "ogg"}, "response_format", "invalid_value"),
        ({"text": "a", "sample_rate": 96000}, "sample_rate", "invalid_value"),
        ({"text": "a", "response_format": "opus", "sample_rate": 44100}, "sample_rate", "invalid_value"),
        ({"voices": False}, "voices", "invalid_value"),
    ],
)
def test_refused_requests(payload: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(JobError) as caught:
        parse(payload, [XttsRequest, VoicesRequest], {})
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize(
    ("sent", "language"),
    [("zh", "zh-cn"), ("zh-CN", "zh-cn"), ("zh_TW", "zh-cn"), ("pt-br", "pt"), ("EN", "en"), ("en_US", "en")],
)
def test_languages_have_aliases(sent: str, language: str) -> None:
    own = parse({"text": "a", "language": sent}, [XttsRequest], {})
    of_openai = validate(SpeechRequest, {"input": "a", "voice": "nova", "language": sent})
    assert own.language == of_openai.language == language  # type: ignore[attr-defined]


def test_a_request_needs_no_more_than_a_text() -> None:
    request = validate(XttsRequest, {"text": "Hello."})
    assert isinstance(request, XttsRequest)
    assert request.model_dump(exclude_unset=True) == {"text": "Hello."}
    assert (request.language, request.response_format, request.stream) == ("en", "wav", False)
    one = validate(XttsRequest, {"text": "", "speaker_wav": "abc"})
    assert isinstance(one, XttsRequest)
    assert one.speaker_wav == ["abc"]
