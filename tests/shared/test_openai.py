"""Parts of OpenAI answers, held to the client's own models."""

from __future__ import annotations

import json

import pytest
from openai.types import CompletionUsage
from openai.types import Model as ClientModel

from shared.errors import JobError
from shared.openai import DONE, OpenAIRequest, check_model, model_list, sse, usage


class Ask(OpenAIRequest):
    model: str


def test_unknown_fields_are_ignored() -> None:
    assert Ask.model_validate({"model": "m", "metadata": {}}) == Ask(model="m")


def test_the_models_are_those_of_the_client() -> None:
    listed = model_list("org/model", "adapter").model_dump()
    assert listed["object"] == "list"
    models = [ClientModel.model_validate(model, strict=True) for model in listed["data"]]
    assert [(model.id, model.owned_by) for model in models] == [("org/model", "org"), ("adapter", "runpod")]
    counted = CompletionUsage.model_validate(usage(3, 4).model_dump(), strict=True)
    assert (counted.prompt_tokens, counted.completion_tokens, counted.total_tokens) == (3, 4, 7)


@pytest.mark.parametrize("name", [None, "org/Model", "ORG/model", "model"])
def test_a_served_model_is_accepted(name: str | None) -> None:
    check_model(name, "org/model", "model")


def test_any_other_model_is_refused() -> None:
    with pytest.raises(JobError, match=r"^model: 'gpt' is not served here\. Use 'org/model'\.$") as caught:
        check_model("gpt", "org/model", "model")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_events_are_lines_of_data() -> None:
    event = sse(usage(1, 2))
    assert event.endswith("\n\n")
    assert json.loads(event.removeprefix("data: "))["total_tokens"] == 3
    assert DONE == "data: [DONE]\n\n"
