"""Workers in front of an inference server (vllm, tgi) beside that very server, asked without them.

Streams go to an endpoint that takes 100 ms for each post, as RunPod's does (reported by users).
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from benchmarks.harness import HERE, _session, burst, output, table, texts
from local import Platform, running

JOBS, TOKENS, ROUNDS = 16, 64, 3
STREAMED, POST_S = 200, 0.1
LONE = 40
STREAMS = (("one stream", 1), ("sixteen streams", 16))


@dataclass(frozen=True)
class Kind:
    """How a worker is asked, and its server without it.

    job: the input of a job for a prompt, a number of tokens, and whether it streams. direct: path and body of
    the same request to the server. event: what a line of the server's stream that tells of a token has at its
    start. token: what a post of the worker's stream that has a token matches.
    """

    name: str
    job: Callable[[str, int, bool], dict[str, Any]]
    direct: Callable[[str, int, bool], tuple[str, dict[str, Any]]]
    event: bytes
    token: re.Pattern[str]


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


# ---- the server, asked without the worker --------------------------------------------------------------


def together(one: Callable[[aiohttp.ClientSession, int], Awaitable[Any]], count: int) -> list[Any]:
    """The results of `count` calls at once, over one session."""

    async def everything() -> list[Any]:
        async with _session() as session:
            return list(await asyncio.gather(*(one(session, number) for number in range(count))))

    return asyncio.run(everything())


def bare_burst(server: str, kind: Kind, prompts: Sequence[str]) -> float:
    async def one(session: aiohttp.ClientSession, number: int) -> None:
        path, body = kind.direct(prompts[number], TOKENS, False)
        async with session.post(server + path, json=body) as response:
            assert response.status == 200, await response.text()
            await response.read()

    begin = time.perf_counter()
    together(one, len(prompts))
    return time.perf_counter() - begin


def bare_streams(server: str, kind: Kind, prompts: Sequence[str]) -> list[tuple[float, float]]:
    """Seconds to the first and to the last token of each stream, when all begin at once."""

    async def one(session: aiohttp.ClientSession, number: int) -> tuple[float, float]:
        path, body = kind.direct(prompts[number], STREAMED, True)
        begin, first, last = time.monotonic(), 0.0, 0.0
        async with session.post(server + path, json=body) as response:
            async for line in response.content:
                if line.startswith(kind.event):
                    last = time.monotonic() - begin
                    first = first or last
        return first, last

    return together(one, len(prompts))


def bare_lone(server: str, kind: Kind, prompt: str) -> list[float]:
    """Seconds of single requests, over a connection that is open already."""

    async def one(session: aiohttp.ClientSession, _: int) -> list[float]:
        took = []
        path, body = kind.direct(prompt, 1, False)
        for _ in range(LONE + 1):
            begin = time.perf_counter()
            async with session.post(server + path, json=body) as response:
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


@dataclass(frozen=True)
class Worker:
    """A worker that runs, stamped, and streams to a slow endpoint."""

    where: Platform
    kind: Kind
    endpoint: SlowEndpoint
    stamps: Stamps

    @property
    def server(self) -> str:
        log = "\n".join(self.where.workers[0].lines)
        return str(re.findall(rf"{self.kind.name}: process \d+ at (http://[\d.:]+)", log)[-1])

    def run(self, inputs: Sequence[dict[str, Any]]) -> list[str]:
        """Job ids, each job at its end."""

        async def one(session: aiohttp.ClientSession, number: int) -> str:
            url = f"{self.where.endpoint_url}/runsync?wait=300000"
            async with session.post(url, json={"input": inputs[number]}) as response:
                body = await response.read()
            output(body)
            return str(json.loads(body)["id"])

        return together(one, len(inputs))

    def streams(self, prompts: Sequence[str]) -> list[tuple[float, float, int]]:
        """Seconds to when the first and the last token's post was answered, and the number of posts."""
        found = []
        for job in self.run([self.kind.job(prompt, STREAMED, True) for prompt in prompts]):
            begun, posts = self.stamps.of(job)["begun"], self.endpoint.posts[job]
            tokens = [when for when, text in posts if self.kind.token.search(text)]
            found.append((tokens[0] - begun, tokens[-1] - begun, len(posts)))
        return found

    def lone(self, prompt: str) -> list[float]:
        """Seconds until the handler has the answers of single jobs."""
        single = self.kind.job(prompt, 1, False)
        jobs = [self.run([single])[0] for _ in range(LONE + 1)]
        return [(note := self.stamps.of(job))["first"] - note["begun"] for job in jobs[1:]]


