"""workers/vllm in HTTP mode beside its own engine, asked without it: what the proxy costs.

As in `benchmarks.vllm`: the real vLLM on the CPU, a model whose tokens take as long as a large one's on a
GPU, and the hardest case. Engine, proxy and client share the machine's cores, so the CPU seconds of each are
counted too: they depend less on what else runs than seconds of the clock do.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import aiohttp
import psutil

from benchmarks.harness import machine, table, texts, write
from benchmarks.vllm import ENV, asked, make_paced, versions
from local import running
from local.load_balancer import LoadBalancer
from tools.models import local_env, made, vllm_cpu

STREAMS, TOKENS, ROUNDS, LONE = (16, 64), 200, 5, 20
PROCESSES = ("engine", "proxy", "client")


class Worker:
    """A worker that runs. urls: its own and its engine's."""

    def __init__(self, endpoint: LoadBalancer) -> None:
        (process,) = endpoint.workers
        log = "\n".join(process.lines)
        engine, server = re.findall(r"vllm: process (\d+) at (http://[\d.:]+)", log)[-1]
        self.urls = {"proxied": endpoint.worker_url(process), "bare": server}
        self._proxy, self._engine = psutil.Process(process.pid), psutil.Process(int(engine))

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far of the engine's processes, the proxy's and this one."""
        engine = [self._engine, *self._engine.children(recursive=True)]
        return {
            "engine": sum(map(_seconds, engine)),
            "proxy": _seconds(self._proxy),
            "client": time.process_time(),
        }


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def worker(env: dict[str, str]) -> Iterator[Worker]:
    with running("vllm", mode="http", env=env, ready_timeout=600) as endpoint:
        assert isinstance(endpoint, LoadBalancer)
        yield Worker(endpoint)


def ask(url: str, prompts: list[str], tokens: int) -> list[tuple[float, float]]:
    """Seconds to the first and the last token of each stream; all streams begin at once."""

    async def one(session: aiohttp.ClientSession, prompt: str) -> tuple[float, float]:
        begin, first, last = time.monotonic(), 0.0, 0.0
        async with session.post(f"{url}/v1/completions", json=asked(prompt, tokens, True)) as response:
            assert response.status == 200, await response.text()
            async for data in response.content.iter_any():
                if b"data: {" in data:
                    last = time.monotonic() - begin
                    first = first or last
        return first, last

    async def everything() -> list[tuple[float, float]]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            async with session.get(f"{url}/v1/models") as response:  # the connection is open before the first
                await response.read()
            return list(await asyncio.gather(*(one(session, prompt) for prompt in prompts)))

    return asyncio.run(everything())


def one_round(worker: Worker, way: str, count: int) -> dict[str, float]:
    """Tokens/s and the median first token in ms of `count` streams; CPU seconds by 1,000 tokens."""
    before = worker.cpu()
    found = ask(worker.urls[way], texts(count, 4, 16), TOKENS)
    after = worker.cpu()
    tokens = count * TOKENS
    cpu = {name: 1000 * (after[name] - before[name]) / tokens for name in PROCESSES}
    rate = tokens / max(last for _, last in found)
    return {"rate": rate, "first": 1000 * median(first for first, _ in found), **cpu}


def measure_model(env: dict[str, str]) -> dict[str, Any]:
    """Rounds of the proxy and of the bare engine by turns."""
    found: dict[str, Any] = {}
    with worker(env) as running_worker:
        for count in STREAMS:
            for way in ("bare", "proxied"):
                one_round(running_worker, way, count)
            rounds: dict[str, list[dict[str, float]]] = {"bare": [], "proxied": []}
            for number in range(ROUNDS):
                for way in sorted(rounds, reverse=bool(number % 2)):
                    rounds[way].append(one_round(running_worker, way, count))
            found[str(count)] = {
                way: {name: median(each[name] for each in made) for name in made[0]}
                for way, made in rounds.items()
            }
            found[str(count)]["rates"] = sorted(
                proxied["rate"] / bare["rate"]
                for bare, proxied in zip(rounds["bare"], rounds["proxied"], strict=True)
            )
        lone: dict[str, list[float]] = {"bare": [], "proxied": []}
        for _ in range(LONE):
            for way, firsts in lone.items():
                firsts.append(1000 * ask(running_worker.urls[way], texts(1, 4, 16), 2)[0][0])
        found["lone"] = {way: median(firsts) for way, firsts in lone.items()}
    return found


def measure() -> dict[str, Any]:
    tiny = {**local_env("vllm"), **ENV, "MAX_CONCURRENCY": str(max(STREAMS))}
    paced = {**tiny, "MODEL_NAME": str(made("benchmark-vllm", make_paced))}
    found = {}
    for name, env in (("paced", paced), ("tiny", tiny)):
        print(f"  {name} model", flush=True)
        found[name] = measure_model(env)
    return found


def rows(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    made: list[tuple[Any, ...]] = []
    for count in map(str, STREAMS):
        bare, proxied = found[count]["bare"], found[count]["proxied"]
        low, *_, high = found[count]["rates"]
        made += [
            (f"{count} streams, tokens/s", bare["rate"], proxied["rate"]),
            (f"{count} streams, proxied by bare: median and range of {ROUNDS} pairs", "",
             f"{median(found[count]['rates']):.2f} ({low:.2f} to {high:.2f})"),
            (f"{count} streams, first token, ms", bare["first"], proxied["first"]),
            *((f"{count} streams, CPU s of the {name} by 1,000 tokens", bare[name], proxied[name])
              for name in PROCESSES),
        ]  # fmt: skip
    return [*made, ("one stream, first token, ms", found["lone"]["bare"], found["lone"]["proxied"])]


def report(found: dict[str, Any], where: dict[str, str]) -> tuple[str, dict[str, Any]]:
    head = ("", "bare server", "HTTP mode")
    text = f"""# vllm in HTTP mode

{TOKENS} tokens a stream; all streams of a round begin at once, rounds of the bare server and of the proxy by
turns, medians of {ROUNDS}. Engine, proxy and client share the cores of the machine. Written by
`python -m benchmarks vllm_http`.

## The paced model: 19 million parameters

{table(head, rows(found["paced"]))}

## The tiny model: half a million parameters, the hardest case

{table(head, rows(found["tiny"]))}

{table(["machine", ""], list(where.items()))}
"""
    return text, {"machine": where, **found}


def main() -> None:
    if reason := vllm_cpu.missing():
        sys.exit(f"No vLLM on this machine: {reason}.")
    where = {**machine("aiohttp", "uvicorn", "uvloop"), **versions()}
    write("vllm_http", *report(measure(), where))


if __name__ == "__main__":
    main()
