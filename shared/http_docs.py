"""What /openapi.json states of each route: bodies, answers and errors, from the models of a JobHandler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter

from shared.jobs import EVENTS, JSON, JobHandler
from shared.openai import MODELS, Model, ModelList, ModelsRequest

NATIVE = "/runsync"
Schema = dict[str, Any]
STATUSES = {
    400: "A field is wrong, or the body is no JSON object or form; `param` names the field",
    401: "The key is missing or wrong",
    404: "No such route or model",
    408: "The body took too long",
    413: "The body, a field or the result is too large",
    429: "As many requests run and wait as the worker takes",
    500: "The worker failed",
    503: "The model loads, the worker drains, its engine is dead, or it cannot start",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds", "schema": {"type": "string"}}}
_TEXT: Schema = {"type": "string"}
_ERROR_FIELDS = {
    "message": _TEXT,
    "type": _TEXT,
    "param": {"type": ["string", "null"]},
    "code": {"type": ["string", "integer", "null"]},
}
_SCHEMAS: dict[str, Schema] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {"type": "object", "required": [*_ERROR_FIELDS], "properties": _ERROR_FIELDS}
        },
    },
    "FailedJob": {
        "type": "object",
        "required": ["id", "status", "error"],
        "properties": {
            "id": _TEXT,
            "status": {"const": "FAILED"},
            "error": {
                **_TEXT,
                "contentMediaType": JSON,
                "contentSchema": {"type": "object", "properties": _ERROR_FIELDS},
            },
        },
    },
}


class Documentation:
    """schemas: the components to which the operations refer. secured: whether clients must send a key."""

    def __init__(self, handler: JobHandler, *, secured: bool) -> None:
        self._handler, self.secured = handler, secured
        self._answers: dict[type[BaseModel], Mapping[str, Any]] = {
            **handler.answers,
            ModelsRequest: {JSON: ModelList},
            ModelRequest: {JSON: Model},
        }
        requests = dict.fromkeys([*handler.requests, *handler.routes.values()])
        parts: list[Any] = [((model, "body"), "validation", TypeAdapter(model)) for model in requests]
        for model, answers in self._answers.items():
            parts += [((model, kind), "serialization", TypeAdapter(type_)) for kind, type_ in answers.items()]
        schemas, definitions = TypeAdapter.json_schemas(parts, ref_template="#/components/schemas/{model}")
        self._schemas = {key: schema for (key, _), schema in schemas.items()}
        self._forms = {
            name: schema for name, schema in definitions.get("$defs", {}).items() if any(_files(schema))
        }
        self.schemas: dict[str, Schema] = definitions.get("$defs", {}) | _SCHEMAS
        for name, schema in self._forms.items():  # in JSON, a file is a text
            self.schemas[name] = schema | {"properties": schema["properties"] | dict(_files(schema, _TEXT))}

    def operation(self, path: str, model: type[BaseModel] | None) -> dict[str, Any]:
        """The operation object of a route. model: of its body; None: the native route."""
        get = path.startswith(MODELS)
        operation: dict[str, Any] = {
            "summary": f"{'GET' if get else 'POST'} {path}",
            "operationId": path.strip("/").replace("/", "_").replace("{", "").replace("}", ""),
            "responses": {"200": self._answer(path, model), **self._errors(native=model is None, get=get)},
        }
        if self.secured:
            operation["security"] = [{"bearer": []}]
        if path.endswith("}"):
            operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": _TEXT}]
        if not get:
            operation["requestBody"] = {"required": True, "content": self._body(model)}
        return operation

    def _body(self, model: type[BaseModel] | None) -> dict[str, Any]:
        if model is None:
            schemas = [self._schemas[request, "body"] for request in self._handler.requests]
            route = {"enum": [*self._handler.routes]}
            properties = {"openai_route": route, "openai_input": {"type": "object"}}
            schemas.append({"type": "object", "required": ["openai_route"], "properties": properties})
            schema = {"type": "object", "properties": {"input": _any_of(schemas)}, "required": ["input"]}
            return {JSON: {"schema": schema}}
        content = {JSON: {"schema": self._schemas[model, "body"]}}
        if form := self._forms.get(content[JSON]["schema"]["$ref"].rpartition("/")[2]):
            # The form first: documentation shows the first.
            return {"multipart/form-data": {"schema": form}, **content}
        return content

    def _answer(self, path: str, model: type[BaseModel] | None) -> dict[str, Any]:
        if path.endswith("}"):
            model = ModelRequest
        models = [model] if model else [*self._handler.requests, *self._handler.routes.values()]
        schemas: dict[str, list[Schema]] = {}
        for each in models:
            for kind in self._answers.get(each, {JSON: None}):
                schemas.setdefault(kind, []).append(self._schemas.get((each, kind), {}))
        content = {kind: {"schema": _any_of(parts)} for kind, parts in schemas.items()}
        if path == NATIVE:
            properties = {"id": _TEXT, "status": {"const": "COMPLETED"}, "output": content[JSON]["schema"]}
            properties |= {name: {"type": "integer"} for name in ("delayTime", "executionTime")}  # ms
            job = {"type": "object", "required": [*properties], "properties": properties}
            content[JSON]["schema"] = job
        if EVENTS in content:
            parts = _any_of([content[EVENTS]["schema"], {"$ref": "#/components/schemas/Error"}])
            data = {**_TEXT, "contentMediaType": JSON, "contentSchema": parts}
            properties = {"data": _any_of([data, {"const": "[DONE]"}])}
            event = {"type": "object", "required": ["data"], "properties": properties}
            content[EVENTS] = {"itemSchema": event}  # as OpenAPI 3.2 and FastAPI's own streams
        return {"description": "The answer", "content": content}

    def _errors(self, *, native: bool, get: bool) -> dict[str, Any]:
        responses = {}
        for status, description in STATUSES.items():
            if (status == 401 and not self.secured) or (get and status in (400, 408, 413, 429)):
                continue
            name = "FailedJob" if native and status != 401 else "Error"
            content = {JSON: {"schema": {"$ref": f"#/components/schemas/{name}"}}}
            headers = {"headers": _RETRY_AFTER} if status in (429, 503) else {}
            responses[str(status)] = {"description": description, "content": content, **headers}
        return responses


class ModelRequest(BaseModel):
    """GET /v1/models/{name}."""


def _files(schema: Schema, instead: Schema | None = None) -> Iterable[tuple[str, Schema]]:
    """The fields that take a file; with `instead` in place of the file's schema."""
    for name, field in schema.get("properties", {}).items():
        kinds = field.get("anyOf", [field])
        if any(kind.get("format") == "binary" for kind in kinds):
            yield (
                name,
                {key: value for key, value in field.items() if key not in ("format", "anyOf")}
                | (instead or {}),
            )


def _any_of(schemas: Sequence[Schema]) -> Schema:
    """Any value where there are none."""
    different = [schema for number, schema in enumerate(schemas) if schema not in schemas[:number]]
    return {"anyOf": different} if len(different) > 1 else different[0] if different else {}
