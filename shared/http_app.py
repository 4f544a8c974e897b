"""A worker's handler as an HTTP application: OpenAI's routes, `/runsync`, health, metrics, documentation.

The app is built from what a JobHandler knows: requests, routes, and the two forms of an answer.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from shared import telemetry
from shared.admission import Admission
from shared.errors import JobError
from shared.http_response import JobResponse, error_response
from shared.jobs import JobHandler
from shared.openai import ModelsRequest

NATIVE = "/runsync"
_REF = "#/components/schemas/{model}"


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
    telemetry.add_sink(metrics)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])

    def authorise(request: Request) -> None:
        """RunPod's edge has checked its own key, which arrives in the same header: so none is the default."""
        sent = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if api_key is not None and not hmac.compare_digest(sent.encode(), api_key.encode()):
            raise JobError("Send the header Authorization: Bearer <API_KEY>.", code="unauthorized")

    def add(path: str, model: type[BaseModel] | None) -> None:
        async def endpoint(request: Request) -> Response:
            authorise(request)
            return JobResponse(request, handler, admission, path, model)

        lists_models = model is not None and issubclass(model, ModelsRequest)
        models = handler.requests if model is None else (model,)
        body = None if lists_models else _request_body(models, envelope=model is None)
        app.add_api_route(
            path,
            endpoint,
            methods=["GET" if lists_models else "POST"],
            operation_id=path.strip("/").replace("/", "_"),
            openapi_extra=body and {"requestBody": body},
            response_class=Response,
        )

    add(NATIVE, None)
    for path, model in handler.routes.items():
        add(path, model)

    if "/v1/models" in handler.routes:

        @app.get("/v1/models/{name:path}")
        async def retrieve_model(name: str, request: Request) -> Response:
            authorise(request)
            admission.check()
            job = handler.begin({"id": "models", "input": None}, transport="http")
            listed = (await handler.work(ModelsRequest(), job)).model_dump()["data"]
            if found := next((model for model in listed if model["id"] == name), None):
                return JSONResponse(found)
            names = ", ".join(model["id"] for model in listed)
            message = f"model: {name[:200]!r} is not served here. Use {names}."
            raise JobError(message, param="model", code="model_not_found")

    @app.get(health_path, status_code=200, response_class=Response)
    async def ping() -> Response:
        """200: ready; 204: loading; 503: the engine is dead, or the worker drains.

        A worker whose start failed is healthy: it answers every request with the cause. Replaced, it would
        fail again, and each attempt bills.
        """
        return Response(status_code={"loading": 204, "ready": 200, "failed": 200}.get(admission.state, 503))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """The state of the worker, and how many requests run and wait."""
        return {
            "state": admission.state,
            "cause": admission.cause and admission.cause.message,
            "in_flight": admission.in_flight,
            "waiting": admission.waiting,
        }

    @app.get("/metrics", response_class=Response)
    async def show_metrics(request: Request) -> Response:
        """Metrics in Prometheus' text format."""
        authorise(request)
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(JobError)
    async def job_error(_: Request, error: JobError) -> Response:
        return error_response(error)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def not_found(request: Request, _: Exception) -> Response:
        asked = f"{request.method} {request.url.path[:200]}"
        message = f"{asked} is not served here. There are: {', '.join([*handler.routes, NATIVE])}."
        return error_response(JobError(message, code="unknown_route"))

    _add_schemas(app, [*handler.requests, *handler.routes.values()])
    return app


def _request_body(models: Sequence[type[BaseModel]], *, envelope: bool) -> dict[str, Any]:
    refs = [{"$ref": _REF.format(model=model.__name__)} for model in models]
    schema: dict[str, Any] = refs[0] if len(refs) == 1 else {"anyOf": refs}
    if envelope:
        schema = {"type": "object", "properties": {"input": schema}, "required": ["input"]}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _add_schemas(app: FastAPI, models: Sequence[type[BaseModel]]) -> None:
    """Put the models' schemas, to which the routes refer, into the OpenAPI document."""
    pairs = [(model, "validation") for model in dict.fromkeys(models)]
    _, schemas = models_json_schema(pairs, ref_template=_REF)  # type: ignore[arg-type]
    document = app.openapi

    def openapi() -> dict[str, Any]:
        made = document()
        made.setdefault("components", {}).setdefault("schemas", {}).update(schemas.get("$defs", {}))
        return made

    app.openapi = openapi  # type: ignore[method-assign]
