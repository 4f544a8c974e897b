"""The worker under the local platform and the unmodified SDK."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from local import Platform, running
from tests.helpers import error_of, runsync
from tests.workers.xtts.sounds import RATE, alike, decoded, recording, wav
from tools.models import local_env
from tools.models.tiny_xtts import SPEAKERS
from tools.workers import ROOT

pytestmark = pytest.mark.engine


def output(answer: dict[str, Any]) -> Any:
    assert answer["status"] == "COMPLETED", answer.get("error")
    return answer["output"]


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with running("xtts", env=local_env("xtts"), ready_timeout=300) as platform:
        yield platform


def test_the_example_runs(platform: Platform) -> None:
    example = json.loads((ROOT / "workers/xtts/test_input.json").read_text())
    answer = output(runsync(platform, **{**example["input"], "response_format": "mp3"}))
    assert len(decoded(answer)) / RATE == pytest.approx(answer["duration"], abs=0.3)


def test_jobs_never_share_a_voice(platform: Platform) -> None:
    voices: list[dict[str, Any]] = [{"speaker_wav": wav(recording(pitch=pitch))} for pitch in (110, 220, 330)]
    voices.append({"speaker": SPEAKERS[0]})
    jobs = [{"text": "Who am I?", "seed": 5, **voice} for voice in voices]
    with ThreadPoolExecutor(12) as threads:
        # At first no voice is in the cache; later they all are.
        answers = list(threads.map(lambda job: decoded(output(runsync(platform, **job))), jobs * 3))
    alone = [decoded(output(runsync(platform, **job))) for job in jobs]
    for one, other in itertools.combinations(alone, 2):
        assert not alike(one, other)
    for number, samples in enumerate(answers):
        assert alike(samples, alone[number % 4]), number


def test_bad_jobs_and_the_next_one(platform: Platform) -> None:
    for value, param in [
        ({"language": "en"}, "text"), ({"text": "👋"}, "text"), ({"text": "a", "stream": True}, "stream"),
        ({"text": "a", "speaker": "Bob"}, "speaker"),
        ({"text": "a", "speaker_wav": wav(recording(0.1))}, "speaker_wav"),
    ]:  # fmt: skip
        assert error_of(runsync(platform, **value))["param"] == param
    assert output(runsync(platform, **{"text": "Hello."}))["duration"] > 0
