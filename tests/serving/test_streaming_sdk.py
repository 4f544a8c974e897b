"""serving.streaming under the unmodified SDK: a worker process, and a platform that takes 100 ms for a post.

Run as a program, this file is that worker. Both processes read the same monotonic clock, so that times taken
in one can be compared with times taken in the other.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from serving.streaming import STREAM_LIMIT, coalesce

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

POST_S = 0.1
TOKEN_S = 0.005
TOKENS = list("Grüße 漢字かな 😀👍🏽 👨‍👩‍👧‍👦 e\u0301 " * 10)[:200]


# ---- the worker ----------------------------------------------------------------------------------------


async def handler(job: dict[str, Any]) -> AsyncIterator[str]:
    async for chunk in coalesce(engine(job["id"], **job["input"])):
        yield chunk


async def engine(job: str, units: list[str], gap_s: float, fails: bool = False) -> AsyncIterator[str]:
    """A unit each `gap_s` by the clock; reports when it starts and when it is closed."""
    started = time.monotonic()
    given = 0
    try:
        for given, unit in enumerate(units, 1):
            await asyncio.sleep(started + given * gap_s - time.monotonic())
            yield unit
        if fails:
            raise RuntimeError("engine died")
    finally:
        report = {"report": job, "started": started, "closed": time.monotonic(), "given": given}
        print(json.dumps(report), flush=True)


# ---- the platform --------------------------------------------------------------------------------------


class Job:
    """What the platform saw of one job; times are of the monotonic clock."""

    def __init__(self, **payload: Any):
        self.id = f"job-{time.monotonic_ns()}"
        self.payload = payload
        self.posts: list[tuple[float, bytes]] = []
        self.posted = asyncio.Event()
        self.done: asyncio.Future[tuple[float, Any]] = asyncio.get_running_loop().create_future()
        self.report: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.stop_after_posts = 0
        self.stopped_at = 0.0

    def text(self) -> str:
        return "".join(json.loads(body)["output"] for _, body in self.posts)


class Platform:
    """The five calls of RunPod's that a worker makes."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.queue: asyncio.Queue[Job] = asyncio.Queue()
        self.stops: asyncio.Queue[Job] = asyncio.Queue()

    def send(self, job: Job) -> Job:
        self.jobs[job.id] = job
        self.queue.put_nowait(job)
        return job

    async def take(self, request: web.Request) -> web.Response:
        try:
            job = await asyncio.wait_for(self.queue.get(), 1)
        except TimeoutError:
            return web.Response(status=204)
        return web.json_response([{"id": job.id, "input": job.payload}])

    async def stop(self, request: web.Request) -> web.Response:
        try:
            job = await asyncio.wait_for(self.stops.get(), 1)
        except TimeoutError:
            return web.Response(status=204)
        job.stopped_at = time.monotonic()
        return web.json_response({"jobsToStop": [job.id]})

    async def stream(self, request: web.Request) -> web.Response:
        arrived = time.monotonic()
        job = self.jobs[request.match_info["job"]]
        job.posts.append((arrived, await request.read()))
        job.posted.set()
        if len(job.posts) == job.stop_after_posts:
            self.stops.put_nowait(job)
            await asyncio.sleep(30 * POST_S)
        await asyncio.sleep(POST_S)
        return web.Response()

    async def finish(self, request: web.Request) -> web.Response:
        self.jobs[request.match_info["job"]].done.set_result((time.monotonic(), await request.json()))
        return web.Response()

    async def read(self, output: asyncio.StreamReader) -> None:
        """Takes the engine's reports out of the worker's output and shows the rest to pytest."""
        async for line in output:
            if line.startswith(b'{"report"'):
                report = json.loads(line)
                self.jobs[report["report"]].report.set_result(report)
            else:
                print(line.decode().rstrip())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def platform() -> AsyncIterator[Platform]:
    platform = Platform()
    app = web.Application(client_max_size=2**24)
    app.router.add_get("/{call:job-take|job-take-batch}/{worker}", platform.take)
    app.router.add_get("/job-stop/{worker}", platform.stop)
    app.router.add_post("/job-stream/{job}", platform.stream)
    app.router.add_post("/job-done/{job}", platform.finish)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    base = f"http://127.0.0.1:{runner.addresses[0][1]}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RUNPOD_POD_ID": "worker",
        "RUNPOD_LOG_LEVEL": "INFO",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
        "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$ID?gpu=none",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$ID?gpu=none",
    }
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        "-u",
        __file__,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=2**24,
    )
    assert worker.stdout is not None
    reading = asyncio.create_task(platform.read(worker.stdout))
    yield platform
    worker.kill()
    await worker.wait()
    await reading
    await runner.cleanup()


