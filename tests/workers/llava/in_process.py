"""The llava worker in the process of the tests, and images for it. The model knows four colours."""

from __future__ import annotations

import base64
import io
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

from PIL import Image

from tests import helpers
from tools.models.tiny_llava import ANSWERS, QUESTIONS

WHAT, DESCRIBE = QUESTIONS


def encoded(image: Image.Image, **save: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **save})
    return base64.b64encode(buffer.getvalue()).decode()


def png(colour: Any, size: tuple[int, int] = (64, 48), mode: str = "RGB", **save: Any) -> str:
    return encoded(Image.new(mode, size, colour), **save)


def data_uri(colour: str) -> str:
    return f"data:image/png;base64,{png(colour)}"


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def question(colour: str, text: str = WHAT) -> list[dict[str, Any]]:
    """Messages with an image of one colour and a question about it."""
    return [{"role": "user", "content": [image_part(data_uri(colour)), text_part(text)]}]


def answer_to(colour: str) -> str:
    """What the model generates for an image of one colour."""
    return " " + ANSWERS[colour]


def serving(**env: str) -> AbstractContextManager[ModuleType]:
    return helpers.serving("llava", **env)
