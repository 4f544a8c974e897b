"""A worker's handler as an HTTP application: OpenAI's routes, `/runsync`, health, metrics, documentation.

The app is built from what a JobHandler knows: requests, routes, and the two forms of an answer.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel
from starlette.types import ASGIApp, Receive, Scope, Send

from shared import telemetry
from shared.admission import Admission
from shared.errors import JobError
from shared.http_docs import NATIVE, Documentation
from shared.http_response import JobResponse, error_response
from shared.jobs import JobHandler
from shared.openai import MODELS, find_model
from shared.requests import validate
from shared.results import to_plain

Endpoint = Callable[[Request], Awaitable[Response]]


class _JobRoutes:
    """Answers the POST requests of `jobs` before FastAPI routes the others, which takes 0.1 ms a request."""

    def __init__(self, app: ASGIApp, jobs: Mapping[str, Endpoint]) -> None:
        self._app, self._jobs = app, jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._jobs.get(scope["path"]) if scope.get("method") == "POST" else None
        if endpoint is None:
            return await self._app(scope, receive, send)
        try:
            response = await endpoint(Request(scope, receive))
        except JobError as error:
            response = error_response(error)
        await response(scope, receive, send)


class Health(BaseModel):
    state: Literal["loading", "ready", "failed", "draining", "dead"]
    cause: str | None
    in_flight: int
    waiting: int


def make_app(
    handler: JobHandler,
    admission: Admission,
    *,
    worker: str,
    health_path: str = "/ping",
    api_key: str | None = None,
    origins: Sequence[str] = (),
) -> FastAPI:
    """The application of one worker.

    api_key: what clients must send as `Authorization: Bearer`; None: nothing. origins: of browsers, for CORS.
    """
    app = FastAPI(title=f"worker-{worker}", redoc_url=None)
    metrics = telemetry.Prometheus(in_flight=lambda: admission.in_flight, waiting=lambda: admission.waiting)
    telemetry.add_sink("http", metrics)
    documentation = Documentation(handler, secured=api_key is not None)
    jobs: dict[str, Endpoint] = {}
    app.add_middleware(_JobRoutes, jobs=jobs)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])

    def authorise(request: Request) -> None:
        """RunPod's edge has checked its own key, which arrives in the same header: so none is the default."""
        sent = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if api_key is not None and not hmac.compare_digest(sent.encode(), api_key.encode()):
            raise JobError("Send the header Authorization: Bearer <API_KEY>.", code="invalid_api_key")

    def add(path: str, model: type[BaseModel] | None) -> None:
        async def endpoint(request: Request) -> Response:
            authorise(request)
            return JobResponse(request, handler, admission, path, model)

        jobs[path] = endpoint
        described = documentation.operation(path, model)
        app.add_api_route(path, endpoint, methods=["POST"], response_class=Response, openapi_extra=described)

    async def listed_models(request: Request) -> dict[str, Any]:
        authorise(request)
        admission.check()  # takes no slot: a worker under load still lists what it serves
        job = handler.begin({"id": "models", "input": None}, transport="http")
        try:
            answer = await handler.work(validate(handler.routes[MODELS], {}), job)
            listed: dict[str, Any] = (await to_plain(answer))[0]
        except Exception as error:
            raise handler.explain(error)[0] from None
        return listed

    async def list_models(request: Request) -> Response:
        return JSONResponse(await listed_models(request))

    async def retrieve_model(request: Request) -> Response:
        name = request.path_params["name"]
        return JSONResponse(find_model(await listed_models(request), name))

    add(NATIVE, None)
    for path, model in handler.routes.items():
        if path != MODELS:
            add(path, model)
            continue
        get: dict[str, Any] = {"methods": ["GET"], "response_class": Response}
        app.add_api_route(path, list_models, openapi_extra=documentation.operation(path, model), **get)
        described = documentation.operation(path + "/{name}", model)
        app.add_api_route(path + "/{name:path}", retrieve_model, openapi_extra=described, **get)

    @app.head(health_path, include_in_schema=False)
    @app.get(
        health_path,
        response_class=Response,
        responses={204: {"description": "The model loads"}, 503: {"description": "Dead, or draining"}},
    )
    async def ping() -> Response:
        """200: ready; 204: loading; 503: the engine is dead, or the worker drains.

        A worker whose start failed is healthy: it answers every request with the cause. Replaced, it would
        fail again, and each attempt bills.
        """
        return Response(status_code={"loading": 204, "ready": 200, "failed": 200}.get(admission.state, 503))

    @app.get("/health")
    async def health() -> Health:
        """The state of the worker, and how many requests run and wait."""
        cause = admission.cause and admission.cause.message
        return Health(
            state=admission.state, cause=cause, in_flight=admission.in_flight, waiting=admission.waiting
        )

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics(request: Request) -> Response:
        """Metrics in Prometheus' text format, the engine's own after the worker's."""
        authorise(request)
        engine = await handler.engine_metrics() if handler.engine_metrics else b""
        return Response(metrics.exposition() + engine, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(JobError)
    async def job_error(_: Request, error: JobError) -> Response:
        return error_response(error)

    @app.exception_handler(404)
    async def not_found(request: Request, _: Exception) -> Response:
        return error_response(_not_served(request, handler, "unknown_route"))

    @app.exception_handler(405)
    async def wrong_method(request: Request, error: Any) -> Response:
        response = error_response(_not_served(request, handler, "method_not_allowed"))
        response.headers.update(error.headers or {})
        return response

    app.openapi = _with_schemas(app.openapi, documentation)  # type: ignore[method-assign]
    return app


def _not_served(request: Request, handler: JobHandler, code: str) -> JobError:
    route = f"{request.method} {request.url.path[:200]}"
    served = ", ".join([*handler.routes, NATIVE])
    return JobError(f"{route} is not served here. There are: {served}.", code=code)


def _with_schemas(
    openapi: Callable[[], dict[str, Any]], documentation: Documentation
) -> Callable[[], dict[str, Any]]:
    """FastAPI's document with the schemas to which the operations refer."""

    def document() -> dict[str, Any]:
        made = openapi()
        components = made.setdefault("components", {})
        components.setdefault("schemas", {}).update(documentation.schemas)
        if documentation.secured:
            components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        return made

    return document
