"""A RunPod account on a real socket, checked request by request and answer by answer against RunPod's OpenAPI
document.

What the document does not say is decided by the image's tag: `1.0.0` gets ready, `1.0.0-crash` does not, and
so on (BEHAVIOUR). With `real`, an endpoint starts the real worker under `local`, and jobs go there.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import anyio.to_thread
import uvicorn
from openapi_core import Config, OpenAPI
from openapi_core.testing import MockRequest, MockResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from local import running
from tools.models import local_env

DOCUMENT = Path(__file__).with_name("runpod-rest-v2.openapi.json")
SERVER = "https://api.runpod.io"
KEY = "rpa_a_key_that_is_never_printed"
CONTAINER = ("image", "env", "disk", "args", "ports", "registry", "gpu")
# What workers of a release do, by the end of its tag.
BEHAVIOUR = ("crash", "restart", "never", "throttled", "none", "noimage", "nosecret", "jobfails")
POOLS = {"AMPERE_16": 0.58, "AMPERE_24": 0.68, "ADA_24": 1.10, "AMPERE_48": 1.22, "ADA_80_PRO": 4.18}
# The fields of saveEndpoint's input that RunPod's own SDK (2.0.0rc2) sends.
GRAPHQL = {
    *(
        "id",
        "name",
        "type",
        "template",
        "workersMin",
        "workersMax",
        "idleTimeout",
        "scalerType",
        "scalerValue",
    ),
    *("executionTimeoutMs", "flashBootType", "locations", "gpuIds", "gpuCount", "minCudaVersion"),
    *("allowedCudaVersions", "networkVolumeIds", "modelReferences"),
}
Json = dict[str, Any]
# Gets the method and path of a request; what it returns is the answer. "drop" closes the connection.
Fault = Callable[[str, str], Response | str | None]


def problem(status: int, detail: str, headers: dict[str, str] | None = None, **more: Any) -> Response:
    body = {"title": "Error", "status": status, "detail": detail, **more}
    return JSONResponse(body, status, headers=headers, media_type="application/problem+json")


class Drop(Response):
    """The connection ends in the middle of the answer."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})


