"""Speech of many jobs at once in one cloned voice: workers/xtts beside the naive handler.

The model is random and never ends by itself, so that every sentence has the same number of tokens. What is
compared is measured in turn, so that a machine that slows down slows all of it.
"""

from __future__ import annotations

import asyncio
import base64
import io
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from benchmarks.embeddings import middle
from benchmarks.harness import HERE, Burst, _session, ask, burst, machine, output, table, texts, write
from local import Platform, running
from tools.models import made, tiny_xtts

WORKER = "xtts"
NAIVE = HERE / "naive" / f"{WORKER}.py"
JOBS, ROUNDS, SENTENCES, TOKENS, SECONDS = 8, 3, 10, 80, 10.0
LAYERS, WIDTH = 12, 512


def make(folder: Path) -> None:
    tiny_xtts.make(folder, layers=LAYERS, width=WIDTH, tokens=TOKENS, ends=False)


def voice() -> str:
    """SECONDS of noise that swells and sinks, as a recording."""
    t = np.arange(int(SECONDS * 22050)) / 22050
    noise = np.random.default_rng(0).normal(0, 0.1, len(t)) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))
    buffer = io.BytesIO()
    soundfile.write(buffer, noise, 22050, format="WAV")
    return base64.b64encode(buffer.getvalue()).decode()


def sentences(count: int, seed: int) -> str:
    return " ".join(f"{text.capitalize()}." for text in texts(count, 6, 9, seed))


def first_chunk(where: Platform, value: dict[str, Any]) -> float:
    """Seconds from sending a job to its first chunk; the rest is waited for."""

    async def once() -> float:
        async with _session() as client:
            begin = time.perf_counter()
            async with client.post(f"{where.endpoint_url}/run", json={"input": value}) as answer:
                name = (await answer.json())["id"]
            first = None
            while True:
                async with client.get(f"{where.endpoint_url}/stream/{name}") as answer:
                    found = await answer.json()
                if found["stream"] and first is None:
                    assert found["stream"][0]["output"]["audio"]
                    first = time.perf_counter() - begin
                if found["status"] != "IN_PROGRESS" and found["status"] != "IN_QUEUE" and not found["stream"]:
                    assert first is not None, found
                    return first

    return asyncio.run(once())


def measure() -> dict[str, Any]:
    env = {
        "MODEL_NAME": str(made("benchmark-xtts", make)),
        "HF_HUB_OFFLINE": "1",
        "COQUI_TOS_AGREED": "1",
        "STREAMING": "true",
    }
    speaker = voice()
    jobs = [{"text": sentences(1, number), "speaker_wav": speaker} for number in range(JOBS)]
    long = {"text": sentences(SENTENCES, 99), "speaker_wav": speaker}
    found: dict[str, Any] = {"ours": [], "naive": [], "first": [], "long": [], "naive long": []}
    with (
        running(WORKER, env=env, ready_timeout=600) as worker,
        running(NAIVE, env=env, ready_timeout=600) as naive,
    ):
        for warm in (worker, naive):
            burst(warm, jobs[:1])
        for number in range(ROUNDS):
            print(f"  round {number + 1} of {ROUNDS}: {JOBS} jobs, then {SENTENCES} sentences", flush=True)
            found["ours"].append(burst(worker, jobs))
            found["naive"].append(burst(naive, jobs))
            found["first"].append(first_chunk(worker, {**long, "stream": True}))
            for name, where in (("long", worker), ("naive long", naive)):
                begin = time.perf_counter()
                output(ask(where, long))
                found[name].append(time.perf_counter() - begin)
    return found


def report(found: dict[str, Any], where: dict[str, str]) -> tuple[str, dict[str, Any]]:
    verdict = {True: "yes", False: "**no**"}
    ours, naive = middle(found["ours"]), middle(found["naive"])
    pairs: list[tuple[Burst, Burst]] = list(zip(found["ours"], found["naive"], strict=True))
    times = statistics.median(mine.rate / theirs.rate for mine, theirs in pairs)
    waits = zip(found["first"], found["naive long"], strict=True)
    part = statistics.median(first / total for first, total in waits)
    goals = [
        (f"{JOBS} jobs in one cloned voice, times the naive handler", times, ">= 4", times >= 4),
        (f"first chunk of {SENTENCES} sentences, of the naive total", part, "<= 0.2", part <= 0.2),
    ]
    rows = [
        (f"naive handler, {JOBS} jobs", naive.rate, *list(naive.summary().values())[2:]),
        (f"this worker, {JOBS} jobs", ours.rate, *list(ours.summary().values())[2:]),
    ]
    single = [
        (f"naive handler, {SENTENCES} sentences", statistics.median(found["naive long"])),
        (f"this worker, {SENTENCES} sentences", statistics.median(found["long"])),
        (f"this worker, first chunk of {SENTENCES} sentences", statistics.median(found["first"])),
    ]
    text = f"""# XTTS

Jobs sent at once through the local platform and the unmodified SDK, one sentence each, all with the same
recording of {SECONDS:g} s. The model is random: a transformer of {LAYERS} layers of {WIDTH} dimensions, where
XTTS v2 has 30 of 1024, and a vocoder of XTTS's own size. Every sentence has {TOKENS} tokens, each with a
quarter of a real one's audio: on a GPU the vocoder takes next to nothing, on a CPU it would be most of the
time. torch has its default number of threads, in both. Written by `python -m benchmarks xtts`. Of
{ROUNDS} rounds in turn, the median.

{table(["", "measured", "aim", "reached"], [(*goal[:3], verdict[goal[3]]) for goal in goals])}

{table(["", "jobs/s", "p50, s", "p95, s", "slowest, s"], rows)}

{table(["", "s"], single)}

The naive handler computes the voice anew for every job, synthesizes one sentence after another, and computes
the transformer's states twice. This worker caches the voice, the sentences of all jobs share the decode
steps, and the vocoder has a thread for each core.

{table(["machine", ""], list(where.items()))}

Not measured: a GPU, for want of one, and XTTS's own weights.
"""
    numbers = {
        "machine": where,
        "ours": [result.summary() for result in found["ours"]],
        "naive": [result.summary() for result in found["naive"]],
        "first_chunk_seconds": found["first"],
        "long_seconds": found["long"],
        "naive_long_seconds": found["naive long"],
        "goals": [
            {"what": what, "measured": value, "aim": aim, "reached": reached}
            for what, value, aim, reached in goals
        ],
    }
    return text, numbers


def main() -> None:
    where = machine("torch", "transformers", "coqui-tts", "runpod")
    write("xtts", *report(measure(), where))


if __name__ == "__main__":
    main()
