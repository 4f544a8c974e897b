"""Whisper base on speech whose words are known, by both engines, beside faster-whisper and transformers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.quality import page
from tests.quality.measures import Errors, errors
from tests.quality.speech import SENTENCES, call, espeak_missing, non_speech, spoken
from tests.quality.transcribers import Transcribe, faster_whisper, ours, pipeline

SYSTEMS: dict[str, Callable[[], AbstractContextManager[Transcribe]]] = {
    "ours, transformers, VAD": partial(ours, "transformers", vad=True),
    "ours, transformers": partial(ours, "transformers", vad=False),
    "ours, faster-whisper, VAD": partial(ours, "faster-whisper", vad=True),
    "ours, faster-whisper": partial(ours, "faster-whisper", vad=False),
    "faster-whisper, VAD": partial(faster_whisper, vad=True),
    "faster-whisper": partial(faster_whisper, vad=False),
    "transformers' pipeline": pipeline,
}
PEERS = {
    "ours, transformers, VAD": ["faster-whisper, VAD", "transformers' pipeline"],
    "ours, transformers": ["transformers' pipeline"],
    "ours, faster-whisper, VAD": ["faster-whisper, VAD"],
    "ours, faster-whisper": ["faster-whisper"],
}
Measured = dict[str, dict[str, Errors]]  # by system and recording


async def measure() -> Measured:
    import ctranslate2
    import torch

    recordings = [call(), *map(spoken, SENTENCES), *non_speech()]
    measured: Measured = {}
    for name, make in SYSTEMS.items():
        with make() as transcribe:
            measured[name] = {}
            for recording in recordings:
                torch.manual_seed(0)
                ctranslate2.set_random_seed(0)
                measured[name][recording.name] = errors(recording, await transcribe(recording))
    return measured


FIELDS = ("words", "word_start", "segment_start", "hallucinated")
SILENT = ("silence", "noise", "music")
# By how much a field may be worse than a peer's. faster-whisper pads a window's spectrogram, openai/whisper
# and transformers its audio: with VAD the first happens to suit these robotic voices, without it the second.
# With padded audio faster-whisper makes the worker's words. Fallback also samples at random.
SLACK = {"words": 0.07, "word_start": 0.025, "segment_start": 0.05, "hallucinated": 0.5}


def values(results: dict[str, Errors], field: str) -> list[float]:
    """Of each recording that the field is of."""
    is_silent = field == "hallucinated"
    return [float(getattr(e, field)) for name, e in results.items() if (name in SILENT) == is_silent]


def summary(results: dict[str, Errors]) -> list[float]:
    """The means of recordings with speech, and the seconds hallucinated in all the others."""
    *means, hallucinated = (values(results, field) for field in FIELDS)
    return [*(float(np.nanmean(numbers)) for numbers in means), sum(hallucinated)]


def excess(results: dict[str, Errors], others: dict[str, Errors], field: str) -> float:
    """How much worse a field is, over the recordings that both have a number for."""
    differences = np.subtract(values(results, field), values(others, field))
    return float(np.nansum(differences) if field == "hallucinated" else np.nanmean(differences))


def report(measured: Measured) -> None:
    text = (
        "Whisper base, greedy, the language given: 30 s of a real telephone call, and espeak-ng's voices in "
        "six languages, about 15 s each; means of the seven. Then 30 s each of silence, noise and chords. "
        "Words: the word error rate. Starts: the mean distance in seconds from where a word "
        "begins, of words recognised rightly. Hallucinated: seconds of segments where nobody speaks. "
        "faster-whisper pads the spectrogram of a window, openai/whisper, transformers and this worker its "
        "audio: with VAD the first suits these voices, without it the second, and with padded audio "
        "faster-whisper's words are this worker's."
    )
    head = ["", "words", "word starts", "segment starts", "hallucinated"]
    page.write(
        "Whisper", text, page.table(head, [[name, *summary(results)] for name, results in measured.items()])
    )
    names = list(next(iter(measured.values())))
    parts = []
    for field in FIELDS:
        shown = [name for name in names if (name in SILENT) == (field == "hallucinated")]
        lines = [[system, *values(results, field)] for system, results in measured.items()]
        parts.append(page.table([field.replace("_", " "), *shown], lines))
    page.write("Whisper by recording", *parts)


@pytest.mark.quality
@pytest.mark.timeout(3600)
async def test_no_worse_than_its_peers(fetched: Callable[[str], Path]) -> None:
    if reason := espeak_missing():
        pytest.skip(reason)
    for key in ("telephone-call", "whisper-base", "whisper-base-ctranslate2"):
        fetched(key)
    measured = await measure()
    report(measured)
    worse = [
        f"{name}: {field} by {difference:.3f} of {peer}"
        for name, peers in PEERS.items()
        for peer in peers
        for field in FIELDS
        if (difference := excess(measured[name], measured[peer], field)) > SLACK[field]
    ]
    assert worse == []


@pytest.mark.engine
@pytest.mark.parametrize("engine", ["faster-whisper"])
async def test_a_telephone_call(fetched: Callable[[str], Path], engine: str) -> None:
    """A fifth of the words at most is wrong: two people, 8 kHz, and a small model."""
    for key in ("telephone-call", "whisper-base-ctranslate2"):
        fetched(key)
    with ours(engine, vad=True) as transcribe:
        result = errors(call(), await transcribe(call()))
    assert result.words < 0.2
    assert result.word_start < 0.25
