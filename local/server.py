"""The platform's HTTP: what the SDK in a worker speaks, and what RunPod's clients speak.

Where RunPod documents nothing, this does what people report of the live platform ("observed"), and where
nobody does, an assumption is made; both are noted where they apply.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from local.bodies import json_response
from local.client_api import ClientApi
from local.fleet import Fleet
from local.jobs import Refused
from local.queue import Queue
from local.worker_api import WorkerApi

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(queue: Queue, fleet: Fleet, *, endpoint_id: str, require_key: bool) -> web.Application:
    """All routes of one endpoint, under `/v2/<endpoint_id>`."""

    def public(handler: Handler) -> Handler:
        """Clients need a key, as on RunPod; any will do, with or without "Bearer"."""

        async def checked(request: web.Request) -> web.StreamResponse:
            if require_key and not request.headers.get("Authorization", "").strip():
                raise Refused("unauthorized", 401)
            return await handler(request)

        return checked

    workers, clients = WorkerApi(queue, fleet), ClientApi(queue, fleet)
    app = web.Application(middlewares=[_answer_refused])
    routes: dict[str, Handler] = {
        "GET /job-take/{worker}": workers.take,
        "GET /job-take-batch/{worker}": workers.take_batch,
        "GET /job-stop/{worker}": workers.stop,
        "GET /ping/{worker}": workers.ping,
        "POST /job-stream/{worker}/{job}": workers.stream,
        "POST /job-done/{worker}/{job}": workers.done,
        "POST /run": public(clients.run),
        "POST /runsync": public(clients.runsync),
        "* /status/{job}": public(clients.status),
        "* /stream/{job}": public(clients.stream),
        "* /cancel/{job}": public(clients.cancel),
        "POST /retry/{job}": public(clients.retry),
        "POST /purge-queue": public(clients.purge),
        "GET /health": public(clients.health),
        "* /openai/{route:v1/.+}": public(clients.openai),
    }
    for route, handler in routes.items():
        methods, path = route.split()
        for method in ("GET", "POST") if methods == "*" else (methods,):
            app.router.add_route(method, f"/v2/{endpoint_id}{path}", handler)
    return app


@web.middleware
async def _answer_refused(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Refused as refused:
        return json_response({"error": str(refused)}, refused.status)
