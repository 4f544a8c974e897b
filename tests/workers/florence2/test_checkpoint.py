"""Which checkpoints are loaded, under which names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.errors import StartError
from tools.workers import load_module

checkpoint = load_module("florence2", "checkpoint")


@pytest.mark.parametrize(
    ("given", "served"),
    [
        ("microsoft/Florence-2-large", "florence-community/Florence-2-large"),
        ("microsoft/Florence-2-base-ft", "florence-community/Florence-2-base-ft"),
        ("Microsoft/florence-2-base", "florence-community/florence-2-base"),
        ("microsoft/Florence-2-huge", "microsoft/Florence-2-huge"),
        ("someone/Florence-2-large", "someone/Florence-2-large"),
        ("/models/microsoft/Florence-2-large", "/models/microsoft/Florence-2-large"),
    ],
)
def test_microsofts_names_stand_for_the_native_checkpoints(given: str, served: str) -> None:
    assert checkpoint.native_name(given) == served


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (
            {"model_type": "florence2", "text_config": {"model_type": "florence2_language"}},
            "needs_remote_code",
        ),
        ({"model_type": "florence2", "vision_config": {"model_type": "davit"}}, "needs_remote_code"),
        ({"model_type": "llava"}, "unsupported_architecture"),
        ({}, "unsupported_architecture"),
    ],
)
def test_other_checkpoints_are_refused(tmp_path: Path, config: dict[str, Any], code: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartError, match="some/model") as caught:
        checkpoint.check_native(tmp_path, "some/model")
    assert caught.value.code == code
