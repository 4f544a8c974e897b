"""Which request an input is, and errors that name the field."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import JobError
from shared.requests import parse
from tools.workers import load_module

schemas = load_module("bge", "schemas")

REQUESTS = (schemas.RetrievalRequest, schemas.RerankRequest)


@pytest.mark.parametrize(
    ("payload", "param", "mentions"),
    [
        ({"text": "a", "input_type": "passage"}, "input_type", "'query' or 'document'"),
        ({"text": "a", "instruction": 1}, "instruction", "string"),
        ({"text": "a", "instructions": "i"}, "instructions", "Did you mean 'instruction'?"),
        ({"texts": ["a"], "top_n": 1}, "top_n", "unknown field"),
        ({"query": "a"}, "documents", "required"),
        ({"documents": ["a"]}, "query", "required"),
        ({"query": "", "documents": ["a"]}, "query", "at least 1 character"),
        ({"query": "a", "documents": []}, "documents", "at least 1 item"),
        ({"query": "a", "documents": ["b"] * 16385}, "documents", "at most 16384"),
        ({"query": "a", "documents": ["b", 5]}, "documents", "number 1 is neither"),
        ({"query": "a", "documents": ["b", {"title": "c"}]}, "documents", "number 1 is neither"),
        ({"query": "a", "documents": "b"}, "documents", "list"),
        ({"query": "a", "documents": ["b"], "top_n": 0}, "top_n", "greater than or equal to 1"),
        ({"query": "a", "documents": ["b"], "top_k": 1}, "top_k", "Did you mean 'top_n'?"),
    ],
)
def test_a_wrong_field_is_named(payload: dict[str, Any], param: str, mentions: str) -> None:
    with pytest.raises(JobError) as caught:
        parse(payload, REQUESTS, {})
    assert caught.value.param == param
    assert mentions in caught.value.message
