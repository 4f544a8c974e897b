"""A job's input as a typed request, or one error that names the field."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import unquote

from pydantic import (
    BaseModel,
    ConfigDict,
    GetPydanticSchema,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, core_schema

from shared.errors import JobError
from shared.openai import MODELS, RetrieveModelRequest


class Request(BaseModel):
    """Base of a worker's own requests: no type coercion, and an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, data: Any) -> Any:
        """Clients that dump their models send null for every field that is not set."""
        if not isinstance(data, dict):
            return data
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in data.items() if value is not None or name not in optional}


def _keep_bytes(value: Any, validate_text: Callable[[Any], Any]) -> Any:
    return value if isinstance(value, bytes) else validate_text(value)


# One schema, not a union of two: an error names the field, and not the members of a union.
MediaSource = Annotated[
    str | bytes,
    GetPydanticSchema(
        lambda _type, _handler: core_schema.no_info_wrap_validator_function(
            _keep_bytes, core_schema.str_schema(), serialization=core_schema.to_string_ser_schema()
        )
    ),
    WithJsonSchema({"type": "string", "format": "binary"}),
]
"""A field for media: base64, a `data:` URI or a URL in JSON, a file in a form; see `decoding.load_bytes`."""


def parse(
    payload: Any, requests: Sequence[type[BaseModel]], routes: Mapping[str, type[BaseModel]]
) -> BaseModel:
    """The typed request in a job's `input`: `routes[openai_route]` if it has a route, else one of `requests`.

    Raises JobError that names the field, what was wrong with it and what is allowed.
    """
    if not isinstance(payload, dict):
        kind = "missing" if payload is None else f"of type {_json_type(payload)}"
        raise JobError(
            f'input is {kind}. Send an object: {{"input": {{...}}}}.', param="input", code="invalid_input"
        )
    if "openai_route" not in payload and "openai_input" not in payload:
        return validate(pick_request_model(requests, payload), payload)
    route = payload.get("openai_route")
    path = route.partition("?")[0].rstrip("/") if isinstance(route, str) else ""
    if MODELS in routes and path.startswith(f"{MODELS}/"):
        return RetrieveModelRequest(id=unquote(path.removeprefix(f"{MODELS}/")))
    if path not in routes:
        served = " or ".join(routes) if routes else "this worker's own input: it has no OpenAI routes"
        raise JobError(
            f"openai_route: {_show(route)} is not served here. Use {served}.",
            param="openai_route",
            code="unknown_route",
        )
    body = payload.get("openai_input")
    if body is None:
        body = {}
    if not isinstance(body, dict):
        raise JobError(
            f"openai_input must be an object, not of type {_json_type(body)}.",
            param="openai_input",
            code="invalid_input",
        )
    return validate(routes[path], body)


def pick_request_model(requests: Sequence[type[BaseModel]], payload: dict[str, Any]) -> type[BaseModel]:
    """The one of `requests` that has most of the payload's fields; the first of several such."""
    return max(requests, key=lambda request: len(request.model_fields.keys() & payload.keys()))


def validate(model: type[BaseModel], payload: dict[str, Any], *, strict: bool | None = None) -> BaseModel:
    """`payload` as `model`. Raises JobError about the first problem.

    An unknown field takes precedence: a missing one is often the same field, misspelt.
    """
    try:
        return model.model_validate(payload, strict=strict)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
        raise _explain((unknown or problems)[0], model) from None


def as_list(value: Any) -> Any:
    """For a BeforeValidator: a single text as a list of it, null as an empty list."""
    return [] if value is None else [value] if isinstance(value, str) else value


def _explain(problem: ErrorDetails, model: type[BaseModel]) -> JobError:
    param = ".".join(str(part) for part in problem["loc"]) or None
    if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
        names = list(model.model_fields)
        close = difflib.get_close_matches(str(param)[:100], names, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        return JobError(
            f"{param}: unknown field. {hint}Allowed: {', '.join(names)}.", param=param, code="unknown_field"
        )
    if problem["type"] == "missing":
        return JobError(f"{param}: this field is required.", param=param, code="missing_field")
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in ("model_type", "model_attributes_type"):  # pydantic's text names the Python class
        text = "Input should be an object"
    got = f", got {_show(problem['input'])}" if param and problem["type"] != "value_error" else ""
    return JobError(f"{param}: {text}{got}." if param else f"{text}.", param=param, code="invalid_value")


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _show(value: Any) -> str:
    """`value` as JSON where that is short, else its type: an error must not carry megabytes."""
    if isinstance(value, bytes):
        return f"a file of {len(value)} bytes"
    text = json.dumps(value, ensure_ascii=False, default=repr)
    if len(text) <= 60:
        return text
    return f"{_json_type(value)} of length {len(value)}" if hasattr(value, "__len__") else f"{text[:60]}..."
