"""Regions of an image: as the model's location tokens, as pixels of a parsed answer, drawn onto the image."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from shared.errors import invalid

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")
_MARKERS = re.compile(r"(<loc_\d+>|<sep>|</?poly>)")
_HALF_POINT = re.compile(r"(?<!\d>)<loc_\d+>(?=<sep>|</poly>|$)")


def location_tokens(region: Sequence[float], width: int, height: int) -> str:
    """The model's tokens, in thousandths, for a box in pixels of an image of width x height.

    Raises JobError for a box outside the image, or an empty one.
    """
    x1, y1, x2, y2 = region
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        box = f"{list(region)} is not a box [x1, y1, x2, y2] in an image of {width} x {height} pixels."
        raise invalid("region", box)
    sizes = (width, height, width, height)
    bins = [min(999, int(value * 1000 / size)) for value, size in zip(region, sizes, strict=True)]
    return "".join(f"<loc_{number}>" for number in bins)


def parse_answer(processor: Any, raw: str, task: str, size: tuple[int, int]) -> dict[str, Any]:
    """`{"<TASK>": ...}` as the processor parses it, in pixels of an image of `size`, (width, height).

    The processor drops what is not ASCII from labels, stops at a polygon of half a point, and prepends the
    rest of an incomplete box, `loc_10>`, to the next label.
    """
    # Only markers keep their angle brackets, so that in a label a bracket is the end of a marker.
    texts_and_markers = _MARKERS.split(raw)
    texts_and_markers[::2] = map(_escape, texts_and_markers[::2])
    text = _HALF_POINT.sub("", "".join(texts_and_markers))
    parsed: dict[str, Any] = processor.post_process_generation(text=text, task=f"<{task}>", image_size=size)
    return {prompt: _unescape(answer) for prompt, answer in parsed.items()}


def _escape(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii").replace("<", r"\x3c").replace(">", r"\x3e")


def _unescape(value: Any, *, label: bool = False) -> Any:
    if isinstance(value, str):
        text = value.rpartition(">")[2] if label else value
        return text.encode("ascii").decode("unicode_escape").strip()
    if isinstance(value, dict):
        return {key: _unescape(item, label=key.endswith("labels")) for key, item in value.items()}
    return [_unescape(item, label=label) for item in value] if isinstance(value, list) else value


def outlines(answer: Any) -> Iterator[tuple[list[tuple[float, float]], str]]:
    """The outlines in a parsed answer, corner by corner (x, y), each with its label."""
    if isinstance(answer, str):
        return
    for box, label in zip(
        answer.get("bboxes", ()), answer.get("labels") or answer.get("bboxes_labels", ()), strict=False
    ):
        x1, y1, x2, y2 = box
        yield [(x1, y1), (x2, y1), (x2, y2), (x1, y2)], label
    for quad, label in zip(answer.get("quad_boxes", ()), answer.get("labels", ()), strict=False):
        yield _points(quad), label
    labels = answer.get("labels") or answer.get("polygons_labels", ())
    for polygons, label in zip(answer.get("polygons", ()), labels, strict=False):
        for polygon in polygons:
            yield _points(polygon), label


def _points(coordinates: Sequence[float]) -> list[tuple[float, float]]:
    """[x, y, x, y, ...] as points."""
    return list(zip(coordinates[::2], coordinates[1::2], strict=True))


def draw_regions(image: Image.Image, answer: Any, width: int, height: int) -> Image.Image:
    """A copy of `image` with the outlines and labels of a parsed answer.

    width, height: of the image that the answer is about; `image` may be a smaller version of it.
    """
    image = image.copy()
    pen = ImageDraw.Draw(image)
    unit = max(image.size) / 400  # pixels
    font = ImageFont.load_default(size=max(10, round(5 * unit)))
    for number, (outline, label) in enumerate(outlines(answer)):
        points = [(x * image.width / width, y * image.height / height) for x, y in outline]
        if not points:
            continue
        colour = COLOURS[number % len(COLOURS)]
        pen.line([*points, points[0]], fill=colour, width=max(1, round(unit)), joint="curve")
        if label:
            top = min(points, key=lambda point: point[1])
            pen.rectangle(pen.textbbox(top, label, font=font), fill=colour)
            pen.text(top, label, fill="white", font=font)
    return image
