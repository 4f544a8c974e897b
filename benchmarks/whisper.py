"""Clips of 10 seconds from many jobs at once, and a file of 30 minutes: workers/whisper with both engines.

Beside it the naive handler, and in a process of its own transformers: the same clips in batches of several
sizes, and the same file by its sequential long-form transcription. What is compared is measured in turn. The
model has whisper-tiny's size and random weights but for the last layer, which was made to say about forty
tokens to each tone, so that every answer is checked.
"""

from __future__ import annotations

import base64
import io
import statistics
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from benchmarks.embeddings import middle
from benchmarks.harness import HERE, Burst, bare, burst, machine, table, write
from local import running
from tools.models import made, tiny_whisper

WORKER = "whisper"
NAIVE = HERE / "naive" / f"{WORKER}.py"
ENGINES = ("transformers", "faster-whisper")
JOBS, NAIVE_JOBS, ROUNDS, LONG_ROUNDS = 16, 8, 3, 2
BATCHES = (1, 4, 8, 16)
CLIP_S, MINUTES = 10.0, 30
RATE = tiny_whisper.RATE
SAID = (
    tiny_whisper.Said(
        220.0,
        "en",
        " hello world, good morning you and all: this is a test of the words that a world may hold",
        " hello all",
    ),
    tiny_whisper.Said(
        880.0,
        "fr",
        " ceci est un test, au revoir et déjà bonjour à tous: un test est ceci",
        " this is a test",
    ),
)


def make_model(folder: Path) -> None:
    """whisper-tiny's shape: 39 million parameters."""
    tiny_whisper.make(
        folder, width=384, layers=4, heads=6, vocabulary=50_257, sounds=SAID, lengths=(CLIP_S, 25.0)
    )


def encoded(samples: np.ndarray, format: str = "FLAC", subtype: str | None = None) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format=format, subtype=subtype)
    return base64.b64encode(buffer.getvalue()).decode()


def clips(count: int) -> list[tuple[str, str]]:
    """Clips and what they say."""
    sounds = [encoded(tiny_whisper.tone(said.hertz, CLIP_S)) for said in SAID]
    return [(sounds[number % 2], SAID[number % 2].text.strip()) for number in range(count)]


def long_file(minutes: int) -> tuple[str, list[str]]:
    """Tones of 25 seconds, each with a pause: what 30-second windows hold one of."""
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(minutes * 2):
        tone = tiny_whisper.tone(SAID[0].hertz, 25.0)
        parts += [tone, np.zeros(5 * RATE, np.float32)]
    samples = np.concatenate(parts)
    samples += rng.normal(0, 0.00002, len(samples)).astype(np.float32)  # inaudible
    return encoded(samples, "OGG", "OPUS"), [SAID[0].text.strip()] * (minutes * 2)


def measure() -> dict[str, Any]:
    model = str(made("benchmark-whisper", make_model))
    env = {"MODEL_NAME": model, "HF_HUB_OFFLINE": "1"}
    sounds = clips(JOBS)
    jobs = [{"audio": clip, "vad": False} for clip, _ in sounds]
    expected = [text for _, text in sounds]
    long, says = long_file(MINUTES)
    long_job = {"audio": long, "vad": False}
    offline: dict[int, list[float]] = {size: [] for size in BATCHES}
    ours: dict[str, list[Burst]] = {engine: [] for engine in ENGINES}
    hours: dict[str, list[float]] = {name: [] for name in (*ENGINES, "sequential")}
    wrong: Counter[str] = Counter()

    def check(who: str, said: list[str], right: list[str]) -> None:
        wrong[who] += sum(a != b for a, b in zip_longest(said, right))

    with (
        bare(WORKER, model, env) as library,
        running(WORKER, env={**env, "ENGINE": ENGINES[0]}) as first,
        running(WORKER, env={**env, "ENGINE": ENGINES[1]}) as second,
        running(NAIVE, env=env) as naive,
        running(NAIVE, env={**env, "BEAMS": "1"}) as greedy,
    ):
        workers = dict(zip(ENGINES, (first, second), strict=True))
        library.ask({"clips": [clip for clip, _ in sounds[:2]], "batch": 2})
        for worker in (first, second, naive, greedy):
            burst(worker, jobs[:2])
        for number in range(ROUNDS):
            print(f"  round {number + 1} of {ROUNDS}: {JOBS} clips offline and as jobs", flush=True)
            for size in BATCHES:
                seconds, said = library.ask({"clips": [clip for clip, _ in sounds], "batch": size})
                offline[size].append(seconds)
                check("offline", said, expected)
            for engine, worker in workers.items():
                ours[engine].append(burst(worker, jobs))
                check(engine, [output["text"] for output in ours[engine][-1].outputs], expected)
        print(f"  the naive handler, {NAIVE_JOBS} jobs", flush=True)
        slow, slow_greedy = (
            burst(worker, jobs_of_reference(jobs[:NAIVE_JOBS])) for worker in (naive, greedy)
        )
        for done in (slow, slow_greedy):
            check("naive", [output["text"].strip() for output in done.outputs], expected[:NAIVE_JOBS])
        for number in range(LONG_ROUNDS):
            print(f"  {MINUTES} minutes, round {number + 1} of {LONG_ROUNDS}", flush=True)
            seconds, said = library.ask({"long": long})
            hours["sequential"].append(seconds)
            check("sequential", said, [" ".join(says)])
            for engine, worker in workers.items():
                done = burst(worker, [long_job])
                hours[engine].append(done.seconds)
                check(f"{engine}, {MINUTES} minutes", segment_texts(done.outputs[0]), says)
    return {
        "offline": offline, "ours": ours, "naive": slow, "naive_greedy": slow_greedy, "long": hours,
        "wrong": dict(wrong),
    }  # fmt: skip


