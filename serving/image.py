"""Images that a client sent as RGB, and RGB images as base64 of a file.

The functions block: call them through `asyncio.to_thread`.
"""

from __future__ import annotations

import base64
import io
import warnings
from contextlib import suppress

from PIL import Image, ImageOps, UnidentifiedImageError

from shared.decoding import too_large
from shared.errors import invalid

MAX_PIXELS = 50_000_000
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # no EPS: PIL runs Ghostscript for it


def load_image(data: bytes, *, param: str = "image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image (IMAGE_FORMATS) to RGB, upright by its EXIF orientation.

    Of an animation or a file of several pages, the first is decoded. Transparency becomes white. Integers of
    16 and 32 bits become 8 bits by dropping the lowest 8; floats up to 1 are multiplied by 255, others are
    clipped to 0..255. CMYK is converted without its colour profile.

    param: the request's field, for errors. Raises JobError, code "too_large" or "bad_image".
    """
    # A warning of PIL about a client's file helps nobody; catch_warnings is not safe among threads.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if image.width * image.height > max_pixels:
            raise Image.DecompressionBombError  # as PIL does at its own, higher limit
        image.load()
        with suppress(Exception):  # a broken EXIF block does not affect the pixels
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except Image.DecompressionBombError:
        raise too_large(param, f"{max_pixels} pixels") from None
    except UnidentifiedImageError:
        cause = "not an image that this worker reads"
    except Exception:  # PIL's decoders raise errors of every kind on broken files
        cause = "a damaged or truncated image"
    raise invalid(param, f"{cause}; send {', '.join(IMAGE_FORMATS)}.", "bad_image")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any of PIL's modes as RGB of 8 bits a channel."""
    if image.mode.startswith("I"):  # integers of 16 or 32 bits
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode == "F" and image.getextrema()[1] <= 1:  # type: ignore[operator]
        image = image.point(lambda value: value * 255 + 0.5).convert("L")
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
    return image.convert("RGB")


def encode_image(image: Image.Image, format: str = "PNG") -> str:
    """The image as base64 of a file in `format`, one that PIL writes."""
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
