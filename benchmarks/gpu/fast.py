"""How fast a worker is: through its handler, through HTTP mode, beside the naive handler, and why."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import statistics
import sys
import time
from types import ModuleType
from typing import Any

import torch

from benchmarks.gpu import jobs
from benchmarks.gpu.models import CASES, weights
from benchmarks.gpu.report import Part

SIZES = (1, 8, 32, 64)
TINY_SIZES = (1, 2)


def requests(part: Part, number: int, start: int = 0) -> list[dict[str, Any]]:
    return [CASES[part.worker].request(start + index, part.tiny) for index in range(number)]


def engine(part: Part, label: str = "", **env: str) -> None:
    """Jobs at once through the handler in this process, and what the device allows."""
    begin = time.perf_counter()
    worker = jobs.load(part, **env)
    part.row(f"{label}seconds to import, load and run the first requests", time.perf_counter() - begin)
    for number in TINY_SIZES if part.tiny else SIZES:
        took, outputs = asyncio.run(measured(worker, part, number))
        part.row(f"{label}{number} jobs at once, jobs/s", number / took)
        part.keep(f"{part.worker} {label}{number}", number / took)
        if label:
            continue
        made = [CASES[part.worker].tokens(output, part.tiny) for output in outputs]
        if any(made):
            part.row(f"{number} jobs at once, tokens/s", sum(made) / took)
        limit = limit_seconds(part, number, outputs)
        if limit is not None:
            # Decoding is bound by memory while few run, encoders by the matrix units once many do.
            aim = (
                (0.6 if number == 1 else 0.5)
                if CASES[part.worker].decoder
                else (0.5 if number >= 32 else None)
            )
            share = limit / took
            name = f"{number} jobs at once, share of the device's limit"
            part.row(name, share) if aim is None or part.tiny else part.at_least(name, share, aim)
    if CASES[part.worker].streams:
        value = requests(part, 1)[0]
        times = [asyncio.run(jobs.first_part(worker, value)) for _ in range(3)]
        part.row(f"{label}first token of a lone job, ms", 1000 * statistics.median(times))
    if part.device.type == "cuda":
        part.row(f"{label}most memory in use, GiB", torch.cuda.max_memory_allocated() / 2**30)


async def measured(worker: ModuleType, part: Part, number: int) -> tuple[float, list[Any]]:
    """The second of two rounds with different jobs: the first chooses kernels for these sizes."""
    await jobs.together(worker, requests(part, number, start=1000))
    return await jobs.together(worker, requests(part, number))


def limit_seconds(part: Part, number: int, outputs: list[Any]) -> float | None:
    """The least that the device needs for these jobs: 2 operations a weight and position for what is encoded,
    at the measured matrix rate; all weights of the decoder once a step, at the measured bandwidth.

    Attention, the KV cache and convolutions are left out. None where the limits were not measured.
    """
    rate, bandwidth = part.known("rate"), part.known("bandwidth")
    if not rate or not bandwidth:
        return None
    case = CASES[part.worker]
    positions = sum(case.positions(output, part.tiny) for output in outputs)
    if not positions:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(part.folder)
        positions = sum(len(tokenizer(value["texts"][0])["input_ids"]) for value in requests(part, number))
    encoded = 2 * weights(part.folder, case.encoder)[0] * positions / rate
    steps = max((case.tokens(output, part.tiny) for output in outputs), default=0)
    decoded = steps * weights(part.folder, case.decoder)[1] / bandwidth if case.decoder else 0.0
    return encoded + decoded


def http(part: Part) -> None:
    """The same jobs through a worker process in HTTP mode and the local load balancer."""
    from benchmarks.harness import alone, burst
    from local import running

    env = jobs.environment(part, OMP_NUM_THREADS="1") if part.tiny else jobs.environment(part)
    begin = time.perf_counter()
    with running(part.worker, mode="http", env=env) as where:
        part.row("seconds from process start to ready", time.perf_counter() - begin)
        burst(where, requests(part, TINY_SIZES[-1], start=1000))
        part.row(
            "a lone job, ms", 1000 * statistics.median(alone(where, requests(part, 1)[0]) for _ in range(3))
        )
        for number in TINY_SIZES if part.tiny else SIZES:
            burst(where, requests(part, number, start=1000))
            rate = burst(where, requests(part, number)).rate
            part.row(f"{number} jobs at once, jobs/s", rate)
            if ours := part.known(f"{part.worker} {number}"):
                part.row(f"{number} jobs at once, by the handler alone", rate / ours)


def naive(part: Part) -> None:
    """The naive handler, which takes one job at a time: its rate is the same however many wait."""
    from benchmarks.harness import HERE

    if importlib.util.find_spec("runpod") is None:  # the handler itself does not use the SDK
        sys.modules["runpod"] = ModuleType("runpod")
    os.environ.update({**jobs.environment(part), "BEAMS": "1"})
    spec = importlib.util.spec_from_file_location("naive_handler", HERE / "naive" / f"{part.worker}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = requests(part, 2 if part.tiny else 5)
    module.handler({"input": values[0]})
    begin = time.perf_counter()
    for value in values[1:]:
        module.handler({"input": value})
    rate = (len(values) - 1) / (time.perf_counter() - begin)
    part.row("jobs/s, one after another", rate)
    number = TINY_SIZES[-1] if part.tiny else 32
    if ours := part.known(f"{part.worker} {number}"):
        name = f"this worker with {number} jobs at once, times naive"
        part.row(name, ours / rate) if part.tiny else part.at_least(name, ours / rate, 10)


def profile(part: Part) -> None:
    """Where the time of a lone job and of many goes: kernels, launches, and gaps while the device waits."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    worker = jobs.load(part)
    gpu = part.device.type == "cuda"
    for number in (1, TINY_SIZES[-1] if part.tiny else 32):
        asyncio.run(measured(worker, part, number))
        activities = [ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profiler:
            took, _ = asyncio.run(jobs.together(worker, requests(part, number)))
        kernels = [
            event for event in profiler.events() or [] if not gpu or event.device_type == DeviceType.CUDA
        ]
        times: dict[str, float] = {}
        for event in kernels:
            times[event.name] = times.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e6
        part.row(f"{number} jobs at once: kernels", len(kernels))
        part.row(f"{number} jobs at once: share of the time that kernels run", sum(times.values()) / took)
        for name, spent in sorted(times.items(), key=lambda item: -item[1])[:4]:
            part.row(f"{number} jobs at once: {name[:60]}, share of the time", spent / took)
