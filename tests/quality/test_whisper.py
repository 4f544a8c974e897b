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


def mean(results: dict[str, Errors], field: str, *, spoken: bool) -> float:
    """spoken: of recordings with speech; else the sum of the others."""
    values = {name: float(getattr(result, field)) for name, result in results.items()}
    silent = {"silence", "noise", "music"}
    if spoken:
        return float(np.mean([value for name, value in values.items() if name not in silent]))
    return sum(values[name] for name in silent)


def summary(results: dict[str, Errors]) -> list[float]:
    """Errors of words, of their starts and of segments' starts, and seconds hallucinated."""
    fields = [mean(results, field, spoken=True) for field in ("words", "word_start", "segment_start")]
    return [*fields, mean(results, "hallucinated", spoken=False)]


def report(measured: Measured) -> None:
    text = (
        "Whisper base, greedy, the language given: 30 s of a real telephone call, and espeak-ng's voices in "
        "six languages, about 15 s each; means of the seven. Then 30 s each of silence, noise and chords. "
        "Words: the word error rate. Starts: the mean distance in seconds from where a word "
        "begins, of words recognised rightly. Hallucinated: seconds of segments where nobody speaks."
    )
    head = ["", "words", "word starts", "segment starts", "hallucinated"]
    page.write(
        "Whisper", text, page.table(head, [[name, *summary(results)] for name, results in measured.items()])
    )
    names = list(next(iter(measured.values())))
    parts = []
    for field in ("words", "word_start", "segment_start", "hallucinated"):
        silent = field == "hallucinated"
        shown = [name for name in names if (name in ("silence", "noise", "music")) == silent]
        lines = [
            [system, *(float(getattr(results[name], field)) for name in shown)]
            for system, results in measured.items()
        ]
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
    worse = []
    for name, peers in PEERS.items():
        for peer in peers:
            for value, other, slack in zip(
                summary(measured[name]), summary(measured[peer]), (0.005, 0.02, 0.05, 0.5), strict=True
            ):
                worse += [f"{name}: {value:.3f}, {peer}: {other:.3f}"] if value > other + slack else []
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
