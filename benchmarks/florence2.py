"""Mixed tasks of Florence-2 from many jobs at once: workers/florence2 with models of two sizes.

Beside it the naive handler, and in a process of its own transformers with the same pictures as one batch.
What is compared is measured in turn, so that a machine that slows down slows all of it. All three search with
three beams. Every answer is checked against what the models were made to say.
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
from tools.models import tiny_florence2

WORKER = "florence2"
NAIVE = HERE / "naive" / f"{WORKER}.py"
JOBS, NAIVE_JOBS, LONE_JOBS, ROUNDS = 32, 8, 8, 3
# The tasks that the naive handler has.
TASKS = [
    "OCR",
    "OCR_WITH_REGION",
    "CAPTION",
    "DETAILED_CAPTION",
    "MORE_DETAILED_CAPTION",
    "OD",
    "DENSE_REGION_CAPTION",
]
SIZE = (1600, 1200)


def make_larger(folder: Path) -> None:
    tiny_florence2.make(folder, image_size=256, window=8, channels=(32, 64, 128, 256), layers=3)


MODELS = {"tiny": ("florence2", tiny_florence2.make), "larger": ("benchmark-florence2", make_larger)}


def jobs_and_answers(count: int) -> tuple[list[dict[str, str]], list[str]]:
    images = []
    for colour in tiny_florence2.COLOURS:
        buffer = io.BytesIO()
        Image.new("RGB", SIZE, colour).save(buffer, "PNG")
        images.append(base64.b64encode(buffer.getvalue()).decode())
    picked = [(TASKS[number % len(TASKS)], number // len(TASKS) % 2) for number in range(count)]
    jobs = [{"image": images[colour], "task": task} for task, colour in picked]
    return jobs, [tiny_florence2.ANSWERS[f"<{task}>"][colour] for task, colour in picked]


def measure(model: str) -> dict[str, Any]:
    env = {"MODEL_NAME": model, "HF_HUB_OFFLINE": "1"}
    jobs, answers = jobs_and_answers(JOBS)
    bursts: dict[int, list[Burst]] = {8: [], JOBS: []}
    batches: list[float] = []
    wrong = 0
    with running(WORKER, env=env) as worker, bare(WORKER, model, env) as library:
        library.ask(jobs[:4])
        burst(worker, jobs[:4])
        for number in range(ROUNDS):
            print(f"  round {number + 1} of {ROUNDS}: {JOBS} pictures offline and as jobs", flush=True)
            seconds, texts = library.ask(jobs)
            batches.append(seconds)
            wrong += sum(a != b for a, b in zip(texts, answers, strict=True))
            for count, found in bursts.items():
                found.append(burst(worker, jobs[:count]))
                got = [output["raw_output"] for output in found[-1].outputs]
                wrong += sum(a != b for a, b in zip(got, answers[:count], strict=True))
        lone = [alone(worker, job) for job in jobs[:LONE_JOBS]]
    print(f"  the naive handler, {NAIVE_JOBS} jobs", flush=True)
    with running(NAIVE, env=env) as worker:
        burst(worker, jobs[:1])
        slow = burst(worker, jobs[:NAIVE_JOBS])
    return {"ours": bursts, "offline": batches, "lone": lone, "naive": slow, "wrong": wrong}


def report(results: dict[str, dict[str, Any]], where: dict[str, str]) -> tuple[str, dict[str, Any]]:
    verdict = {True: "yes", False: "**no**", None: ""}
    goals: list[offline.Goal] = []
    rows: list[tuple[Any, ...]] = []
    for name, measured in results.items():
        ours, slow = middle(measured["ours"][JOBS]), measured["naive"]
        times = ours.rate / slow.rate
        part = ours.rate / JOBS * statistics.median(measured["offline"])
        goals += [
            (f"{name}: {JOBS} jobs, times the naive handler", times, ">= 15", times >= 15),
            (f"{name}: {JOBS} jobs, times one offline batch", part, ">= 0.8", part >= 0.8),
            (
                f"{name}: answers that were not the expected ones",
                measured["wrong"],
                "0",
                not measured["wrong"],
            ),
        ]
        rows += offline.rows(name, measured, batch=JOBS, what="pictures")
    text = f"""# Florence-2

Jobs sent at once through `/runsync` of the local platform and the unmodified SDK, one picture of {SIZE[0]} x
{SIZE[1]} each, the naive handler's seven tasks in turn, three beams. Two models that the project made itself:
the tiny one reads 64 x 64 pixels and has one layer each of encoder and decoder, the larger one 256 x 256 and
three. Written by `python -m benchmarks florence2`. Of {ROUNDS} rounds in turn, the median one.

{table(["", "measured", "aim", "reached"], [(*goal[:3], verdict[goal[3]]) for goal in goals])}

{table(["", "pictures/s", "p50, s", "p95, s", "slowest, s"], rows)}

The naive handler gets fewer jobs because it does at most one a second, however long the queue is. The offline
batch is timed from base64 to parsed answers, and has the machine to itself; platform, client and worker share
it.

{table(["machine", ""], list(where.items()))}

The larger model is bound by the two cores: fifteen times the naive handler's one a second is more than the
offline batch does. Not measured: a GPU, for want of one, and Florence-2's own weights.
"""
    return text, offline.numbers(where, results, goals, batch=JOBS)


def main() -> None:
    offline.compare(WORKER, MODELS, measure, report)


if __name__ == "__main__":
    main()
