"""Text from many jobs at once: workers/huggingface beside the naive handler and transformers itself.

The model is a random Llama of 50 million parameters. All of it is greedy, in one run, one after another.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import HERE, ROOT, _ask, _session, alone, burst, machine, output, table, texts, write
from local import Platform, running
from tools.models import made, tiny_causal

JOBS, TOKENS, ARRIVALS, GAP = 16, 64, 24, 0.03
# Two threads that wait for each other measure what else runs on the machine.
THREADS = {"OMP_NUM_THREADS": "1"}


# Not measured by this module.
STEP_THREADS = """## Threads of a decode step

Streams of 64 tokens over HTTP on two cores, medians in seconds, 2026-11-28: torch's two threads throughout,
and the number chosen by trial (serving/continuous_batching/step_threads.py). Busy: two endless loops beside.
By turns in the same run, 4 times (50 million) or 3 to 9 (tiny). Other processes ran on the machine; these
had a priority over them. Passive waiting (OMP_WAIT_POLICY) is no cure: 50 streams of the larger model took
6.54 s idle, and 3.98 s without it.

| model, streams | two threads | by trial | two threads, busy | by trial, busy |
| --- | --- | --- | --- | --- |
| 50 million, 1 | 1.08 | 1.08 |  |  |
| 50 million, 50 | 3.88 | 3.92 |  |  |
| tiny, 1 | 0.047 | 0.043 | 0.350 | 0.104 |
| tiny, 50 | 0.309 | 0.221 | 17.9 | 0.304 |
"""


def make_larger(folder: Path) -> None:
    tiny_causal.make(folder, hidden=512, layers=15)


def arriving(where: Platform, values: Sequence[Any]) -> list[float]:
    """The latencies of jobs that are sent GAP seconds apart."""

    async def one(session: Any, number: int, value: Any) -> float:
        await asyncio.sleep(number * GAP)
        took, body = await _ask(session, where, value)
        output(body)
        return took

    async def everything() -> list[float]:
        async with _session() as session:
            return await asyncio.gather(*(one(session, i, value) for i, value in enumerate(values)))

    return asyncio.run(everything())


def bare(model: str, even: Sequence[dict[str, Any]], mixed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    wanted = {
        "even": [it["prompt"] for it in even],
        "mixed": [(it["prompt"], it["max_tokens"]) for it in mixed],
        "gap": GAP,
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "bare" / "huggingface.py"), model, str(TOKENS)],
        input=json.dumps(wanted), stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **THREADS},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def asked(number: int, prompt: str, tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0}


def measure(model: str) -> dict[str, Any]:
    prompts = texts(JOBS, 4, 16)
    draw = random.Random(1)
    even = [asked(i, prompt, TOKENS) for i, prompt in enumerate(prompts)]
    mixed = [asked(i, p, draw.randint(16, 128)) for i, p in enumerate(texts(ARRIVALS, 4, 16, seed=2))]
    env = {"MODEL_NAME": model, "HF_HUB_OFFLINE": "1", "SERVED_MODEL_NAME": "random/llama-50m", **THREADS}
    found: dict[str, Any] = {"bare": bare(model, even, mixed)}
    for name, handler in (("ours", "huggingface"), ("naive", HERE / "naive" / "huggingface.py")):
        print(f"  {name}", flush=True)
        with running(handler, env=env) as where:
            burst(where, even[:1])
            lone = [alone(where, even[0]) for _ in range(3)]
            begin = time.perf_counter()
            crowd = burst(where, even)
            print(f"  {name}: {JOBS} jobs in {time.perf_counter() - begin:.1f} s", flush=True)
            answers = [(it[0] if isinstance(it, list) else it)["response"] for it in crowd.outputs]
            late = arriving(where, mixed)
        found[name] = {
            "lone": statistics.median(lone),
            "burst": crowd.seconds,
            "arrivals": late,
            "answers": answers,
        }
    return found


def bare_row(name: str, found: dict[str, Any] | None) -> tuple[Any, ...]:
    if found is None:
        return name, "failed", "", "", ""
    wrong = f" ({found['wrong']} answers differ from generate's)" if found["wrong"] else ""
    mixed = found["mixed"]
    return f"{name}{wrong}", found["even"], found["one"], statistics.mean(mixed), max(mixed)


def report(found: dict[str, Any], where: dict[str, str]) -> tuple[str, dict[str, Any]]:
    late = {name: found[name]["arrivals"] for name in ("ours", "naive")}
    ours, naive, plain = found["ours"], found["naive"], found["bare"]
    times = naive["burst"] / ours["burst"]
    latency = statistics.mean(late["ours"]) / statistics.mean(late["naive"])
    lone = ours["lone"] / plain["generate"]
    wrong = sum(a != b for a, b in zip(ours["answers"], naive["answers"], strict=True))
    verdict = {True: "yes", False: "**no**"}
    goals = [
        (f"{JOBS} jobs of {TOKENS} tokens, times the naive handler", times, ">= 4", times >= 4),
        (
            f"{ARRIVALS} jobs 30 ms apart, mean latency by naive",
            latency,
            "<= 0.33",
            latency <= 1 / 3,
        ),
        ("a lone job, by bare generate", lone, "<= 1.1", lone <= 1.1),
        ("answers that differ from the naive handler's", wrong, "0", not wrong),
    ]
    rows = [
        ("naive handler", naive["burst"], naive["lone"], statistics.mean(late["naive"]), max(late["naive"])),
        ("this worker", ours["burst"], ours["lone"], statistics.mean(late["ours"]), max(late["ours"])),
        bare_row("its engine alone", plain.get("engine")),
        bare_row("transformers' continuous batching, sdpa", plain.get("continuous sdpa")),
        bare_row("transformers' continuous batching, eager", plain.get("continuous eager")),
        ("generate", "", plain["generate"], "", ""),
    ]
    heads = ["seconds", f"{JOBS} jobs", "one job", f"{ARRIVALS} arriving, mean", "slowest"]
    text = f"""# huggingface

A random Llama of 50 million parameters in float32, greedy, {TOKENS} tokens a job (the {ARRIVALS} that
arrive: 16 to 128), through `/runsync` of the local platform and the unmodified SDK; the last four rows are
without them, in a process of their own.
Written by `python -m benchmarks huggingface`.

{table(["", "measured", "aim", "reached"], [(*goal[:3], verdict[bool(goal[3])]) for goal in goals])}

{table(heads, rows)}

{table(["machine", ""], list(where.items()))}

Not measured: a GPU, for want of one.

{STEP_THREADS}"""
    numbers = {"machine": where, **found, "goals": [list(goal) for goal in goals]}
    return text, numbers


def main() -> None:
    where = machine("torch", "transformers", "runpod")
    write("huggingface", *report(measure(str(made("benchmark-huggingface", make_larger))), where))


if __name__ == "__main__":
    main()
