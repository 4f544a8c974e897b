"""Under the local platform, with the unmodified SDK and OpenAI's client."""

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from openai.types.audio import Transcription, TranscriptionVerbose, Translation, TranslationVerbose

from local import Platform, running
from tests.helpers import wait_until
from tests.workers.whisper.support import AUDIO, CECI, REVOIR, encoded, engine_test, lecture, sound
from tools.models import local_env
from tools.models import tiny_whisper as tiny
from tools.workers import ROOT
from workers.whisper.engine import SAMPLE_RATE

pytestmark = engine_test


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    env = {**local_env("whisper"), "WINDOW_SECONDS": "6", "MAX_BATCH_WINDOWS": "2"}
    with running("whisper", env=env) as where:
        yield where


def post(platform: Platform, path: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{platform.endpoint_url}/{path}",
        method="POST" if payload else "GET",
        data=json.dumps({"input": payload}).encode() if payload else None,
        headers={"Authorization": "Bearer any", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=150) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def runsync(platform: Platform, **payload: Any) -> dict[str, Any]:
    return post(platform, "runsync?wait=120000", payload)


def test_the_example_runs_on_the_platform(platform: Platform) -> None:
    example = json.loads((ROOT / "workers/whisper/test_input.json").read_text())
    output = runsync(platform, **example["input"])["output"]
    assert output["text"] == "hello world"
    assert output["chunks"][0]["text"] == " hello world"


def test_jobs_at_once_get_their_own_answers(platform: Platform) -> None:
    wanted = [tiny.SAID[number % 4] for number in range(12)]

    def ask(said: tiny.Said) -> Any:
        return runsync(platform, audio=encoded(sound(said.hertz)), vad=False)["output"]

    with ThreadPoolExecutor(12) as pool:
        outputs = list(pool.map(ask, wanted))
    assert [output["text"] for output in outputs] == [said.text.strip() for said in wanted]
    assert [output["language"] for output in outputs] == [said.language for said in wanted]


def test_texts_and_errors_come_through(platform: Platform) -> None:
    answer = runsync(platform, audio=AUDIO, vad=False, response_format="vtt")
    assert answer["output"] == "WEBVTT\n\n00:00:00.000 --> 00:00:03.000\nhello world\n\n"
    answer = runsync(platform, audio=AUDIO, language="klingon")
    assert answer["status"] == "FAILED"
    assert json.loads(answer["error"])["param"] == "language"


@pytest.mark.timeout(900)
def test_a_long_job_reports_its_progress(tmp_path: Path) -> None:
    """Batch by batch, on a clock that the test moves: see gated.py."""
    gate = {"clock": 0, "batches": 0}  # the clock first: a batch's end looks at it

    def move(**values: int) -> None:
        gate.update(values)
        for name, value in gate.items():
            (tmp_path / "new").write_text(str(value))
            (tmp_path / "new").rename(tmp_path / name)

    def begun() -> int:
        return int((tmp_path / "begun").read_text()) if (tmp_path / "begun").exists() else 0

    move()
    env = {
        **local_env("whisper"),
        "ENGINE": "faster-whisper",
        "XDG_CACHE_HOME": str(tmp_path),
        "RUNPOD_VOLUME_PATH": str(tmp_path / "none"),
        "WINDOW_SECONDS": "6",
        "MAX_BATCH_WINDOWS": "2",
        "PREWARM": "false",
        "GATE": str(tmp_path),
    }
    samples, marks = lecture(24, 3)
    with running(Path(__file__).parent / "gated.py", env=env) as platform:
        job = post(platform, "run", {"audio": encoded(samples, "FLAC"), "vad": False})["id"]

        def status() -> dict[str, Any]:
            return post(platform, f"status/{job}")

        def progress() -> Any:
            return status().get("output", {}).get("progress")

        try:
            # A batch holds one or two of the 24 chunks.
            move(batches=4)
            wait_until(lambda: begun() == 5)
            assert progress() is None, "it is too early"
            move(batches=5, clock=6)
            wait_until(progress)
            first = progress()
            assert status()["status"] == "IN_PROGRESS"
            move(batches=7)
            wait_until(lambda: begun() == 8)
            assert progress() == first, "not so soon after the last"
            move(batches=8, clock=12)
            wait_until(lambda: progress() != first)
            second = progress()
        finally:
            move(batches=1000)
        wait_until(lambda: status()["status"] != "IN_PROGRESS")
        last = status()
        assert (last["status"], last["output"]["text"]) == ("COMPLETED", " ".join(text for _, text in marks))
    seconds = pytest.approx(len(samples) / SAMPLE_RATE, abs=0.1)
    assert 0 < first["seconds"] < second["seconds"] < second["of"] == seconds
    assert first["percent"] == pytest.approx(100 * first["seconds"] / first["of"], abs=0.1)


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
    ("format", "expected"),
    [
        ("text", "au revoir\n"),
        ("srt", "1\n00:00:00,000 --> 00:00:03,000\nau revoir\n\n"),
        ("vtt", "WEBVTT\n\n00:00:00.000 --> 00:00:03.000\nau revoir\n\n"),
    ],
)
def test_openai_text_formats(platform: Platform, format: str, expected: str) -> None:
    body = {"file": encoded(sound(REVOIR.hertz)), "vad": False, "response_format": format}
    job = {"openai_route": "/v1/audio/transcriptions", "openai_input": body}
    assert runsync(platform, **job)["output"] == expected


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
    assert json.loads(answer["error"])["param"].partition(".")[0] == param