def segment_texts(output: dict[str, Any]) -> list[str]:
    """The segments' texts, each in the half minute of its tone, whose place is the text's number."""
    return [
        part["text"].strip() if 30 * number - 5 <= part["start"] <= 30 * number + 1 else "out of place"
        for number, part in enumerate(output["segments"])
    ]


def jobs_of_reference(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fields that the naive handler has."""
    return [{"audio": job["audio"]} for job in jobs]


def report(found: dict[str, Any], where: dict[str, str]) -> tuple[str, dict[str, Any]]:
    verdict = {True: "yes", False: "**no**", None: ""}
    rates = {engine: middle(bursts).rate for engine, bursts in found["ours"].items()}
    offline = {size: JOBS / statistics.median(seconds) for size, seconds in found["offline"].items()}
    best = max(offline, key=lambda size: offline[size])
    long = {name: statistics.median(seconds) for name, seconds in found["long"].items()}
    naive, greedy = found["naive"], found["naive_greedy"]
    goals: list[tuple[str, float, str, bool | None]] = []
    for engine in ENGINES:
        times, part = rates[engine] / naive.rate, rates[engine] / offline[best]
        speed = long["sequential"] / long[engine]
        goals += [
            (f"{engine}: {JOBS} clips at once, times the naive handler", times, ">= 3", times >= 3),
            ("the same, times a naive handler told to use one beam", rates[engine] / greedy.rate, "", None),
            (f"{engine}: {JOBS} clips, times the best offline batch, of {best}", part, ">= 0.8", part >= 0.8),
            (f"{engine}: {MINUTES} minutes, times sequential long-form", speed, ">= 1.3", speed >= 1.3),
        ]
    wrong = found["wrong"]
    ours = sum(count for who, count in wrong.items() if who.startswith(ENGINES))
    goals += [
        ("this worker's answers that were not the expected ones", ours, "0", not ours),
        ("the naive handler's", wrong["naive"], "", None),
        ("transformers' offline, and of sequential long-form", wrong["offline"] + wrong["sequential"], "",
         None),
    ]  # fmt: skip
    rows = [
        (f"naive handler, {NAIVE_JOBS} jobs", naive.rate * CLIP_S, *list(naive.summary().values())[2:]),
        (f"the same, one beam, {NAIVE_JOBS} jobs", greedy.rate * CLIP_S,
         *list(greedy.summary().values())[2:]),
        *(
            (f"this worker, {engine}, {JOBS} jobs", rates[engine] * CLIP_S,
             *list(middle(bursts).summary().values())[2:])
            for engine, bursts in found["ours"].items()
        ),
        *((f"transformers offline, batches of {size}", rate * CLIP_S, "", "", "")
          for size, rate in offline.items()),
        *((f"{MINUTES} minutes, {name}", MINUTES * 60 / seconds, "", "", "")
          for name, seconds in long.items()),
    ]  # fmt: skip
    text = f"""# Whisper

Clips of {CLIP_S:g} seconds sent at once through `/runsync` of the local platform and the unmodified SDK, and
one file of {MINUTES} minutes, Opus. A model of whisper-tiny's size, 39 million parameters, float32; its
answers have about forty tokens and are checked. No voice activity detection: the sounds are tones. By
`python -m benchmarks whisper`. Of {ROUNDS} rounds in turn ({LONG_ROUNDS} of the file) the median one.

{table(["", "measured", "aim", "reached"], [(*goal[:3], verdict[goal[3]]) for goal in goals])}

{table(["", "seconds of audio per second", "p50, s", "p95, s", "slowest, s"], rows)}

The naive handler gets fewer jobs because it does one at a time, whatever waits. It leaves the number of beams
to transformers' pipeline, which takes five; this worker takes one unless asked. Offline runs are timed from
base64 to text and have the machine to themselves; platform, client and worker share it.

{table(["machine", ""], list(where.items()))}

Not measured: a GPU, for want of one, and OpenAI's own weights.
"""
    numbers = {
        "machine": where,
        "naive": naive.summary(),
        "naive_with_one_beam": greedy.summary(),
        "ours_per_second": {engine: [b.rate for b in bursts] for engine, bursts in found["ours"].items()},
        "offline_seconds": found["offline"],
        "long_seconds": found["long"],
        "wrong_answers": wrong,
        "goals": [
            {"what": what, "measured": value, "aim": aim, "reached": reached}
            for what, value, aim, reached in goals
        ],
    }
    return text, numbers


def main() -> None:
    where = machine("torch", "transformers", "faster-whisper", "ctranslate2", "runpod")
    write("whisper", *report(measure(), where))


if __name__ == "__main__":
    main()