@dataclass
class Account:
    """before, after: faults, asked when a request arrives and once it has been carried out. models: by id."""

    url: str = ""
    real: bool = False
    endpoints: dict[str, Json] = field(default_factory=dict)
    templates: dict[str, Json] = field(default_factory=dict)
    models: dict[str, list[str]] = field(default_factory=dict)
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    before: Fault = lambda method, path: None
    after: Fault = lambda method, path: None
    versions: dict[str, int] = field(default_factory=dict)
    looks: dict[str, int] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    starting: set[str] = field(default_factory=set)
    busy: bool = False
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    workers: ExitStack = field(default_factory=ExitStack)

    def named(self, name: str) -> list[Json]:
        return [endpoint for endpoint in self.endpoints.values() if endpoint["name"] == name]

    def sent(self, method: str) -> list[Json]:
        """The bodies of the requests of this method for endpoints, in order."""
        return [
            body for verb, path, body in self.requests if verb == method and path.startswith("/v2/serverless")
        ]

    def behaviour(self, endpoint: Json) -> str:
        tag = endpoint["image"].rpartition("-")[2]
        return tag if tag in BEHAVIOUR else "healthy"

    # ---- endpoints -------------------------------------------------------------------------------------

    def create(self, body: Json, name: str | None = None) -> Json | Response:
        if (
            body["type"] == "QUEUE"
            and body["scaling"]["type"] == "REQUEST_COUNT"
            and "idleTimeout" in body["workers"]
        ):
            return problem(400, "idleTimeout does not apply to queue endpoints that scale by requests.")
        name = name or f"ep{next(self.ids)}"
        gpu = {"minCudaVersion": None, "allowedCudaVersions": [], "count": 1, **body["gpu"]}
        defaults = {"args": "", "disk": 20, "ports": [], "env": {}, "registry": None, "timeout": 300000}
        defaults |= {"dataCenterIds": [], "networkVolumes": [], "flashboot": "OFF"}
        created = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{next(self.ids):06}Z"
        endpoint = {**defaults, **body, "gpu": gpu, "id": name, "createdAt": created}
        endpoint["requestUrls"] = self.start(endpoint) if self.real else self.urls(endpoint)
        self.endpoints[name], self.versions[name], self.looks[name] = endpoint, 1, 0
        return endpoint

    def update(self, name: str, body: Json) -> Json | Response:
        endpoint = self.endpoints[name]
        new = {**endpoint, **body}
        new["workers"] = {**endpoint["workers"], **body.get("workers", {})}
        new["gpu"] = {**endpoint["gpu"], **body.get("gpu", {})}
        if "pools" in body.get("gpu", {}):  # the selection is replaced as a whole
            new["gpu"]["excludedTypes"] = body["gpu"].get("excludedTypes", [])
        if new["gpu"]["minCudaVersion"] and new["gpu"]["allowedCudaVersions"]:
            return problem(400, "minCudaVersion and allowedCudaVersions exclude each other.")
        new["gpu"]["minCudaVersion"] = new["gpu"]["minCudaVersion"] or None
        if new["type"] == "LOAD_BALANCER" and new["scaling"]["type"] != "REQUEST_COUNT":
            return problem(400, "load-balancing endpoints scale by requests.")
        if new["type"] == "QUEUE" and new["scaling"]["type"] == "REQUEST_COUNT":
            if "idleTimeout" in body.get("workers", {}):
                return problem(400, "idleTimeout does not apply to queue endpoints that scale by requests.")
            new["workers"].pop("idleTimeout", None)
        if any(new[key] != endpoint[key] for key in CONTAINER):
            self.versions[name] += 1
            self.looks[name] = 0
        self.endpoints[name] = new
        return new

    def urls(self, endpoint: Json) -> dict[str, str]:
        """Of this server. Ids of LOAD_BALANCER endpoints are a host's name at RunPod, and a path here."""
        base = f"{self.url}/jobs/{endpoint['id']}"
        if endpoint["type"] == "LOAD_BALANCER":
            return {"base": base, "health": f"{base}/ping"}
        kinds = {"run": "run", "runSync": "runsync", "purgeQueue": "purge-queue", "health": "health"}
        urls = {key: f"{base}/{path}" for key, path in kinds.items()}
        return urls | {key: f"{base}/{key}/{{job_id}}" for key in ("status", "stream", "cancel", "retry")}

    def start(self, endpoint: Json) -> dict[str, str]:
        """The addresses of the worker that runs now, as the image of this name would."""
        http = endpoint["type"] == "LOAD_BALANCER"
        worker = endpoint["image"].rpartition("worker-")[2].partition(":")[0]
        env = {**endpoint["env"], **local_env(worker)}
        env = {name: value for name, value in env.items() if name not in ("PORT", "PORT_HEALTH")}
        mode: Literal["queue", "http"] = "http" if http else "queue"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        stop, starting = threading.Event(), self.starting

        def run() -> None:
            with running(worker, env=env, mode=mode, port=port):
                starting.discard(endpoint["id"])
                stop.wait()

        starting.add(endpoint["id"])
        thread = threading.Thread(target=run)
        thread.start()
        self.workers.callback(thread.join)
        self.workers.callback(stop.set)
        base = f"http://127.0.0.1:{port}" + ("" if http else "/v2/local")
        urls = self.urls(endpoint)
        return {key: url.replace(f"{self.url}/jobs/{endpoint['id']}", base) for key, url in urls.items()}

    # ---- workers -----------------------------------------------------------------------------------------

    def workers_of(self, name: str) -> Json:
        """A worker of the release before is there at the first look after a change, then gone."""
        endpoint, version = self.endpoints[name], self.versions[name]
        self.looks[name] += 1
        look, behaviour = self.looks[name], self.behaviour(endpoint)
        worker = {"id": f"{name}w{version}", "gpuCount": 1, "isStale": False, "version": version}
        worker |= {"image": endpoint["image"], "uptimeSeconds": 10 * look, "dataCenterId": "US-KS-2"}
        worker |= {"gpuTypeId": "NVIDIA L4", "startedAt": "2026-06-01T12:05:00Z"}
        status = {
            "crash": "UNHEALTHY" if look > 2 else "INITIALIZING",
            "throttled": "THROTTLED",
            "nosecret": "IDLE",
            "jobfails": "IDLE",
            "healthy": "IDLE" if look > 1 and name not in self.starting else "INITIALIZING",
        }.get(behaviour, "INITIALIZING")
        if behaviour == "restart":
            worker["uptimeSeconds"] = 10 * (look % 2)
        workers = [] if behaviour == "none" else [{**worker, "status": status}]
        if version > 1 and (look == 1 or self.busy):
            earlier = {**worker, "id": f"{name}w{version - 1}", "isStale": True, "version": version - 1}
            workers = [{**earlier, "status": "RUNNING" if self.busy else "IDLE"}, *workers]
        names = ("running", "idle", "initializing", "throttled", "unhealthy")
        summary = {state: sum(item["status"] == state.upper() for item in workers) for state in names}
        return {"workers": workers, "summary": {**summary, "total": len(workers)}, "endpointVersion": version}

    def releases(self, name: str) -> Json:
        version = self.versions[name]
        release = {"id": "r", "source": "MANUAL", "createdAt": "2026-06-01T12:10:00Z", "workerCount": 1}
        diff = [{"field": "template.imageName", "old": "before", "new": self.endpoints[name]["image"]}]
        rollout = {"inProgress": False, "workersOnLatest": 1, "workersTotal": 1, "percentOnLatest": 100}
        items = [{**release, "version": number, "diff": diff} for number in range(version, 0, -1)]
        return {"endpointVersion": version, "rollout": rollout, "releases": items}

    def log(self, name: str, tail: int) -> Response:
        """Of a crash, only at the beginning: then the container is gone."""
        behaviour = self.behaviour(self.endpoints[name])
        if behaviour == "crash" and self.looks[name] > 4:
            return problem(404, "worker not found")
        line = {"noimage": "manifest for image not found: manifest unknown", "crash": "CUDA out of memory"}
        events = [("system", "create container"), ("container", line.get(behaviour, "Worker ready."))]

        def stream() -> Iterator[str]:
            for second, (source, text) in enumerate(events[len(events) - min(tail, len(events)) :]):
                stamp = f"2026-06-01T12:05:{second:02}Z"
                yield f"id: {stamp}\ndata: {json.dumps({'ts': stamp, 'source': source, 'line': text})}\n\n"
            time.sleep(0.01)

        return StreamingResponse(stream(), media_type="text/event-stream")

    # ---- jobs --------------------------------------------------------------------------------------------

    def job(self, name: str, action: str) -> Response:
        behaviour = self.behaviour(self.endpoints[name])
        ready = behaviour in ("healthy", "nosecret", "jobfails") and self.looks[name] > 1
        failed = {
            "nosecret": {"message": "HF_TOKEN has no value: there is no RunPod secret hf."},
            "jobfails": {"message": "The disk is full.", "code": "no_space", "type": "server_error"},
        }.get(behaviour)
        if action == "ping":
            return Response(status_code=200 if ready else 204)
        if action == "runsync":
            return (
                JSONResponse({"error": failed}, 503) if failed else JSONResponse({"output": {"fine": True}})
            )
        if action == "run":
            return JSONResponse({"id": "job", "status": "IN_QUEUE"})
        if action == "cancel":
            self.cancelled.append(name)
            return JSONResponse({"id": "job", "status": "CANCELLED"})
        if not ready:
            return JSONResponse({"id": "job", "status": "IN_QUEUE"})
        if failed:
            return JSONResponse({"id": "job", "status": "FAILED", "error": json.dumps(failed)})
        return JSONResponse({"id": "job", "status": "COMPLETED", "output": {"fine": True}})

    def graphql(self, request: Request, body: Json) -> Json | Response:
        if not request.headers["user-agent"].startswith("Mozilla"):
            return Response(status_code=403)
        order = body["variables"]["input"]
        if unknown := order.keys() - GRAPHQL:
            return JSONResponse({"errors": [{"message": f"Unknown fields {sorted(unknown)}."}]})
        names = [name for name in order["gpuIds"].split(",") if name]
        workers = {"min": order["workersMin"], "max": order["workersMax"]}
        if "idleTimeout" in order:
            workers["idleTimeout"] = order["idleTimeout"]
        scaler = order["scalerType"]
        template = order["template"]
        made = {
            "name": order["name"],
            "type": "LOAD_BALANCER" if order["type"] == "LB" else "QUEUE",
            "image": template["imageName"],
            "disk": template["containerDiskInGb"],
            "env": {item["key"]: item["value"] for item in template["env"]},
            "ports": [port for port in template["ports"].split(",") if port],
            "gpu": {
                "pools": [name for name in names if name[0] != "-"],
                "excludedTypes": [name[1:] for name in names if name[0] == "-"],
                "count": order["gpuCount"],
                "minCudaVersion": order.get("minCudaVersion"),
            },
            "workers": workers,
            "scaling": {
                "type": scaler,
                "queueDelay" if scaler == "QUEUE_DELAY" else "requestCount": order["scalerValue"],
            },
            "timeout": order["executionTimeoutMs"],
            "flashboot": order["flashBootType"],
            "dataCenterIds": [name for name in order["locations"].split(",") if name],
        }
        name = order.get("id")
        done = self.update(name, made) if name else self.create(made)
        if isinstance(done, Response):
            return done
        self.models[done["id"]] = order["modelReferences"]
        return {"data": {"saveEndpoint": {"id": done["id"]}}}


