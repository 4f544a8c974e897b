"""As much of `vllm serve` as the failures of workers/vllm need, in a second instead of a minute.

Prompts are orders: `wait SECONDS`, `hang`, `fail STATUS`; anything else is answered with itself, and each is
printed. Environment:
FAKE_SAYS is written before an exit with status 1, FAKE_SAYS_ONCE (FILE:TEXT) only where FILE is missing;
with FAKE_DIES=1 at the first request.
Its processes are the server and one that would hold a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from aiohttp import web

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--port", type=int)
options, rest = parser.parse_known_args()


DIES = "FAKE_DIES" in os.environ
says = ""


async def obey(prompt: str) -> None:
    print(f"received {prompt[:80]}", flush=True)
    order, _, value = prompt.partition(" ")
    if order == "wait":
        try:
            await asyncio.sleep(float(value))
        except asyncio.CancelledError:
            print("dropped", flush=True)
            raise
    if order == "hang":
        time.sleep(3600)  # noqa: ASYNC251 (that is the point)
    if says and DIES:
        print(says, flush=True)
        os._exit(1)


async def completions(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    name = f"cmpl-{request.headers['X-Request-Id']}"
    if not isinstance(body.get("prompt"), str):
        error = {
            "message": "prompt: a text is needed",
            "type": "BadRequestError",
            "param": "prompt",
            "code": 400,
        }
        return web.json_response({"error": error}, status=400)
    if body["prompt"].startswith("fail"):
        status = int(body["prompt"][5:])
        error = {"message": "as asked", "type": "AsAskedError", "param": "prompt", "code": status}
        return web.json_response({"error": error}, status=status)
    choice = {"index": 0, "text": body["prompt"], "finish_reason": "stop"}
    answer = {"id": name, "object": "text_completion", "created": 1, "model": "model", "choices": [choice]}
    answer["argv"] = rest
    if not body.get("stream"):
        await obey(body["prompt"])
        return web.json_response(answer)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(f"data: {json.dumps(answer)}\n\n".encode())
    await obey(body["prompt"])
    await response.write(b"data: [DONE]\n\n")
    return response


async def models(_: web.Request) -> web.Response:
    model = {"id": "model", "object": "model", "created": 1, "owned_by": "vllm"}
    return web.json_response({"object": "list", "data": [model]})


async def openapi(_: web.Request) -> web.Response:
    return web.json_response({"paths": {"/v1/completions": {}}})


async def health(_: web.Request) -> web.Response:
    return web.Response()


async def metrics(_: web.Request) -> web.Response:
    return web.Response(text='vllm:cache_config_info{engine="0",kv_cache_max_concurrency="3.5"} 1.0\n')


if __name__ == "__main__":
    file, _, once = os.environ.get("FAKE_SAYS_ONCE", "").partition(":")
    says = os.environ.get("FAKE_SAYS") or (once if file and not Path(file).exists() else "")
    if file:
        Path(file).touch()
    if says and not DIES:
        sys.exit(says)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/completions", completions)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/openapi.json", openapi)
    app.router.add_get("/health", health)
    app.router.add_get("/metrics", metrics)
    web.run_app(app, host="127.0.0.1", port=options.port, print=None, handler_cancellation=True)
