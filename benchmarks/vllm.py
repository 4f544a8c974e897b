"""workers/vllm beside the naive handler and beside its own engine, asked without it: what the hop costs.

Everything is in one run, with the real vLLM on the CPU and a random Llama of half a million parameters: the
shorter its steps, the more weighs what the worker adds to them. One of 50 million, whose steps last as long
as a large model's on a GPU, shows what is left of it there. "Bare" is the very engine of the running worker,
over HTTP.

Streams go to an endpoint that takes 100 ms for each post, as RunPod's does (reported by users).
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from benchmarks.harness import HERE, _session, burst, machine, output, table, texts, write
from benchmarks.huggingface import make_larger
from local import Platform, running
from tools import vllm_cpu
from tools.models import local_env, made

JOBS, TOKENS, ROUNDS = 16, 64, 3
STREAMED, POST_S = 200, 0.1
LONE = 40
# Processes that wait for each other's threads measure what else runs on the machine.
THREADS = {"OMP_NUM_THREADS": "1"}


# ---- an endpoint for streams that takes its time -------------------------------------------------------


class SlowEndpoint:
    """Takes what workers stream, `delay` seconds for each post.

    posts: job -> (when it was answered, its text) of each post.
    """

    def __init__(self) -> None:
        self.delay = POST_S
        self.posts: dict[str, list[tuple[float, str]]] = {}
        self.url = ""

    async def take(self, request: web.Request) -> web.Response:
        text = await request.text()
        await asyncio.sleep(self.delay)
        self.posts.setdefault(request.match_info["job"], []).append((time.monotonic(), text))
        return web.json_response({})


@contextmanager
def slow_endpoint() -> Iterator[SlowEndpoint]:
    endpoint = SlowEndpoint()
    loop = asyncio.new_event_loop()
    app = web.Application(client_max_size=10**8)
    app.router.add_post("/stream/{job}", endpoint.take)
    runner = web.AppRunner(app, access_log=None)

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        endpoint.url = f"http://127.0.0.1:{runner.addresses[0][1]}"

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield endpoint
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


# ---- the engine, asked without the worker --------------------------------------------------------------


def asked(prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, **more}


def together(one: Callable[[aiohttp.ClientSession, int], Awaitable[Any]], count: int) -> list[Any]:
    """The results of `count` calls at once, over one session."""

    async def everything() -> list[Any]:
        async with _session() as session:
            return list(await asyncio.gather(*(one(session, number) for number in range(count))))

    return asyncio.run(everything())


def bare_burst(engine: str, bodies: list[dict[str, Any]]) -> float:
    async def one(session: aiohttp.ClientSession, number: int) -> None:
        async with session.post(f"{engine}/v1/completions", json=bodies[number]) as response:
            assert response.status == 200, await response.text()
            await response.read()

    begin = time.perf_counter()
    together(one, len(bodies))
    return time.perf_counter() - begin


def bare_streams(engine: str, bodies: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Seconds to the first and to the last token of each stream, when all begin at once."""

    async def one(session: aiohttp.ClientSession, number: int) -> tuple[float, float]:
        begin, first, last = time.monotonic(), 0.0, 0.0
        async with session.post(f"{engine}/v1/completions", json=bodies[number]) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    last = time.monotonic() - begin
                    first = first or last
        return first, last

    return together(one, len(bodies))


def bare_lone(engine: str, body: dict[str, Any]) -> list[float]:
    """Seconds of single requests, over a connection that is open already."""

    async def one(session: aiohttp.ClientSession, _: int) -> list[float]:
        took = []
        for _ in range(LONE + 1):
            begin = time.perf_counter()
            async with session.post(f"{engine}/v1/completions", json=body) as response:
                await response.read()
            took.append(time.perf_counter() - begin)
            await asyncio.sleep(0.05)  # as far apart as jobs are
        return took[1:]

    found: list[float] = together(one, 1)[0]
    return found


# ---- the worker ----------------------------------------------------------------------------------------


