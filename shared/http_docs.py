"""What /openapi.json states of each route: bodies, answers and errors, from the models of a JobHandler."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from shared.jobs import JobHandler
from shared.openai import Model, ModelList

NATIVE = "/runsync"
MODELS = "/v1/models"  # the only GET among the routes
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
_JOB_ERROR = {
    "type": "object",
    "properties": {"id": {"type": "string"}, "status": {"const": "FAILED"}, "error": {"type": "string"}},
}


class Documentation:
    """schemas: the components to which the operations refer. secured: whether clients must send a key."""

    def __init__(self, handler: JobHandler, *, secured: bool) -> None:
        self._handler, self.secured = handler, secured
        models: list[type[BaseModel]] = [*_answer_models(handler), ModelList, Model]
        self._answers = list(dict.fromkeys(models))
        requests = dict.fromkeys([*handler.requests, *handler.routes.values()])
        answers: list[Any] = [(model, "serialization") for model in self._answers if model not in requests]
        self._refs, schemas = models_json_schema(
            [*((model, "validation") for model in requests), *answers],
            ref_template="#/components/schemas/{model}",
        )
        self.schemas: dict[str, Any] = schemas.get("$defs", {}) | {"Error": _ERROR}

    def operation(self, path: str, model: type[BaseModel] | None) -> dict[str, Any]:
        """The operation object of a route. model: of its body; None: the native route."""
        native, get = model is None, path.startswith(MODELS)
        models = self._handler.requests if model is None else (model,)
        error = _JOB_ERROR if native else {"$ref": "#/components/schemas/Error"}
        operation: dict[str, Any] = {
            "summary": f"{'GET' if get else 'POST'} {path}",
            "operationId": path.strip("/").replace("/", "_").replace("{", "").replace("}", ""),
            "responses": {
                "200": {"description": "The answer", "content": self._answer_content(path, models)},
                "default": {
                    "description": "4xx and 5xx: what was wrong, and what to change",
                    "content": {"application/json": {"schema": error}},
                },
            },
        }
        if self.secured:
            operation["security"] = [{"bearer": []}]
        if not get:
            operation["requestBody"] = {"required": True, "content": self._body_content(models, native)}
        return operation

    def _body_content(self, models: Sequence[type[BaseModel]], native: bool) -> dict[str, Any]:
        schema = _any_of([self._refs[model, "validation"] for model in models])
        if native:
            schema = {"type": "object", "properties": {"input": schema}, "required": ["input"]}
            return {"application/json": {"schema": schema}}
        json, form = {"application/json": {"schema": schema}}, {"multipart/form-data": {"schema": schema}}
        # The form first where a file is sent: documentation shows the first.
        return form | json if any(self._takes_files(model) for model in models) else json

    def _takes_files(self, model: type[BaseModel]) -> bool:
        name = self._refs[model, "validation"]["$ref"].rpartition("/")[2]
        fields = self.schemas[name].get("properties", {}).values()
        kinds = (kind for field in fields for kind in [field, *field.get("anyOf", [])])
        return any(kind.get("format") == "binary" for kind in kinds)

    def _answer_content(self, path: str, models: Sequence[type[BaseModel]]) -> dict[str, Any]:
        stems = {model.__name__.removesuffix("Request") for model in models}
        matching = [a for a in self._answers if a.__name__.removesuffix("Response") in stems]
        if path.startswith(MODELS):
            matching = [Model if path.endswith("}") else ModelList]
        schema = _any_of([self._ref(answer) for answer in matching])
        if path == NATIVE:
            envelope = {"id": {"type": "string"}, "status": {"const": "COMPLETED"}, "output": schema}
            times = {name: {"type": "integer"} for name in ("delayTime", "executionTime")}  # ms
            schema = {"type": "object", "properties": envelope | times}
        content: dict[str, Any] = {"application/json": {"schema": schema}}
        if self._handler.stream_work and any("stream" in model.model_fields for model in models):
            content["text/event-stream"] = {"schema": {"type": "string"}}
        return content

    def _ref(self, answer: type[BaseModel]) -> dict[str, Any]:
        return self._refs.get((answer, "serialization")) or self._refs[answer, "validation"]


def _answer_models(handler: JobHandler) -> list[type[BaseModel]]:
    """The pydantic models that the handler says it returns; none where its hints need an import of typing."""
    with suppress(NameError):
        answer = get_type_hints(handler.work).get("return")
        kinds = get_args(answer) if get_origin(answer) in (Union, UnionType) else [answer]
        return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return []


def _any_of(schemas: Sequence[Any]) -> dict[str, Any]:
    """Any value where there are none."""
    return {} if not schemas else dict(schemas[0]) if len(schemas) == 1 else {"anyOf": list(schemas)}
