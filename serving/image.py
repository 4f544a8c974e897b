"""Pictures that a client sent as RGB images, and images as a file.

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

    Transparency is laid on white. Of an animation or a file of several pages the first is taken. 16 bits a
    channel become 8 by their high byte. CMYK is converted without its colour profile.
    """
    from PIL import Image

    # PIL's remarks on a client's file help nobody; catch_warnings would not be safe among threads.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if image.width * image.height > max_pixels:
            raise Image.DecompressionBombError  # as PIL itself does, at its own limit
        image.load()
        with suppress(Exception):  # a broken EXIF block says nothing about the pixels
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        elif image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.new("RGB", layer.size, "white")
            image.paste(layer, mask=layer.getchannel("A"))
        return image.convert("RGB")
    except Image.DecompressionBombError:
        raise too_large(param, f"{max_pixels} pixels") from None
    except UnidentifiedImageError:
        cause = "no image that this worker reads"
    except Exception:  # PIL's readers raise errors of every kind on broken files
        cause = "a damaged image, or one cut short"
    raise invalid(param, f"{cause}; send {', '.join(IMAGE_FORMATS)}.", "bad_image")


def encode_image(image: Image.Image, format: str = "PNG") -> str:
    """The image as base64 text of a format that PIL writes."""
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