# ---- the tests -----------------------------------------------------------------------------------------


async def test_tokens_arrive_about_as_fast_as_they_are_made(platform: Platform) -> None:
    """200 tokens take the engine a second, and one yield a token would take 200 posts of 100 ms: 20 s. What
    comes after the engine's end is the post that is under way and one more, 200 ms; a slow machine has 5 s.
    """
    job = platform.send(Job(units=TOKENS, gap_s=TOKEN_S))
    done_at, result = await asyncio.wait_for(job.done, 60)
    report = await job.report
    assert job.text() == "".join(TOKENS)
    assert "".join(result["output"]) == job.text()
    first = json.loads(job.posts[0][1])["output"]
    print(f"{len(job.posts)} posts, the last {done_at - report['closed']:.3f} s after the engine's end")
    assert done_at - report["closed"] < 5
    assert len(first) < len(TOKENS) / 2, "the first does not wait for the others"


@pytest.mark.parametrize("moment", ["in a post", "waiting for the engine"])
async def test_a_cancelled_job_closes_its_source(platform: Platform, moment: str) -> None:
    """From the answer that names the job until the engine is closed in the worker it takes milliseconds, and
    a slow machine has 2 s. The source would go on for minutes, and the post takes 3 s.
    """
    in_post = moment == "in a post"
    job = Job(units=["x"] * 100_000, gap_s=TOKEN_S if in_post else 0.5)
    job.stop_after_posts = 3 if in_post else 0
    platform.send(job)
    if not in_post:
        await asyncio.wait_for(job.posted.wait(), 60)
        await asyncio.sleep(2 * POST_S)
        platform.stops.put_nowait(job)
    report = await asyncio.wait_for(job.report, 60)
    assert report["given"] < 50_000
    assert not job.done.done(), "the job was over before it was stopped"
    print(f"{report['closed'] - job.stopped_at:.3f} s until the source was closed")
    assert report["closed"] - job.stopped_at < 2


async def test_other_jobs_go_on_while_one_is_stopped(platform: Platform) -> None:
    kept = platform.send(Job(units=TOKENS, gap_s=TOKEN_S))
    stopped = Job(units=["x"] * 100_000, gap_s=TOKEN_S)
    stopped.stop_after_posts = 2
    platform.send(stopped)
    assert (await asyncio.wait_for(stopped.report, 60))["given"] < 50_000
    await asyncio.wait_for(kept.done, 60)
    assert kept.text() == "".join(TOKENS)


async def test_no_post_is_over_a_megabyte(platform: Platform) -> None:
    units = ["a\n" * 300_000, "漢" * 700_000, "😀" * 10]
    job = platform.send(Job(units=units, gap_s=0))
    _, result = await asyncio.wait_for(job.done, 60)
    assert job.text() == "".join(result["output"]) == "".join(units)
    assert len(job.posts) > 3
    assert max(len(body) for _, body in job.posts) <= STREAM_LIMIT


async def test_an_error_comes_after_the_text(platform: Platform) -> None:
    job = platform.send(Job(units=TOKENS[:50], gap_s=TOKEN_S, fails=True))
    _, result = await asyncio.wait_for(job.done, 60)
    assert job.text() == "".join(TOKENS[:50])
    assert "engine died" in result["error"]


if __name__ == "__main__":
    import runpod

    runpod.serverless.start(
        {"handler": handler, "return_aggregate_stream": True, "concurrency_modifier": lambda _: 4}
    )