def _rest(account: Account, method: str, path: str, query: Any, body: Any) -> Json | Response:
    """What one request of the REST API does."""
    match method, path.strip("/").split("/")[1:]:
        case "GET", ["serverless"]:
            return {"endpoints": list(account.endpoints.values())}
        case "POST", ["serverless"]:
            return account.create(body)
        case "GET", ["templates"]:
            return {"templates": list(account.templates.values())}
        case "POST", ["templates"]:
            name = f"t{next(account.ids)}"
            defaults = {"args": "", "disk": 5, "mounts": {}, "ports": [], "registry": None, "public": False}
            defaults |= {"category": "NVIDIA", "allowedCudaVersions": []}
            account.templates[name] = {**defaults, **body, "id": name}
            return account.templates[name]
        case "GET", ["catalog", "gpus"]:
            gpu = {
                "manufacturer": "NVIDIA",
                "memory": 24,
                "secure": True,
                "community": False,
                "availability": "HIGH",
            }
            gpu["maxCount"] = {"secure": 8, "community": 0}
            price = {"secure": 1.0, "community": 0.0}
            return {
                "gpus": [
                    {**gpu, "id": pool, "name": pool, "pool": pool, "price": {**price, "serverless": cost}}
                    for pool, cost in POOLS.items()
                ]
            }
        case verb, [kind, name, *rest]:
            things = account.endpoints if kind == "serverless" else account.templates
            if name not in things:
                return problem(404, "resource not found")
            match verb, rest:
                case "GET", []:
                    return things[name]
                case "PATCH", [] if kind == "serverless":
                    return account.update(name, body)
                case "PATCH", []:
                    things[name].update(body)
                    return things[name]
                case "DELETE", []:
                    del things[name]
                    return Response(status_code=204)
                case "GET", ["workers"]:
                    return account.workers_of(name)
                case "GET", ["releases"]:
                    return account.releases(name)
                case "GET", ["workers", _, "logs"]:
                    return account.log(name, int(query.get("tail", 100)))
    return problem(404, "no such path")