@contextmanager
def stamped(kind: Kind, env: Mapping[str, str]) -> Iterator[Worker]:
    """workers/<kind.name>, which notes when the SDK calls it and when it answers."""
    with tempfile.TemporaryDirectory() as folder, slow_endpoint() as endpoint:
        stamps = Stamps(Path(folder, "stamps"))
        stamps.file.touch()
        ours = {
            **env,
            "STAMPED": kind.name,
            "STAMPS": str(stamps.file),
            "RUNPOD_WEBHOOK_POST_STREAM": f"{endpoint.url}/stream/$ID?slow",
        }
        with running(HERE / "bare" / "stamped.py", env=ours, ready_timeout=600) as where:
            yield Worker(where, kind, endpoint, stamps)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def measure(kind: Kind, env: Mapping[str, str], prompts: Sequence[str]) -> dict[str, Any]:
    """The worker and its server by turns: jobs at once, streams, single jobs."""
    found: dict[str, Any] = {}
    crowd = [kind.job(prompt, TOKENS, False) for prompt in prompts]
    with stamped(kind, env) as worker:
        server = worker.server
        worker.endpoint.delay = 0
        burst(worker.where, crowd)
        bare_burst(server, kind, prompts)
        pairs = [
            (burst(worker.where, crowd).seconds, bare_burst(server, kind, prompts)) for _ in range(ROUNDS)
        ]
        found["burst"], found["bare burst"] = (median(pair[end] for pair in pairs) for end in (0, 1))
        worker.endpoint.delay = POST_S
        bare_streams(server, kind, prompts[:1])
        for name, count in STREAMS:
            runs: list[tuple[float, float, int]] = []
            plain: list[tuple[float, float]] = []
            for _ in range(ROUNDS):
                runs += worker.streams(prompts[:count])
                plain += bare_streams(server, kind, prompts[:count])
            heads = ("first", "last", "posts")
            found[name] = {head: median(run[at] for run in runs) for at, head in enumerate(heads)}
            found[f"bare {name}"] = {
                head: median(run[at] for run in plain) for at, head in enumerate(heads[:2])
            }
        found["lone"] = median(worker.lone(prompts[0]))
        found["bare lone"] = median(bare_lone(server, kind, prompts[0]))
    found["token"] = found["bare one stream"]["last"] / STREAMED
    return found


def measure_noop(crowd: Sequence[dict[str, Any]]) -> float:
    with running(HERE / "noop.py") as where:
        burst(where, crowd)
        return median(burst(where, crowd).seconds for _ in range(ROUNDS))


def measure_naive(
    script: str, env: Mapping[str, str], crowd: Sequence[dict[str, Any]], python: str | None = None
) -> float:
    options: dict[str, Any] = {"python": python} if python else {}
    with running(HERE / "naive" / script, env=env, ready_timeout=600, **options) as where:
        burst(where, crowd[:1])
        return burst(where, crowd).seconds


# ---- the report ----------------------------------------------------------------------------------------

Goal = tuple[str, float, str, bool]


def goals(found: Mapping[str, Any]) -> list[Goal]:
    share = found["bare burst"] / found["burst"]
    rows: list[Goal] = []
    if "naive burst" in found:
        times = found["naive burst"] / found["burst"]
        rows.append((f"{JOBS} jobs of {TOKENS} tokens, times the naive handler", times, ">= 10", times >= 10))
    rows.append((f"{JOBS} jobs of {TOKENS} tokens, of the bare server's rate", share, ">= 0.9", share >= 0.9))
    for name, _ in STREAMS:
        ours, bare = found[name], found[f"bare {name}"]
        late, first = ours["last"] / bare["last"], 1000 * (ours["first"] - bare["first"])
        rows += [
            (f"{name}: last token, by the bare server's", late, "<= 1.25", late <= 1.25),
            (f"{name}: first token later than the bare server's, ms", first, "<= 150", first <= 150),
        ]
    hop = 1000 * (found["lone"] - found["bare lone"])
    return [*rows, ("a lone job of one token: more than the bare server, ms", hop, "<= 5", hop <= 5)]


def goal_table(rows: Sequence[Goal]) -> str:
    verdict = {True: "yes", False: "**no**"}
    return table(["", "measured", "aim", "reached"], [(*row[:3], verdict[bool(row[3])]) for row in rows])


def time_table(found: Mapping[str, Any]) -> str:
    rows: list[tuple[Any, ...]] = [
        (f"{JOBS} jobs of {TOKENS} tokens, s", found.get("naive burst", ""), found["burst"],
         found["bare burst"]),
        ("one job of one token, ms", "", 1000 * found["lone"], 1000 * found["bare lone"]),
    ]  # fmt: skip
    for name, _ in STREAMS:
        for end in ("first", "last"):
            rows.append((f"{name}, {end} token, s", "", found[name][end], found[f"bare {name}"][end]))
        rows.append((f"{name}, posts", "", found[name]["posts"], ""))
    return table(["", "naive handler", "this worker", "bare server"], rows)


HOW = f"""The jobs of {TOKENS} tokens go through `/runsync` of the local platform and the unmodified SDK,
medians of {ROUNDS} rounds. Streams are of {STREAMED} tokens and go to an endpoint that takes
{1000 * POST_S:.0f} ms for a post; a token counts as there when its post is answered. Streams and the lone job
are timed from where the SDK calls the handler: before that, it lets a job wait for up to 100 ms, whatever the
handler. The bare server is the worker's own, asked over HTTP without it."""


def noop_line(seconds: float) -> str:
    return f"""Through the same platform and SDK, {JOBS} jobs of a handler that does nothing take
{seconds:.2f} s: the SDK looks for jobs ten times a second, and no worker can be without that."""


def prompts() -> list[str]:
    return texts(JOBS, 4, 16)
