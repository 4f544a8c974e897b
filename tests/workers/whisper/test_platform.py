"""Under the local platform, with the unmodified SDK and OpenAI's client."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI
from openai.types.audio import Transcription, TranscriptionVerbose, Translation, TranslationVerbose

from local import Platform, running
from tests.helpers import error_of, runsync
from tests.workers.whisper.support import AUDIO, CECI, encoded, engine_test, sound
from tools.models import local_env
from tools.workers import ROOT

pytestmark = engine_test


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    env = {**local_env("whisper"), "WINDOW_SECONDS": "6", "MAX_BATCH_WINDOWS": "2"}
    with running("whisper", env=env) as where:
        yield where


def test_the_example_runs_on_the_platform(platform: Platform) -> None:
    example = json.loads((ROOT / "workers/whisper/test_input.json").read_text())
    output = runsync(platform, **example["input"])["output"]
    assert output["text"] == "hello world"
    assert output["chunks"][0]["text"] == " hello world"


def test_texts_and_errors_come_through(platform: Platform) -> None:
    answer = runsync(platform, **{"audio": AUDIO, "vad": False, "response_format": "vtt"})
    assert answer["output"] == "WEBVTT\n\n00:00:00.000 --> 00:00:03.000\nhello world\n\n"
    answer = runsync(platform, **{"audio": AUDIO, "language": "klingon"})
    assert answer["status"] == "FAILED"
    assert error_of(answer)["param"] == "language"


# ---- OpenAI --------------------------------------------------------------------------------------------


def test_the_official_client_reads_the_answers(platform: Platform) -> None:
    client = OpenAI(base_url=platform.openai_url, api_key="any", max_retries=0, timeout=120)

    def ask(route: str, kind: Any, **fields: Any) -> Any:
        body = {"model": "tiny/whisper", "file": encoded(sound(CECI.hertz)), "vad": False, **fields}
        return client.post(f"/audio/{route}", body=body, cast_to=kind)

    said = CECI.text.strip()
    plain = ask("transcriptions", Transcription)
    assert plain.text == said
    assert plain.usage.type == "duration"
    assert plain.usage.seconds == 3.0
    assert ask("translations", Translation).text == CECI.english.strip()
    both = {"response_format": "verbose_json", "timestamp_granularities": ["word", "segment"]}
    verbose = ask("transcriptions", TranscriptionVerbose, **both, language="fr", temperature=0.0, prompt="")
    assert (verbose.text, verbose.language, float(verbose.duration)) == (said, "french", 3.0)
    assert [word.word for word in verbose.words] == ["ceci", "est", "un", "test,", "déjà"]
    (segment,) = verbose.segments
    assert (segment.id, segment.text) == (0, CECI.text)
    assert (segment.start, segment.end) == (verbose.words[0].start, verbose.words[-1].end)
    TranscriptionVerbose.model_validate(verbose.model_dump(), strict=True)
    only = ask("transcriptions", TranscriptionVerbose, response_format="verbose_json")
    assert only.words is None
    assert [(segment.start, segment.end) for segment in only.segments] == [(0.0, 3.0)]
    words = {"response_format": "verbose_json", "timestamp_granularities[]": ["word"]}
    only = ask("transcriptions", TranscriptionVerbose, **words)
    assert only.segments is None
    assert len(only.words) == 5
    english = ask("translations", TranslationVerbose, response_format="verbose_json")
    assert (english.text, english.segments[0].text) == (CECI.english.strip(), CECI.english)
    assert english.language == "english"
    assert client.models.list().data[0].id == "tiny/whisper"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "file"),
        ({"file": AUDIO, "model": "whisper-1"}, "model"),
        ({"file": AUDIO, "stream": True}, "stream"),
        ({"file": AUDIO, "timestamp_granularities": ["word"]}, "timestamp_granularities"),
        ({"file": AUDIO, "temperature": 2}, "temperature"),
        ({"file": AUDIO, "language": "klingon"}, "language"),
        ({"file": "!"}, "file"),
    ],
)
def test_openai_errors_name_the_field(platform: Platform, fields: dict[str, Any], param: str) -> None:
    job = {"openai_route": "/v1/audio/transcriptions", "openai_input": fields}
    answer = runsync(platform, **job)
    assert answer["status"] == "FAILED"
    assert error_of(answer)["param"].partition(".")[0] == param
