"""Questions about pictures from many jobs at once: workers/llava with models of two sizes.

Beside it the naive handler, and in a process of its own transformers with the same questions as one batch.
What is compared is measured in turn, so that a machine that slows down slows all of it. Every answer is
checked: it is token for token the offline batch's.
"""

from __future__ import annotations

import base64
import io
import statistics
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks import offline
from benchmarks.embeddings import middle
from benchmarks.harness import HERE, Burst, alone, bare, burst, table
from local import running
from tools.models import tiny_llava

WORKER = "llava"
NAIVE = HERE / "naive" / f"{WORKER}.py"
JOBS, NAIVE_JOBS, LONE_JOBS, ROUNDS, TOKENS = 32, 8, 8, 5, 128
SIZE = (800, 600)


def make_larger(folder: Path) -> None:
    tiny_llava.make(folder, hidden=128, layers=4, fit=False)


MODELS = {"tiny": ("llava", tiny_llava.make), "larger": ("benchmark-llava", make_larger)}


def jobs(count: int) -> list[dict[str, Any]]:
    """Pictures of four colours; a third of the questions has an answer without an end."""
    images = []
    for colour in tiny_llava.ANSWERS:
        buffer = io.BytesIO()
        Image.new("RGB", SIZE, colour).save(buffer, "PNG")
        images.append(base64.b64encode(buffer.getvalue()).decode())
    questions = [*tiny_llava.QUESTIONS, tiny_llava.ENDLESS]
    return [
        {"image": images[number % 4], "prompt": questions[number % 3], "max_tokens": TOKENS}
        for number in range(count)
    ]


def measure(model: str) -> dict[str, Any]:
    # On two cores, a second thread of torch's would be in the way of the platform and the client.
    env = {"MODEL_NAME": model, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    asked = jobs(JOBS)
    bursts: dict[int, list[Burst]] = {8: [], JOBS: []}
    batches: list[float] = []
    wrong = 0
    with running(WORKER, env=env) as worker, bare(WORKER, model, env) as library:
        library.ask(asked[:4])
        burst(worker, asked[:4])
        for number in range(ROUNDS):
            print(f"  round {number + 1} of {ROUNDS}: {JOBS} pictures offline and as jobs", flush=True)
            seconds, answers = library.ask(asked)
            batches.append(seconds)
            for count, found in bursts.items():
                found.append(burst(worker, asked[:count]))
                got = [output[0]["response"] for output in found[-1].outputs]
                wrong += sum(a != b for a, b in zip(got, answers[:count], strict=True))
        lone = [alone(worker, job) for job in asked[:LONE_JOBS]]
    print(f"  the naive handler, {NAIVE_JOBS} jobs", flush=True)
    with running(NAIVE, env=env) as worker:
        burst(worker, asked[:1])
        slow = burst(worker, asked[:NAIVE_JOBS])
    return {"ours": bursts, "offline": batches, "lone": lone, "naive": slow, "wrong": wrong}


def report(results: dict[str, dict[str, Any]], where: dict[str, str]) -> tuple[str, dict[str, Any]]:
    verdict = {True: "yes", False: "**no**", None: ""}
    goals: list[offline.Goal] = []
    rows: list[tuple[Any, ...]] = []
    for name, measured in results.items():
        ours, slow = {count: middle(bursts) for count, bursts in measured["ours"].items()}, measured["naive"]
        times = ours[JOBS].rate / slow.rate
        # Round by round: both had the same machine.
        rounds = zip(measured["ours"][JOBS], measured["offline"], strict=True)
        part = statistics.median(seconds / jobs.seconds for jobs, seconds in rounds)
        goals += [
            (f"{name}: {JOBS} jobs, times the naive handler", times, ">= 15", times >= 15),
            (f"{name}: {JOBS} jobs, times one offline batch", part, ">= 0.8", part >= 0.8),
            (f"{name}: 8 jobs, times the naive handler", ours[8].rate / slow.rate, "", None),
            (f"{name}: answers unlike the offline batch's", measured["wrong"], "0", not measured["wrong"]),
        ]
        rows += offline.rows(name, measured, batch=JOBS, what="questions")
    text = f"""# LLaVA

Jobs sent at once through `/runsync` of the local platform and the unmodified SDK, one picture of {SIZE[0]}
x {SIZE[1]} each, answers of up to {TOKENS} tokens. Two models that the project makes itself: a tiny one with
two layers of 32 dimensions, whose answers have 6 to {TOKENS} tokens, and a random one with four of 128. torch
has one thread everywhere. Written by `python -m benchmarks llava`. Of {ROUNDS} rounds in turn, the median.

{table(["", "measured", "aim", "reached"], [(*goal[:3], verdict[goal[3]]) for goal in goals])}

{table(["", "pictures/s", "p50, s", "p95, s", "slowest, s"], rows)}

The naive handler gets fewer jobs because it does at most one a second, however long the queue is. The offline
batch is timed from base64 to texts, and has the machine to itself; platform, client and worker share it.

{table(["machine", ""], list(where.items()))}

Not measured: a GPU, for want of one, and LLaVA's own weights.
"""
    return text, offline.numbers(where, results, goals, batch=JOBS)


def main() -> None:
    offline.compare(WORKER, MODELS, measure, report)


if __name__ == "__main__":
    main()