class Stamps:
    """What the stamped worker noted of each job."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def of(self, job: str) -> dict[str, float]:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for line in self.file.read_text().splitlines():
                if line.endswith("}") and (found := json.loads(line))["id"] == job:
                    return found  # type: ignore[no-any-return]
            time.sleep(0.01)
        raise RuntimeError(f"{job} has left no note")


def run_jobs(where: Platform, bodies: list[dict[str, Any]]) -> list[str]:
    """Job ids, each job at its end."""

    async def one(session: aiohttp.ClientSession, number: int) -> str:
        url = f"{where.endpoint_url}/runsync?wait=300000"
        async with session.post(url, json={"input": bodies[number]}) as response:
            body = await response.read()
        output(body)
        return str(json.loads(body)["id"])

    return together(one, len(bodies))


def streams(
    where: Platform, endpoint: SlowEndpoint, stamps: Stamps, bodies: list[dict[str, Any]]
) -> list[tuple[float, float, int]]:
    """Seconds to when the first and the last token's post was answered, and the number of posts."""
    found = []
    for job in run_jobs(where, bodies):
        begun, posts = stamps.of(job)["begun"], endpoint.posts[job]
        tokens = [when for when, text in posts if '\\"text\\":' in text]
        found.append((tokens[0] - begun, tokens[-1] - begun, len(posts)))
    return found


def lone_jobs(where: Platform, stamps: Stamps, body: dict[str, Any]) -> list[float]:
    """Seconds until the handler has the answers of single jobs."""
    jobs = [run_jobs(where, [body])[0] for _ in range(LONE + 1)]
    return [(note := stamps.of(job))["first"] - note["begun"] for job in jobs[1:]]


