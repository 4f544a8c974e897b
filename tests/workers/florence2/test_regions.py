"""Location tokens, parsed answers and drawings."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.errors import JobError
from tools.models import tiny_florence2 as tiny
from tools.workers import load_module

regions = load_module("florence2", "regions")
TASKS = load_module("florence2", "schemas").TASKS


@pytest.mark.parametrize(
    ("region", "size", "tokens"),
    [
        ([0, 0, 640, 480], (640, 480), (0, 0, 999, 999)),
        ([64, 96, 320, 384], (640, 480), (100, 200, 500, 800)),
        ([0.5, 0.5, 1.99, 2.0], (1000, 2000), (0, 0, 1, 1)),
        ([0, 0, 1, 1], (1, 1), (0, 0, 999, 999)),
        ([4999, 0, 5000, 1], (5000, 1), (999, 0, 999, 999)),
    ],
)
def test_a_box_in_pixels_becomes_thousandths(
    region: list[float], size: tuple[int, int], tokens: tuple[int, ...]
) -> None:
    assert regions.location_tokens(region, *size) == tiny.locations(*tokens)


@pytest.mark.parametrize(
    "region",
    [[0, 0, 641, 480], [0, 0, 640, 481], [-1, 0, 5, 5], [5, 5, 5, 6], [6, 5, 5, 6], [0, 0, float("nan"), 1]],
)
def test_a_box_outside_the_image_is_refused(region: list[float]) -> None:
    with pytest.raises(JobError, match="640 x 480") as caught:
        regions.location_tokens(region, 640, 480)
    assert caught.value.param == "region"


DRAWN = [
    {"bboxes": [[20, 40, 120, 160]], "labels": ["car"]},
    {"quad_boxes": [[20, 40, 120, 40, 120, 160, 20, 160]], "labels": ["line of text"]},
    {"polygons": [[[20, 40, 120, 40, 120, 160, 20, 160]]], "labels": [""]},
    {"bboxes": [[20, 40, 120, 160]], "bboxes_labels": ["a"], "polygons": [], "polygons_labels": []},
    {"bboxes": [], "bboxes_labels": [], "polygons": [[[20, 40, 120, 160]]], "polygons_labels": ["é漢\nx"]},
]


@pytest.mark.parametrize("answer", DRAWN)
def test_regions_are_drawn_where_they_are(answer: dict[str, Any]) -> None:
    """The image to draw on is half the size of the image that the coordinates are of."""
    small = Image.new("RGB", (200, 200), "white")
    image = regions.draw_regions(small, answer, 400, 400)
    assert image.size == (200, 200)
    for corner in ((10, 20), (60, 80)):
        assert image.getpixel(corner) != (255, 255, 255), "two corners, or the ends of a line"
        assert small.getpixel(corner) == (255, 255, 255), "the original is unchanged"
    assert image.getpixel((100, 150)) == (255, 255, 255)


# ---- the parser, with the processor of the tiny model -------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize("colour", [0, 1])
def test_answers_are_parsed_as_the_library_does(processor: Any, colour: int) -> None:
    for prompt, answers in tiny.ANSWERS.items():
        raw, task = answers[colour], prompt[1 : prompt.index(">")]
        if raw.isascii():
            expected = processor.post_process_generation(text=raw, task=f"<{task}>", image_size=(640, 480))
            assert regions.parse_answer(processor, raw, task, (640, 480)) == expected


@pytest.mark.engine
@pytest.mark.parametrize(
    "label", ["café", "漢字", "a\\b", "back\\\\n", "\\u0041", "🤗 ok", "x\ny", "a < b > c", "<b>"]
)
def test_labels_are_returned_as_generated(processor: Any, label: str) -> None:
    for task in ("OD", "OCR_WITH_REGION", "CAPTION_TO_PHRASE_GROUNDING", "OPEN_VOCABULARY_DETECTION"):
        raw = label + tiny.locations(*range(8 if task == "OCR_WITH_REGION" else 4))
        answer = regions.parse_answer(processor, raw, task, (640, 480))[f"<{task}>"]
        assert (answer.get("labels") or answer["bboxes_labels"]) == [label]
    assert regions.parse_answer(processor, label, "CAPTION", (640, 480)) == {"<CAPTION>": label}


@pytest.mark.engine
@pytest.mark.parametrize("task", ["OD", "OCR_WITH_REGION", "CAPTION_TO_PHRASE_GROUNDING"])
@pytest.mark.parametrize("incomplete", ["<loc_10>", "car<loc_10>", "car<loc_10><loc_11>"])
def test_an_incomplete_box_leaves_nothing_in_the_next_label(
    processor: Any, task: str, incomplete: str
) -> None:
    raw = f"{incomplete}dog" + tiny.locations(*range(8 if task == "OCR_WITH_REGION" else 4))
    answer = regions.parse_answer(processor, raw, task, (1000, 1000))[f"<{task}>"]
    assert answer["labels"] == ["dog"]
    expected = [0, 1, 2, 3, 4, 5, 6, 7] if task == "OCR_WITH_REGION" else [0, 1, 2, 3]
    (box,) = answer.get("quad_boxes") or answer["bboxes"]
    assert [round(value) for value in np.ravel(box)] == expected


@pytest.mark.engine
def test_any_output_of_the_model_can_be_parsed(processor: Any) -> None:
    """Truncated and disordered answers: half a point at a polygon's end stops the library's own parser."""
    rng = random.Random(0)
    parts = ["car", "é", "<sep>", "<poly>", "</poly>", "<and>", " ", "<", ">", "\\", "the", "<loc_5", "\n"]
    parts += ["<loc_1>", "<loc_999>", "<loc_20>"] * 5
    for number in range(3000):
        task = TASKS[number % 15]
        raw = "".join(rng.choices(parts, k=rng.randrange(14)))
        parsed = regions.parse_answer(processor, raw, task, (rng.randint(1, 50), 480))
        json.dumps(parsed)
        for outline, label in regions.outlines(parsed[f"<{task}>"]):
            assert all(0 <= x < 50 and 0 <= y < 480 for x, y in outline)
            assert not re.search(r"<loc_\d+>|<sep>|poly>", label)
