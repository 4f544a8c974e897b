"""schemathesis against a running worker: no 500, and each answer is one that /openapi.json states."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode, checks
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks as openapi

EXAMPLES = int(os.environ.get("OPENAPI_EXAMPLES", "4"))  # of each operation, right and wrong ones
CHECKS = [
    not_a_server_error,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_headers_conformance,
    openapi.response_schema_conformance,
]
MAX_TOKENS = ("max_tokens", "max_completion_tokens")


def short(body: Any) -> Any:
    """The body with a few tokens at most, where it asks for text."""
    if not isinstance(body, dict):
        return body
    body = {
        name: short(value) if name in ("input", "openai_input") else value for name, value in body.items()
    }
    long = [name for name in MAX_TOKENS if type(body.get(name)) is int and body[name] > 8]
    wants_text = "messages" in body or "prompt" in body
    return body | dict.fromkeys(
        long or (["max_tokens"] if wants_text and "max_tokens" not in body else []), 8
    )


def check_conformance(url: str, good: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """good: bodies by path, as JSON, that the worker must answer with 200."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = {result.ok().path: result.ok() for result in schema.get_all_operations()}
    for path, bodies in good.items():
        for body in bodies:
            case = operations[path].Case(body=body, media_type="application/json")
            response = case.call()
            assert response.status_code == 200, response.text
            case.validate_response(response, checks=CHECKS)
    for operation in operations.values():
        for mode in GenerationMode:
            if mode.is_negative and operation.method.upper() == "GET":
                continue

            @given(operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def run(case: Any) -> None:
                case.body = short(case.body)
                case.validate_response(case.call(), checks=CHECKS)

            run()
