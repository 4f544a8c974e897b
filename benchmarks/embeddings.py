"""256 embedding jobs at once, and one alone: workers/sentence-transformers with all-MiniLM-L6-v2.

Beside it the naive handler, one offline `SentenceTransformer.encode` over the same texts in a process of its
own, and a handler that does nothing. What is compared is measured in turn, so that a machine that slows down
slows all of it.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.harness import (
    HERE,
    Burst,
    alone,
    ask,
    bare,
    burst,
    machine,
    output,
    script_start,
    table,
    texts,
    worker_start,
    write,
)
from local import running
from tools.models import minilm, real_env

WORKER = "sentence-transformers"
NAIVE = HERE / "naive" / f"{WORKER}.py"
NOOP = HERE / "noop.py"
JOBS, NAIVE_JOBS, ROUNDS, LONE_JOBS = 256, 24, 3, 40


def shortest_share(body: bytes) -> float:
    """How many of the numbers in a response are printed with the fewest digits that give the same float32."""
    start = body.index(b'"embeddings"')
    numbers = re.findall(rb"-?\d+\.\d+(?:[eE][-+]?\d+)?", body[body.index(b"[", start) : body.rindex(b"]")])

    def digits(text: str) -> int:
        return len(re.split("[eE]", text)[0].replace(".", "").replace("-", "").strip("0"))

    short = sum(
        digits(number.decode()) <= digits(np.format_float_scientific(np.float32(float(number)), unique=True))
        for number in numbers
    )
    return short / len(numbers)


def throughput(values: Sequence[str], env: Mapping[str, str], model: str) -> dict[str, Any]:
    """Bursts, lone jobs and sizes, with ours, the no-op handler and the bare process side by side."""
    jobs = [{"text": value} for value in values]
    lone = texts(1, 50, 50, seed=1)[0]
    ours: list[Burst] = []
    offline: list[float] = []
    with running(WORKER, env=env) as worker, running(NOOP) as noop, bare("encode", model, env) as library:
        library.ask(values[:8])
        burst(worker, jobs[:8])
        for round_number in range(ROUNDS):
            print(f"  round {round_number + 1} of {ROUNDS}: {JOBS} texts offline and as jobs", flush=True)
            seconds, vectors = library.ask(values)
            offline.append(seconds)
            ours.append(burst(worker, jobs))
        floor = [burst(noop, jobs) for _ in range(ROUNDS)]
        got = np.array([job["embeddings"][0] for job in ours[-1].outputs], np.float32)

        print(f"  {LONE_JOBS} lone jobs", flush=True)
        alone_ours, alone_noop, alone_bare = [], [], []
        for _ in range(LONE_JOBS):
            alone_ours.append(alone(worker, {"text": lone}))
            alone_noop.append(alone(noop, {"text": lone}))
            alone_bare.append(library.ask([lone])[0])
        in_a_row = [library.ask([lone])[0] for _ in range(LONE_JOBS)]

        plain = ask(worker, {"texts": values[:64]})
        packed = ask(worker, {"texts": values[:64], "encoding_format": "base64"})
        output(plain), output(packed)
    return {
        "ours": ours,
        "offline_seconds": offline,
        "noop": floor,
        "difference": float(np.abs(got - np.array(vectors, np.float32)).max()),
        "lone": {
            "ours": statistics.median(alone_ours),
            "noop": statistics.median(alone_noop),
            "encode": statistics.median(alone_bare),
            "encode_in_a_row": statistics.median(in_a_row),
        },
        "bytes": {"float": len(plain), "base64": len(packed)},
        "shortest": shortest_share(plain),
    }


def naive(values: Sequence[str], env: Mapping[str, str]) -> tuple[Burst, int]:
    """Fewer jobs at once, since it does one a second, and the size of 64 vectors as it sends them."""
    with running(NAIVE, env=env) as worker:
        print(f"  {NAIVE_JOBS} jobs at once", flush=True)
        found = burst(worker, [{"text": value} for value in values[:NAIVE_JOBS]])
        return found, len(ask(worker, {"texts": values[:64]}))


def cold_starts(env: Mapping[str, str], model: str, rounds: int = 5) -> dict[str, Any]:
    """Process starts of ours and of the bare script, in turn."""
    ours, script = [], []
    phases: dict[str, float] = {}
    for number in range(rounds):
        print(f"  round {number + 1} of {rounds}", flush=True)
        script.append(script_start([str(HERE / "bare" / "load.py"), model], env))
        seconds, phases = worker_start(WORKER, env)
        ours.append(seconds)
    return {"ours": ours, "script": script, "phases_of_the_last": phases}


def plot(measured: dict[str, Any], slow: Burst) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ours, floor = middle(measured["ours"]), middle(measured["noop"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    bars = {
        "naive handler": slow.rate,
        "offline encode": JOBS / statistics.median(measured["offline_seconds"]),
        "this worker": ours.rate,
        "no-op handler": floor.rate,
    }
    left.barh(list(bars), list(bars.values()), color=["#999999", "#999999", "#2a6fdb", "#dddddd"])
    left.bar_label(left.containers[0], fmt="%.1f", padding=3)
    left.set(xscale="log", xlim=(0.5, 4 * max(bars.values())), xlabel="texts per second (log)")
    for name, found in {f"naive, {NAIVE_JOBS} jobs": slow, f"this worker, {JOBS} jobs": ours}.items():
        share = np.arange(1, len(found.latencies) + 1) / len(found.latencies)
        right.step(sorted(found.latencies), share, where="post", label=name)
    right.set(xlabel="seconds from sending to answer", ylabel="share of the jobs answered", ylim=(0, 1))
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    (HERE / "results").mkdir(exist_ok=True)
    figure.savefig(HERE / "results" / "embeddings.png", dpi=120)


def middle(bursts: Sequence[Burst]) -> Burst:
    """The one of median speed."""
    return sorted(bursts, key=lambda one: one.rate)[len(bursts) // 2]


def report(
    measured: dict[str, Any], slow: Burst, naive_bytes: int, starts: dict[str, Any], where: dict[str, str]
) -> tuple[str, dict[str, Any]]:
    ours, floor = middle(measured["ours"]), middle(measured["noop"])
    offline = JOBS / statistics.median(measured["offline_seconds"])
    start_ours, start_script = statistics.median(starts["ours"]), statistics.median(starts["script"])
    lone, sizes = measured["lone"], measured["bytes"]
    added = 1000 * (lone["ours"] - lone["noop"] - lone["encode"])
    strict = 1000 * (lone["ours"] - lone["noop"] - lone["encode_in_a_row"])
    goals = [
        ("jobs/s, times the naive handler", ours.rate / slow.rate, ">= 30", ours.rate / slow.rate >= 30),
        ("jobs/s, times one offline encode", ours.rate / offline, ">= 1.0", ours.rate / offline >= 1),
        ("lone job beyond the no-op handler and encode, ms", added, "<= 10", added <= 10),
        ("the same, encode called in a tight loop, ms", strict, "", None),
        (
            "cold start, times the bare script",
            start_ours / start_script,
            "<= 1.15",
            start_ours / start_script <= 1.15,
        ),
        (
            "64 vectors, naive JSON over base64",
            naive_bytes / sizes["base64"],
            ">= 3",
            naive_bytes / sizes["base64"] >= 3,
        ),
        ("64 vectors, our JSON over base64", sizes["float"] / sizes["base64"], "", None),
        (
            "floats printed in their shortest float32 form",
            f"{100 * measured['shortest']:.2f} %",
            "100 %",
            measured["shortest"] == 1,
        ),
        (
            "largest difference from offline encode",
            f"{measured['difference']:.1e}",
            "<= 1e-5",
            measured["difference"] <= 1e-5,
        ),
    ]
    verdict = {True: "yes", False: "**no**", None: ""}
    speeds = [
        (f"naive handler, {NAIVE_JOBS} jobs", slow),
        (f"this worker, {JOBS} jobs", ours),
        (f"no-op handler, {JOBS} jobs", floor),
    ]
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in starts["phases_of_the_last"].items())
    text = f"""# Embeddings

