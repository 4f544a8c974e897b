"""What the READMEs and test_input.json say of a worker is what its code says."""

from __future__ import annotations

import json
import re

import pytest

from shared.jobs import JobHandler
from shared.requests import parse
from tools import docs
from tools.workers import ROOT, load_handler, load_module, worker_names

each_worker = pytest.mark.parametrize("name", worker_names())


def handler_of(name: str) -> JobHandler:
    handler = load_handler(name).handler
    assert isinstance(handler, JobHandler)
    return handler


def read(name: str, file: str) -> str:
    return (ROOT / "workers" / name / file).read_text()


@each_worker
def test_examples_are_requests(name: str) -> None:
    """test_input.json, and every {"input": ...} in the README."""
    handler = handler_of(name)
    blocks = re.findall(r"```json\n(.*?)```", read(name, "README.md"), re.DOTALL)
    examples = [json.loads(block) for block in [read(name, "test_input.json"), *blocks]]
    requests = [example["input"] for example in examples if "input" in example]
    assert len(requests) >= 2, "the README shows no request"
    for request in requests:
        parse(request, handler.requests, handler.routes)


@each_worker
def test_every_field_is_described(name: str) -> None:
    models = [load_module(name, "schemas").Settings, *handler_of(name).requests]
    missing = [
        f"{model.__name__}.{field}"
        for model in models
        for field, info in model.model_fields.items()
        if not info.description
    ]
    assert missing == []


@each_worker
def test_readme_has_its_tables(name: str) -> None:
    markers = [(what, model) for _, what, model, _ in docs.MARKED.findall(read(name, "README.md"))]
    assert ("settings", "") in markers
    for model in handler_of(name).requests:
        assert ("fields", model.__name__) in markers


def test_tables_are_what_the_code_says() -> None:
    assert docs.stale() == [], "run make docs"