def engine_of(where: Platform) -> str:
    found = re.findall(r"vllm: process \d+ at (http://[\d.:]+)", "\n".join(where.workers[0].lines))
    return str(found[-1])


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def bursts(where: Platform, engine: str, bodies: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of all jobs at once, through the worker and on its bare engine, by turns."""
    burst(where, bodies)
    bare_burst(engine, bodies)
    pairs = [(burst(where, bodies).seconds, bare_burst(engine, bodies)) for _ in range(ROUNDS)]
    return median(pair[0] for pair in pairs), median(pair[1] for pair in pairs)


def medians(names: Sequence[str], runs: Sequence[Sequence[float]]) -> dict[str, float]:
    return {name: median(run[number] for run in runs) for number, name in enumerate(names)}


def measure() -> dict[str, Any]:
    prompts = texts(JOBS, 4, 16)
    crowd = [asked(prompt, TOKENS) for prompt in prompts]
    streamed = [asked(prompt, STREAMED, stream=True) for prompt in prompts]
    env = {**local_env("vllm"), **THREADS}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, slow_endpoint() as endpoint:
        stamps = Stamps(Path(folder, "stamps"))
        stamps.file.touch()
        ours = {
            **env,
            "STAMPS": str(stamps.file),
            "RUNPOD_WEBHOOK_POST_STREAM": f"{endpoint.url}/stream/$ID?slow",
        }
        print("  this worker", flush=True)
        with running(HERE / "bare" / "vllm_stamped.py", env=ours, ready_timeout=600) as where:
            engine = engine_of(where)
            endpoint.delay = 0
            found["burst"], found["bare burst"] = bursts(where, engine, crowd)
            endpoint.delay = POST_S
            bare_streams(engine, streamed[:1])
            for name, bodies in (("one stream", streamed[:1]), ("sixteen streams", streamed)):
                runs, plain = [], []
                for _ in range(ROUNDS):
                    runs += streams(where, endpoint, stamps, bodies)
                    plain += bare_streams(engine, bodies)
                found[name] = medians(("first", "last", "posts"), runs)
                found[f"bare {name}"] = medians(("first", "last"), plain)
            single = asked(prompts[0], 1)
            found["lone"] = median(lone_jobs(where, stamps, single))
            found["bare lone"] = median(bare_lone(engine, single))
    print("  this worker, 50 million parameters", flush=True)
    larger = {**env, "MODEL_NAME": str(made("benchmark-huggingface", make_larger))}
    with running("vllm", env=larger, ready_timeout=600) as where:
        found["larger burst"], found["bare larger burst"] = bursts(where, engine_of(where), crowd)
    print("  no-op handler", flush=True)
    with running(HERE / "noop.py") as where:
        burst(where, crowd)
        found["no-op burst"] = median(burst(where, crowd).seconds for _ in range(ROUNDS))
    print("  naive", flush=True)
    naive = {
        **env,
        "SDK_PACKAGES": str(Path(aiohttp.__file__).parents[1]),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    script = HERE / "naive" / "vllm_offline.py"
    with running(script, env=naive, python=str(vllm_cpu.PYTHON), ready_timeout=600) as where:
        burst(where, crowd[:1])
        found["naive burst"] = burst(where, crowd).seconds
    return found


def report(found: dict[str, Any], where: dict[str, str]) -> tuple[str, dict[str, Any]]:
    times = found["naive burst"] / found["burst"]
    share = found["bare burst"] / found["burst"]
    net = found["bare burst"] / max(found["burst"] - found["no-op burst"], 1e-3)
    larger = found["bare larger burst"] / found["larger burst"]
    hop = 1000 * (found["lone"] - found["bare lone"])
    verdict = {True: "yes", False: "**no**"}
    goals: list[tuple[str, float, str, bool]] = [
        (f"{JOBS} jobs of {TOKENS} tokens, times the naive handler", times, ">= 10", times >= 10),
        ("the same, of the bare engine's throughput", share, ">= 0.9", share >= 0.9),
        ("the same, less what a no-op handler takes", net, ">= 0.9", net >= 0.9),
        ("with 50 million parameters, nothing taken off", larger, ">= 0.9", larger >= 0.9),
    ]
    for name in ("one stream", "sixteen streams"):
        ours, bare = found[name], found[f"bare {name}"]
        late, first = ours["last"] / bare["last"], 1000 * (ours["first"] - bare["first"])
        goals += [
            (f"{name}: last token, by the bare engine's", late, "<= 1.25", late <= 1.25),
            (f"{name}: first token later than the bare engine's, ms", first, "<= 150", first <= 150),
        ]
    goals.append(("a lone job of one token: more than the bare engine, ms", hop, "<= 5", hop <= 5))
    rows = [
        (f"{JOBS} jobs of {TOKENS} tokens, s", found["naive burst"], found["burst"], found["bare burst"]),
        ("with 50 million parameters, s", "", found["larger burst"], found["bare larger burst"]),
        ("one job of one token, ms", "", 1000 * found["lone"], 1000 * found["bare lone"]),
    ]
    for name in ("one stream", "sixteen streams"):
        for end in ("first", "last"):
            rows.append((f"{name}, {end} token, s", "", found[name][end], found[f"bare {name}"][end]))
        rows.append((f"{name}, posts", "", found[name]["posts"], ""))
    text = f"""# vllm

vLLM on the CPU with a random Llama of half a million parameters in float32, greedy, one thread. The jobs
of {TOKENS} tokens go through `/runsync` of the local platform and the unmodified SDK, medians of {ROUNDS}
rounds. Streams are of {STREAMED} tokens and go to an endpoint that takes {1000 * POST_S:.0f} ms for a post; a
token counts as there when its post is answered. Streams and the lone job are timed from where the SDK calls
the handler: before that, it lets a job wait for up to 100 ms, whatever the handler. The bare engine is the
worker's own, asked over HTTP without it.
Through the same platform and SDK, {JOBS} jobs of a handler that does nothing take
{found["no-op burst"]:.2f} s: the SDK looks for jobs ten times a second, and no worker can be without that.
Written by `python -m benchmarks vllm`.

{table(["", "measured", "aim", "reached"], [(*goal[:3], verdict[bool(goal[3])]) for goal in goals])}

{table(["", "naive handler", "this worker", "bare engine"], rows)}

{table(["machine", ""], list(where.items()))}

Not measured: a GPU, for want of one.
"""
    return text, {"machine": where, **found, "goals": [list(goal) for goal in goals]}


def versions() -> dict[str, str]:
    """Of the engine's environment, which is not this one."""
    script = "import importlib.metadata as m; print(m.version('vllm-cpu'), m.version('torch'))"
    shown = subprocess.run(
        [str(vllm_cpu.PYTHON), "-c", script], capture_output=True, text=True, check=True
    ).stdout
    return dict(zip(("vllm-cpu", "torch"), shown.split(), strict=True))


def main() -> None:
    if reason := vllm_cpu.missing():
        sys.exit(f"No vLLM on this machine: {reason}.")
    where = {**machine("runpod", "aiohttp"), **versions()}
    write("vllm", *report(measure(), where))


if __name__ == "__main__":
    main()