Jobs sent at once, one text of 5 to 200 words each, all-MiniLM-L6-v2, through `/runsync` of the local platform
and the unmodified SDK. Written by `python -m benchmarks embeddings`. Of {
        ROUNDS
    } rounds in turn, the median one.

{table(["", "measured", "aim", "reached"], [(*goal[:3], verdict[goal[3]]) for goal in goals])}

![throughput and latency](embeddings.png)

{
        table(
            ["", "jobs/s", "p50, s", "p95, s", "slowest, s"],
            [(name, *list(found.summary().values())[1:]) for name, found in speeds]
            + [(f"offline encode of {JOBS} texts", offline, "", "", "")],
        )
    }

The naive handler gets fewer jobs because it does one a second, however long the queue is.

{
        table(
            ["one lone job of 50 words", "ms, median"],
            [
                ("this worker", 1000 * lone["ours"]),
                ("no-op handler", 1000 * lone["noop"]),
                ("bare encode, in turn with them", 1000 * lone["encode"]),
                ("bare encode, in a tight loop", 1000 * lone["encode_in_a_row"]),
            ],
        )
    }

{
        table(
            ["cold start", "seconds, median of 5", "each"],
            [
                ("this worker: process start to first request for a job", start_ours, listed(starts["ours"])),
                ("bare script: imports, model loaded", start_script, listed(starts["script"])),
            ],
        )
    }

Phases of the last start, seconds: {phases}. The first request comes after the worker's prewarm.

{
        table(
            ["response with 64 vectors", "bytes"],
            [
                ("naive handler", naive_bytes),
                ("this worker, float", sizes["float"]),
                ("this worker, base64", sizes["base64"]),
            ],
        )
    }

{table(["machine", ""], list(where.items()))}

Platform, client and worker share the machine's cores; offline encode has them to itself.
"""
    numbers = {
        "machine": where,
        "jobs": {name: found.summary() for name, found in speeds},
        "ours_jobs_per_second": [found.rate for found in measured["ours"]],
        "noop_jobs_per_second": [found.rate for found in measured["noop"]],
        "offline_texts_per_second": [JOBS / seconds for seconds in measured["offline_seconds"]],
        "lone_seconds": lone,
        "cold_start_seconds": starts,
        "bytes_of_64_vectors": {"naive": naive_bytes, **sizes},
        "shortest_float32_share": measured["shortest"],
        "largest_difference_from_encode": measured["difference"],
        "goals": [
            {"what": what, "measured": value, "aim": aim, "reached": reached}
            for what, value, aim, reached in goals
        ],
    }
    return text, numbers


def listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def main() -> None:
    where = machine("torch", "sentence-transformers", "transformers", "runpod")
    env, model = real_env(WORKER), str(minilm())
    values = texts(JOBS, 5, 200)
    print("This worker, the no-op handler and offline encode", flush=True)
    measured = throughput(values, env, model)
    print("The naive handler", flush=True)
    slow, naive_bytes = naive(values, env)
    print("Cold starts", flush=True)
    starts = cold_starts(env, model)
    plot(measured, slow)
    write("embeddings", *report(measured, slow, naive_bytes, starts, where))


if __name__ == "__main__":
    main()
