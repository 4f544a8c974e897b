"""Of florence2 and llava: jobs at once beside one offline batch, with models of two sizes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.embeddings import middle
from benchmarks.harness import machine, write
from tools.models import made

Goal = tuple[str, float, str, bool | None]  # what, measured, aim, reached


def compare(
    name: str,
    models: Mapping[str, tuple[str, Callable[[Path], object]]],
    measure: Callable[[str], dict[str, Any]],
    report: Callable[[dict[str, dict[str, Any]], dict[str, str]], tuple[str, dict[str, Any]]],
) -> None:
    """Measure each model and write the report. models: the folder's name, and what makes the model in it."""
    where = machine("torch", "transformers", "runpod")
    results = {}
    for size, (folder, make) in models.items():
        print(f"The {size} model", flush=True)
        results[size] = measure(str(made(folder, make)))
    write(name, *report(results, where))


def rows(name: str, measured: Mapping[str, Any], *, batch: int, what: str) -> list[tuple[Any, ...]]:
    """Rows of the table of speeds for the model `name`. batch: items of the offline batch."""
    slow = measured["naive"]
    ours = {count: middle(bursts) for count, bursts in measured["ours"].items()}
    offline = batch / statistics.median(measured["offline"])
    return [
        (f"{name}: naive handler, {len(slow.latencies)} jobs", slow.rate, *list(slow.summary().values())[2:]),
        (f"{name}: this worker, one job at a time", 1 / statistics.median(measured["lone"]), "", "", ""),
        *(
            (f"{name}: this worker, {count} jobs", burst.rate, *list(burst.summary().values())[2:])
            for count, burst in ours.items()
        ),
        (f"{name}: {batch} {what} as one offline batch", offline, "", "", ""),
    ]


def numbers(
    where: Mapping[str, str], results: Mapping[str, Mapping[str, Any]], goals: Sequence[Goal], *, batch: int
) -> dict[str, Any]:
    """What the report's JSON file has."""
    return {
        "machine": where,
        "models": {
            name: {
                "naive": measured["naive"].summary(),
                "ours_per_second": {count: [b.rate for b in bs] for count, bs in measured["ours"].items()},
                "lone_seconds": measured["lone"],
                "offline_per_second": [batch / seconds for seconds in measured["offline"]],
            }
            for name, measured in results.items()
        },
        "goals": [
            {"what": what, "measured": value, "aim": aim, "reached": reached}
            for what, value, aim, reached in goals
        ],
    }
