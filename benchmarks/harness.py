"""Ask a platform, count, and write what came out.

Everything goes through the public API of the local platform, one `/runsync` a job, with the platform and the
client in the benchmark's own process: what they take is taken from the worker on a small machine, and the
no-op handler shows how much that is.
"""

from __future__ import annotations

import asyncio
import datetime
import importlib.metadata
import json
import os
import platform as python_platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from local import Platform, running

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "benchmarks"

WORDS = """
the of and to in is was for that it with as his on be at by had not are but from or have an they
which one you were her all she there would their we him been has when who will more no if out so
said what up its about into than them can only other new some could time these two may then do first
any my now such like our over man me even most made after also did many before must through back
years where much your way well down should because each just those people how too little state good
very make world still own see men work long get here between both life being under never day same
another know while last might us great old year off come since against go came right used take three
house water river stone paper window garden music
"""


def texts(count: int, low: int, high: int, seed: int = 0) -> list[str]:
    """`count` texts of `low` to `high` common English words, the same in every run."""
    rng, words = random.Random(seed), WORDS.split()
    return [" ".join(rng.choices(words, k=rng.randint(low, high))) for _ in range(count)]


@dataclass(frozen=True)
class Burst:
    """What came of jobs that were all sent at once.

    seconds: from the first request to the last answer. latencies: of each job, in seconds.
    """

    seconds: float
    latencies: list[float]
    outputs: list[Any]

    @property
    def rate(self) -> float:
        """Jobs per second."""
        return len(self.latencies) / self.seconds

    def summary(self) -> dict[str, float]:
        low, mid, high = percentiles(self.latencies)
        return {"jobs": len(self.latencies), "per_second": self.rate, "p50": low, "p95": mid, "max": high}


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """p50, p95 and the largest."""
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return cuts[9], cuts[18], max(seconds)


async def _ask(session: aiohttp.ClientSession, where: Platform, value: Any) -> tuple[float, bytes]:
    begin = time.perf_counter()
    async with session.post(f"{where.endpoint_url}/runsync?wait=300000", json={"input": value}) as response:
        body = await response.read()
    return time.perf_counter() - begin, body


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        headers={"Authorization": "Bearer local"},
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=600),
    )


def output(body: bytes) -> Any:
    """A job's output. Raises RuntimeError when it did not complete."""
    answer = json.loads(body)
    if answer.get("status") != "COMPLETED":
        raise RuntimeError(f"A job ended as {answer.get('status')}: {answer.get('error')}")
    return answer["output"]


def ask(where: Platform, value: Any) -> bytes:
    """The body of one job's answer."""

    async def once() -> bytes:
        async with _session() as session:
            return (await _ask(session, where, value))[1]

    return asyncio.run(once())


def burst(where: Platform, values: Sequence[Any]) -> Burst:
    """Send all of `values` as jobs at once. Raises RuntimeError when one does not complete."""

    async def everything() -> tuple[float, list[tuple[float, bytes]]]:
        async with _session() as session:
            begin = time.perf_counter()
            answers = await asyncio.gather(*(_ask(session, where, value) for value in values))
            return time.perf_counter() - begin, answers

    seconds, answers = asyncio.run(everything())
    return Burst(seconds, [took for took, _ in answers], [output(body) for _, body in answers])


def alone(where: Platform, value: Any) -> float:
    """Seconds of one job on an idle worker, over a connection that is open already."""

    async def once() -> float:
        async with _session() as session:
            async with session.get(f"{where.endpoint_url}/health") as response:
                await response.read()
            took, body = await _ask(session, where, value)
            output(body)
            return took

    return asyncio.run(once())


class Bare:
    """A script of bare/ that runs: the model without handler, SDK and platform."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, wanted: Any) -> tuple[float, list[Any]]:
        """The seconds that the script took for `wanted`, which is sent as a line of JSON, and its answers."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer["seconds"], answer["answers"]


@contextmanager
def bare(script: str, argument: str, env: Mapping[str, str]) -> Iterator[Bare]:
    """bare/<script>.py with one argument, the model or a worker's name."""
    with subprocess.Popen(
        [sys.executable, str(HERE / "bare" / f"{script}.py"), argument],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        yield Bare(process)


def worker_start(worker: str | Path, env: Mapping[str, str]) -> tuple[float, dict[str, float]]:
    """Seconds from the worker's process start to its first request for a job, and its logged phases."""
    with running(worker, env=env) as where:
        process = where.workers[0]
        assert process.ready_after is not None
        return process.ready_after, dict(process.phases)


def script_start(command: Sequence[str], env: Mapping[str, str]) -> float:
    """Seconds from a Python script's process start to the line `ready`."""
    begin = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "ready":
                took = time.perf_counter() - begin
                process.kill()
                return took
    raise RuntimeError(f"{command[0]} ended without having been ready.")


def machine(*packages: str) -> dict[str, str]:
    """What the numbers were measured on, and with which versions; how busy it was already."""
    model = "unknown"
    if (cpuinfo := Path("/proc/cpuinfo")).exists() and (
        found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
    ):
        model = found[1]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    described = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{model}, {os.cpu_count()} cores",
        "memory": f"{memory:.1f} GiB",
        "system": f"{python_platform.system()} {python_platform.machine()}",
        "python": python_platform.python_version(),
        "load average before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
    return described | {name: importlib.metadata.version(name) for name in packages}


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table; floats with three significant digits."""

    def cell(value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

    lines = [list(head), ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(name: str, text: str, numbers: Mapping[str, Any]) -> None:
    """results/<name>.md and .json; prints the text."""
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"\n{text}\nWritten to {folder.relative_to(ROOT)}/{name}.md and .json")
