"""What the OpenAI and Cohere routes of all workers have in common: null means that a field is not set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from tools.workers import load_handler, worker_names

ROUTES = [
    pytest.param(model, id=f"{worker} {path}")
    for worker in worker_names()
    for path, model in load_handler(worker).handler.routes.items()
]


def models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The request models in a field's type, and those in their fields."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from models_of(field.annotation)
    for part in get_args(annotation):
        yield from models_of(part)


def refused_nulls(model: type[BaseModel]) -> list[str]:
    """The optional fields that refuse null."""
    refused = []
    for name, field in model.model_fields.items():
        if field.is_required():
            continue
        try:
            model.model_validate({name: None}, strict=True)
        except ValidationError as error:
            refused += [name for problem in error.errors() if problem["loc"][:1] == (name,)]
    return refused


@pytest.mark.parametrize("model", ROUTES)
def test_null_is_taken_for_every_optional_field(model: type[BaseModel]) -> None:
    assert {kind.__name__: refused for kind in models_of(model) if (refused := refused_nulls(kind))} == {}
