"""A worker of a load-balancing endpoint that does what the path says; it writes to NOTES what happens."""

import asyncio
import os

from aiohttp import web


def note(text):
    with open(os.environ["NOTES"], "a") as notes:
        notes.write(f"{text} {os.getpid()}\n")


async def ping(request):
    return web.Response(status=health[0])


async def get_ill(request):
    health[0] = int(request.query["status"])
    return web.Response()


async def echo(request):
    sent = {"method": request.method, "path": request.raw_path, "bytes": len(await request.read())}
    headers = [(name.lower(), value) for name, value in request.headers.items()]
    answer = web.json_response(sent | {"headers": headers, "pid": os.getpid()}, status=418)
    answer.headers.extend([("X-Twice", "1"), ("X-Twice", "2")])
    return answer


async def parts(request):
    """A part at once, and another after `release`."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b"data: 1\n\n")
    await hold(request)
    await response.write(b"data: 2\n\n")
    return response


async def hold(request):
    note("held")
    try:
        await released.wait()
    except asyncio.CancelledError:
        note("hung up")
        raise
    return web.json_response({"pid": os.getpid()})


async def release(request):
    released.set()
    return web.Response()


async def large(request):
    response = web.Response(body=bytes(int(request.query["bytes"])))
    if "chunked" in request.query:
        response.enable_chunked_encoding()
    return response


if __name__ == "__main__":
    health, released = [int(os.environ.get("PING", "200"))], asyncio.Event()
    app = web.Application(client_max_size=2**30)
    for route in (ping, get_ill, parts, hold, release, large):
        app.router.add_get(f"/{route.__name__}", route)
    app.router.add_route("*", "/echo{rest:.*}", echo)
    web.run_app(app, host="127.0.0.1", port=int(os.environ["PORT"]), handler_cancellation=True, print=None)