CONFIG = Config(
    spec_validator_cls=None, extra_media_type_deserializers={"application/problem+json": json.loads}
)


@functools.cache
def document() -> OpenAPI:
    return OpenAPI.from_dict(json.loads(DOCUMENT.read_text()), config=CONFIG)


def interrupt() -> None:
    """Ctrl-C, for the process that runs the tests; a moment later it is in the main thread."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)


@contextmanager
def account(*, real: bool = False) -> Iterator[Account]:
    """The account, served on loopback until the block ends. Asserts that nothing was against the document."""
    state = Account(real=real)
    openapi = document()

    async def serve(request: Request) -> Response:
        raw = await request.body()
        return await anyio.to_thread.run_sync(answer, request, raw)

    def answer(request: Request, raw: bytes) -> Response:
        method, path = request.method, request.url.path
        if path.startswith("/jobs/"):
            assert request.headers["authorization"] == f"Bearer {KEY}"
            return state.job(*path.split("/")[2:4])
        body = json.loads(raw) if raw else None
        state.requests.append((method, path, body))
        documented = path.startswith("/v2/")
        asked = MockRequest(
            SERVER, method, path, args=dict(request.query_params), headers=dict(request.headers), data=raw
        )
        if documented:
            check(lambda: openapi.validate_request(asked), f"{method} {path} {raw!r}")
        if fault := state.before(method, path):
            done = fault
        else:
            made = (
                _rest(state, method, path, request.query_params, body)
                if documented
                else state.graphql(request, body)
            )
            done = state.after(method, path) or (
                made if isinstance(made, Response) else created(made, method)
            )
        if isinstance(done, str):
            return Drop()
        kind = done.media_type or "application/json"
        if documented and kind != "text/event-stream":
            replied = MockResponse(done.body, done.status_code, dict(done.headers), kind)
            check(
                lambda: openapi.validate_response(asked, replied), f"answer to {method} {path} {done.body!r}"
            )
        return done

    def created(made: Json, method: str) -> Response:
        return JSONResponse(made, 201 if method == "POST" and "data" not in made else 200)

    def check(validate: Callable[[], None], what: str) -> None:
        try:
            validate()
        except Exception as error:
            reasons = [item.message for item in getattr(error.__cause__, "schema_errors", ())]
            state.violations.append(f"{what}: {error!r} {reasons}"[:2000])

    methods = ["GET", "POST", "PATCH", "DELETE"]
    app = Starlette(routes=[Route("/{path:path}", serve, methods=methods)])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    state.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        with state.workers:
            yield state
    finally:
        server.should_exit = True
        thread.join()
    assert not state.violations, state.violations
