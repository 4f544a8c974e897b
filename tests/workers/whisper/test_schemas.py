"""Which requests are valid, and how clients may write them."""

from typing import Any

import pytest

from shared.errors import JobError
from shared.requests import validate
from workers.whisper.schemas import TranscriptionRequest, WhisperRequest


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"audio": None}, "audio", "invalid_value"),
        ({"task": "sing"}, "task", "invalid_value"),
        ({"timestamps": "char"}, "timestamps", "invalid_value"),
        ({"language": 5}, "language", "invalid_value"),
        ({"temperature": 1.1}, "temperature", "invalid_value"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"beam_size": 0}, "beam_size", "invalid_value"),
        ({"beam_size": 17}, "beam_size", "invalid_value"),
        ({"response_format": "diarized_json"}, "response_format", "invalid_value"),
        ({"prompt": "a" * 4001}, "prompt", "invalid_value"),
        ({"clip_start": -1}, "clip_start", "invalid_value"),
        ({"clip_start": 5, "clip_end": 5}, "clip_end", "invalid_value"),
        ({"clip_end": 0}, "clip_end", "invalid_value"),
        ({"clip_start": 1e308}, "clip_start", "invalid_value"),
        ({"clip_end": 1e308}, "clip_end", "invalid_value"),
        ({"langauge": "fr"}, "langauge", "unknown_field"),
    ],
)
def test_an_invalid_field_is_named(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(JobError) as caught:
        validate(WhisperRequest, {"audio": "AAAA", **fields})
    assert (str(caught.value.param).partition(".")[0], caught.value.code) == (param, code)
    assert param in caught.value.message


@pytest.mark.parametrize("empty", ["", "auto", None])
def test_an_empty_language_is_detected(empty: str | None) -> None:
    assert WhisperRequest(audio="AAAA", language=empty).language is None


def test_timestamps_may_be_null() -> None:
    assert WhisperRequest(audio="AAAA", timestamps=None).timestamps is False


@pytest.mark.parametrize(
    ("sent", "expected"),
    [(None, ["segment"]), ([], ["segment"]), ("word", ["word"]), (["segment", "word"], ["segment", "word"])],
)
@pytest.mark.parametrize("name", ["timestamp_granularities", "timestamp_granularities[]"])
def test_granularities_come_as_clients_write_them(sent: Any, expected: list[str], name: str) -> None:
    payload = {"file": "AAAA", "response_format": "verbose_json", name: sent}
    assert TranscriptionRequest.model_validate(payload).timestamp_granularities == expected
