"""The tables of the READMEs, from pydantic models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field

from tools import docs
from tools.workers import load_module


class Part(BaseModel):
    size: int = Field(ge=1, le=9, description="How much")


class Example(BaseModel):
    name: str = Field(description="A name | or two", min_length=1)
    form: Literal["float", "base64"] = Field("float", description="The form")
    share: float | None = Field(None, gt=0, lt=1)
    parts: list[Part] = Field(default=[], max_length=4, description="Parts")
    one: Part = Part(size=2)


class Answer(BaseModel):
    count: int = Field(description="How many")


def test_model_table() -> None:
    assert docs.model_table(Example, "Field").splitlines() == [
        "| Field | Type | Default | Description |",
        "| --- | --- | --- | --- |",
        "| `name` | string, not empty | required | A name \\| or two |",
        "| `form` | `float`, `base64` | `float` | The form |",
        "| `share` | number, more than 0, less than 1 | unset |  |",
        "| `parts` | list of object, at most 4 items | `[]` | Parts |",
        "| `parts[].size` | integer, 1 to 9 | required | How much |",
        '| `one` | object | `{"size": 2}` |  |',
        "| `one.size` | integer, 1 to 9 | required | How much |",
    ]
    assert docs.model_table(Answer, "Field").splitlines()[0] == "| Field | Type | Description |"


def test_render_writes_between_its_markers_and_nowhere_else() -> None:
    module = load_module("sentence-transformers", "schemas")
    text = "before\n<!-- settings -->\nold\n<!-- /settings -->\nafter\n"
    new = docs.render(text, module)
    assert new.startswith("before\n<!-- settings -->\n| Variable |")
    assert new.endswith("<!-- /settings -->\nafter\n")
    assert "`HF_TOKEN`" in new
    assert docs.render(new, module) == new


def test_a_marker_of_a_model_that_was_renamed_names_those_that_there_are(tmp_path: Path) -> None:
    for name in ("README.md", "HTTP.md"):
        (tmp_path / name).touch()
    page = tmp_path / "workers/sentence-transformers/README.md"
    page.parent.mkdir(parents=True)
    page.write_text("<!-- fields OldRequest -->\n<!-- /fields -->")
    with pytest.raises(SystemExit) as caught:
        docs.stale(tmp_path)
    assert str(caught.value) == (
        "workers/sentence-transformers/README.md: a table cannot be written: "
        "workers/sentence-transformers/schemas.py has no model OldRequest. Its models: EmbedRequest, "
        "EmbedResponse, EmbeddingSettings, EmbeddingsRequest, EmbeddingsResponse, Settings."
    )
