"""A worker of a load-balancing endpoint that does what the path says; it writes to NOTES what happens."""

from __future__ import annotations

import asyncio
import os

from aiohttp import web


def note(text: str) -> None:
    with open(os.environ["NOTES"], "a") as notes:
        notes.write(f"{text}\n")


async def ping(request: web.Request) -> web.Response:
    return web.Response(status=int(os.environ.get("PING", "200")))


async def echo(request: web.Request) -> web.Response:
    body = await request.read()
    return web.json_response(
        {"method": request.method, "path": str(request.rel_url), "bytes": len(body), "pid": os.getpid()},
        status=int(request.query.get("status", "200")),
        headers={"X-Sent": request.headers.get("X-Sent", "")},
    )


async def parts(request: web.Request) -> web.StreamResponse:
    """A part at once, and another when the client asks for it at /go, or hangs up."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b"data: 1\n\n")
    try:
        await go.wait()
    except asyncio.CancelledError:
        note("hung up")
        raise
    await response.write(b"data: 2\n\n")
    return response


async def release(request: web.Request) -> web.Response:
    go.set()
    return web.Response()


async def hold(request: web.Request) -> web.Response:
    note(f"held {os.getpid()}")
    await asyncio.sleep(float(request.query["seconds"]))
    return web.json_response({"pid": os.getpid()})


async def large(request: web.Request) -> web.Response:
    return web.Response(body=bytes(int(request.query["bytes"])))


go = asyncio.Event()
app = web.Application(client_max_size=2**30)
app.router.add_get("/ping", ping)
app.router.add_get("/parts", parts)
app.router.add_get("/go", release)
app.router.add_get("/hold", hold)
app.router.add_get("/large", large)
app.router.add_route("*", "/echo", echo)

if __name__ == "__main__":
    web.run_app(app, host="127.0.0.1", port=int(os.environ["PORT"]), handler_cancellation=True, print=None)
