"""Images for the tiny model, and the fields of a request for each of its prompts."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from tools.models import tiny_florence2 as tiny
from tools.workers import load_module

schemas = load_module("florence2", "schemas")

SIZE = (640, 480)
BOX = [64, 96, 320, 384]  # tiny.REGION in an image of SIZE


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    """The image as base64 of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return base64.b64encode(buffer.getvalue()).decode()


RED, BLUE = (encoded(Image.new("RGB", SIZE, colour)) for colour in tiny.COLOURS)


def fields_of(prompt: str) -> dict[str, Any]:
    """The fields of a request that makes the prompt of one of tiny.ANSWERS."""
    task = prompt[1 : prompt.index(">")]
    if task in schemas.TEXT_TASKS:
        return {"task": task, "text": tiny.TEXT}
    return {"task": task, "region": BOX} if task in schemas.REGION_TASKS else {"task": task}


CASES = [
    ({"image": image, **fields_of(prompt)}, answer)
    for prompt, pair in tiny.ANSWERS.items()
    for image, answer in zip((RED, BLUE), pair, strict=True)
]
