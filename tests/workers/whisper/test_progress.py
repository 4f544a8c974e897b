"""Progress reports: not too often, and none that could arrive after the result."""

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import runpod

from tests.workers.whisper.support import engine_test, lecture, replace_engine, send
from workers.whisper import progress
from workers.whisper.engine import SAMPLE_RATE
from workers.whisper.handler import report_progress
from workers.whisper.progress import Progress

CHUNKS = [(number * SAMPLE_RATE, (number + 1) * SAMPLE_RATE) for number in range(100)]


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


async def test_progress_is_throttled_and_ends_before_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    sent: list[tuple[float, float]] = []
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(asyncio, "sleep", sleep)

    def send(*seconds: float) -> None:
        sent.append(seconds)

    async def run(chunks: list[tuple[int, int]], done: int, each_s: float, settle_s: float = 0) -> None:
        running = Progress(chunks, send, at_least=16)
        for chunk in chunks[:done]:
            clock.now += each_s
            running.chunk_done(chunk)
        clock.now += settle_s
        await running.settled()

    await run(CHUNKS, 100, 1)
    assert sent == [(float(n), 100.0) for n in range(5, 85, 5)]
    assert slept == [0.0], "the last report has long arrived"
    await run(CHUNKS, 1, 6, settle_s=0.5)
    assert slept[1:] == [progress.GRACE_S - 0.5]
    await run(CHUNKS[:15], 15, 10)
    assert len(sent) == 17, "a short job has no reports"
    assert len(slept) == 2, "and waits for none"


@engine_test
async def test_a_long_job_reports_how_much_is_decoded(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of six seconds in batches of one. Each look at the clock takes two seconds."""
    replace_engine(monkeypatch, loaded, loaded.transcriber.engine, chunk_seconds=6.0, batch_size=1)
    update = create_autospec(runpod.serverless.progress_update)
    monkeypatch.setattr(runpod.serverless, "progress_update", update)
    monkeypatch.setenv("RUNPOD_WEBHOOK_POST_OUTPUT", "http://127.0.0.1:9")
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=itertools.count(0, 2).__next__))
    monkeypatch.setattr(progress, "GRACE_S", 0)
    samples, marks = lecture(8, 3)
    assert (await send(samples))["text"] == " ".join(text for _, text in marks)
    reports = [call.args[1]["progress"] for call in update.call_args_list]
    assert len(reports) > 1
    seconds = [0.0, *(report["seconds"] for report in reports), reports[0]["of"]]
    assert seconds == sorted(set(seconds)), "each has more than the last, and none is the end"
    assert reports[0]["of"] == pytest.approx(len(samples) / SAMPLE_RATE, abs=0.1)
    assert reports[0]["percent"] == pytest.approx(100 * reports[0]["seconds"] / reports[0]["of"], abs=0.1)


def test_without_a_platform_progress_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNPOD_WEBHOOK_POST_OUTPUT", raising=False)
    monkeypatch.setattr(runpod.serverless, "progress_update", None)
    report_progress(None, 5, 10)  # type: ignore[arg-type]
