"""Requests and settings: what is taken, and errors that name the field."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import StartError
from shared.requests import validate
from shared.settings import read_settings
from tests.helpers import refused
from tools.workers import load_module

schemas = load_module("florence2", "schemas")
BOX = [64, 96, 320, 384]


@pytest.mark.parametrize(
    ("payload", "param", "code"),
    [
        ({}, "image", "missing_field"),
        ({"image": "image", "images": ["image"]}, "images", "invalid_value"),
        ({"images": ["image"] * 33}, "images", "invalid_value"),
        ({"image": "image", "task": "READ"}, "task", "invalid_value"),
        ({"image": "image", "tasks": ["OD", "READ"]}, "tasks.1", "invalid_value"),
        ({"image": "image", "task": "OD", "tasks": ["OCR"]}, "tasks", "invalid_value"),
        ({"image": "image", "task": "OPEN_VOCABULARY_DETECTION"}, "text", "missing_field"),
        ({"image": "image", "tasks": ["OD", "REFERRING_EXPRESSION_SEGMENTATION"]}, "text", "missing_field"),
        ({"image": "image", "task": "OPEN_VOCABULARY_DETECTION", "text": " \n"}, "text", "invalid_value"),
        ({"image": "image", "task": "OD", "text": "a car"}, "text", "invalid_value"),
        ({"image": "image", "task": "REGION_TO_OCR"}, "region", "missing_field"),
        ({"image": "image", "task": "REGION_TO_OCR", "text": "a", "region": BOX}, "text", "invalid_value"),
        ({"image": "image", "task": "OCR", "region": BOX}, "region", "invalid_value"),
        ({"image": "image", "task": "REGION_TO_OCR", "region": BOX[:3]}, "region", "invalid_value"),
        ({"image": "image", "task": "REGION_TO_OCR", "region": ["a"] * 4}, "region.0", "invalid_value"),
        ({"image": "image", "num_beams": 9}, "num_beams", "invalid_value"),
        ({"image": "image", "max_tokens": 4097}, "max_tokens", "invalid_value"),
        ({"image": "image", "imgae": "image"}, "imgae", "unknown_field"),
    ],
)
def test_a_wrong_field_is_named(payload: dict[str, Any], param: str, code: str) -> None:
    assert refused(schemas.Florence2Request, payload) == (param, code)


@pytest.mark.parametrize(
    ("fields", "tasks"),
    [
        ({"task": "OD"}, ["OD"]),
        ({"task": "<OD>"}, ["OD"]),
        ({"tasks": ["od", " <ocr> "]}, ["OD", "OCR"]),
        ({}, ["OCR"]),
        ({"task": None, "tasks": None, "num_beams": None, "annotate": None, "text": None}, ["OCR"]),
    ],
)
def test_tasks_may_be_written_as_the_model_writes_them(fields: dict[str, Any], tasks: list[str]) -> None:
    assert validate(schemas.Florence2Request, {"image": "image", **fields}).all_tasks == tasks


def test_remote_code_cannot_be_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "false")
    assert read_settings(schemas.Settings).trust_remote_code is False
    monkeypatch.setenv("TRUST_REMOTE_CODE", "true")
    with pytest.raises(StartError, match=r"TRUST_REMOTE_CODE='true': .* runs no code"):
        read_settings(schemas.Settings)
