"""A small inference server for the tests of serving.engine_server: real sockets, real processes, no model.

python engine.py PORT [FLAG ...]

--child         starts a process of its own, which starts another in a group of its own, as TGI's shards are
--deaf          ignores SIGTERM, and so do its children
--says TEXT     writes it and exits with status 3, once the imports of a real engine would be over
--silent        never answers its health
POST /echo      the body, with the connection's port and the process id
POST /wait      answers after the body's `seconds`; GET /metrics counts those that wait
POST /stream    `count` events, `seconds` apart; `then`: cut, or the last events (without it: [DONE])
POST /refuse    `body` with `status`
POST /drop      closes the connection without an answer, the first time
POST /sick      what vLLM does when its core has died
POST /die       kills this process at once
POST /hang      stops answering anything, this process and all its connections
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from aiohttp import web

port, flags = int(sys.argv[1]), sys.argv[2:]
waiting = 0
healthy = 200


async def echo(request: web.Request) -> web.Response:
    return web.json_response(
        {"got": await request.json(), "pid": os.getpid(), "peer": str(request.transport)}
    )


async def wait(request: web.Request) -> web.Response:
    global waiting
    waiting += 1
    try:
        await asyncio.sleep((await request.json())["seconds"])
        return web.json_response({"waited": True})
    finally:
        waiting -= 1


async def stream(request: web.Request) -> web.StreamResponse:
    global waiting
    asked = await request.json()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    waiting += 1
    try:
        for number in range(asked["count"]):
            event = json.dumps({"n": number, "text": "\U0001f33f"}, ensure_ascii=False)
            text = f"data: {event}\n\n".encode()  # cut within the character, below
            await response.write(text[:-6])
            await asyncio.sleep(asked.get("seconds", 0))
            await response.write(text[-6:])
        if asked.get("then") == "cut":
            await response.write(b'data: {"n"')
            assert request.transport is not None
            request.transport.abort()
            return response
        for event in asked.get("then", ["data: [DONE]"]):
            await response.write(f"{event}\n\n".encode())
        return response
    finally:
        waiting -= 1


async def refuse(request: web.Request) -> web.Response:
    asked = await request.json()
    if isinstance(asked["body"], str):
        return web.Response(status=asked["status"], text=asked["body"])
    return web.json_response(asked["body"], status=asked["status"])


async def drop(request: web.Request) -> web.Response:
    """Closes a connection that has served before, without a word, as a server's keep-alive limit does."""
    global dropped
    dropped += 1
    assert request.transport is not None
    if dropped == 1:
        request.transport.abort()
    return web.json_response({"tries": dropped})


dropped = 0


async def die(_: web.Request) -> web.Response:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


async def hang(_: web.Request) -> web.Response:
    time.sleep(3600)  # noqa: ASYNC251 (that is the point)
    raise AssertionError


async def health(_: web.Request) -> web.Response:
    return web.Response(status=healthy)


async def sick(_: web.Request) -> web.Response:
    """What vLLM does when its core has died: 500s, a health of 503, and an exit soon after, with status 0."""
    global healthy
    healthy = 503
    asyncio.get_running_loop().call_later(0.5, os._exit, 0)
    return web.json_response(
        {"error": {"message": "EngineCore died", "type": "InternalServerError"}}, status=500
    )


async def metrics(_: web.Request) -> web.Response:
    return web.Response(text=f"waiting {waiting}\n")


def child(depth: int) -> None:
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN);" if "--deaf" in flags else ""
    nested = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'], process_group=0);"
    code = f"import signal, subprocess, sys, time; {deaf} {nested if depth else ''} time.sleep(3600)"
    subprocess.Popen([sys.executable, "-c", code])


if __name__ == "__main__":
    if "--deaf" in flags:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "--child" in flags:
        child(1)
    if "--says" in flags:
        print(flags[flags.index("--says") + 1], file=sys.stderr, flush=True)
        sys.exit(3)
    print(f"starting with token {os.environ.get('HF_TOKEN')}", flush=True)
    app = web.Application(client_max_size=2**26)
    handlers: dict[str, Any] = {
        "echo": echo, "wait": wait, "stream": stream, "refuse": refuse, "drop": drop,
        "die": die, "hang": hang, "sick": sick,
    }  # fmt: skip
    app.router.add_routes([web.post(f"/{name}", handler) for name, handler in handlers.items()])
    if "--silent" not in flags:
        app.router.add_get("/health", health)
    app.router.add_get("/metrics", metrics)
    web.run_app(
        app,
        host="127.0.0.1",
        port=port,
        print=None,
        handler_cancellation=True,
        handle_signals="--deaf" not in flags,
    )
