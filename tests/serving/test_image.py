"""Images of every kind that a client may send, drawn with PIL, and files that are no images."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from serving.image import IMAGE_FORMATS, encode_image, load_image
from shared.decoding import decode_base64
from shared.errors import JobError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def half_and_half(mode: str = "RGB") -> Image.Image:
    """Left red, right blue, 32 x 16."""
    image = Image.new("RGB", (32, 16), RED)
    image.paste(BLUE, (16, 0, 32, 16))
    return image.convert(mode)


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int) -> bytes:
    """A grey 8-bit PNG of zeros, compressed row by row."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def refusal(data: bytes, **limits: int) -> JobError:
    with pytest.raises(JobError) as caught:
        load_image(data, param="images.0", **limits)
    assert caught.value.param == "images.0"
    assert caught.value.message.startswith("images.0: ")
    return caught.value


MODES = [(format, mode) for format in IMAGE_FORMATS for mode in ("RGB", "L", "RGBA")]
MODES = [*(case for case in MODES if case != ("JPEG", "RGBA")), ("JPEG", "CMYK"), ("TIFF", "CMYK")]


@pytest.mark.parametrize(("format", "mode"), MODES)
def test_every_format_becomes_rgb(format: str, mode: str) -> None:
    image = load_image(encoded(half_and_half(mode), format))
    assert (image.mode, image.size) == ("RGB", (32, 16))
    grey = np.asarray(half_and_half("L").convert("RGB"), "int16")
    expected = grey if mode == "L" else np.asarray(half_and_half(), "int16")
    inner = np.r_[2:14, 18:30]  # lossy formats smear the edge
    assert np.abs(np.asarray(image, "int16") - expected)[:, inner].max() <= 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """The same scene as a camera stores it in each orientation; red must come out on the left again."""
    upright = half_and_half()
    turn = Image.Transpose
    stored = {
        1: upright,
        2: upright.transpose(turn.FLIP_LEFT_RIGHT),
        3: upright.transpose(turn.ROTATE_180),
        4: upright.transpose(turn.FLIP_TOP_BOTTOM),
        5: upright.transpose(turn.TRANSPOSE),
        6: upright.transpose(turn.ROTATE_90),
        7: upright.transpose(turn.TRANSVERSE),
        8: upright.transpose(turn.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(encoded(stored, "PNG", exif=exif))
    assert image.size == (32, 16)
    assert (image.getpixel((2, 8)), image.getpixel((29, 8))) == (RED, BLUE)
    assert image.getexif().get(0x0112, 1) == 1, "a second reader would turn it again"


def test_a_broken_exif_block_is_ignored() -> None:
    image = load_image(encoded(half_and_half(), "JPEG", exif=b"Exif\x00\x00garbage" * 3, quality=95))
    assert image.size == (32, 16)


def transparent(mode: str) -> bytes:
    """The left half red, the right half nothing at all."""
    image = Image.new("RGBA", (32, 16), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (16, 0, 32, 16))
    if mode == "P":
        palette = half_and_half().quantize(2)
        return encoded(palette, "PNG", transparency=palette.getpixel((29, 8)))
    if mode == "P with alpha":
        palette = half_and_half().quantize(2)
        alpha = [255, 255]
        alpha[palette.getpixel((29, 8))] = 0
        return encoded(palette, "PNG", transparency=bytes(alpha))
    if mode == "RGB with a colour key":
        return encoded(half_and_half(), "PNG", transparency=BLUE)
    return encoded(image.convert(mode))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "P with alpha", "RGB with a colour key"])
def test_transparency_becomes_white(mode: str) -> None:
    image = load_image(transparent(mode))
    assert image.mode == "RGB"
    assert image.getpixel((29, 8)) == WHITE
    assert image.getpixel((2, 8)) == ((76, 76, 76) if mode == "LA" else RED)
    half = load_image(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128))))
    assert half.getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize(
    ("format", "kind", "values", "expected"),
    [
        ("PNG", "uint16", [0, 0x80FF, 0xFFFF, 255], [0, 0x80, 255, 0]),  # 16 bits keep their high byte
        ("TIFF", "uint16", [0, 0x80FF, 0xFFFF, 255], [0, 0x80, 255, 0]),
        ("TIFF", "float32", [0, 0.25, 0.5, 1], [0, 64, 128, 255]),  # floats up to 1 are scaled
        ("TIFF", "float32", [-1, 0.5, 128, 300], [0, 0, 128, 255]),  # others are clipped
        ("TIFF", "float32", [0, 0, 0, 0], [0] * 4),
    ],
)
def test_values_of_more_than_8_bits(format: str, kind: str, values: list[float], expected: list[int]) -> None:
    image = load_image(encoded(Image.fromarray(np.array([values], kind)), format))
    assert [image.getpixel((x, 0)) for x in range(4)] == [(value,) * 3 for value in expected]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation_is_decoded(format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(np.array(load_image(data).getpixel((8, 8))) - RED).max() <= 12


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png_of(10_000, 10_000)
    assert 90_000 < len(data) < 110_000
    decoded: list[Any] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image))
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        error = refusal(data)
    assert (error.code, decoded, seen) == ("too_large", [], [])
    assert "50000000 pixels" in error.message
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (2**31 - 1, 2**31 - 1), (60_000_000, 1)])
def test_larger_sizes_in_a_header_are_refused_too(width: int, height: int) -> None:
    data = png_of(1, 1)
    header = chunk(b"IHDR", struct.pack(">II", width, height) + data[24:29])
    assert refusal(data[:8] + header + data[33:]).code == "too_large"


def test_the_pixel_limit_is_exact() -> None:
    data = encoded(Image.new("L", (10, 10)))
    assert load_image(data, max_pixels=100).size == (10, 10)
    assert refusal(data, max_pixels=99).code == "too_large"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 1000,
        b"%PDF-1.7\n" + bytes(range(256)) * 4,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\x89PNG\r\n\x1a\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    ],
)
def test_other_files_are_refused_with_the_formats_to_send(data: bytes) -> None:
    error = refusal(data)
    assert error.code == "bad_image"
    assert "PNG, JPEG" in error.message


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_an_image_cut_short_is_refused(format: str) -> None:
    noise = Image.frombytes("RGB", (64, 64), np.random.default_rng(0).bytes(64 * 64 * 3))
    data = encoded(noise, format)
    assert refusal(data[: len(data) // 2]).code == "bad_image"


SAMPLES = [encoded(half_and_half(), format) for format in IMAGE_FORMATS] + [transparent("P with alpha")]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SAMPLES), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8))
def test_a_damaged_image_is_read_or_refused(sample: bytes, damage: list[tuple[int, int]]) -> None:
    data = bytearray(sample)
    for position, value in damage:
        data[position % len(data)] = value
    try:
        assert load_image(bytes(data), max_pixels=1_000_000).mode == "RGB"
    except JobError as error:
        assert error.code in ("bad_image", "too_large")  # noqa: PT017


def test_pils_warnings_do_not_leak_from_threads() -> None:
    """A PNG that claims to be an animation of no frames: PIL warns of it and reads it."""
    plain = encoded(half_and_half())
    data = plain[:33] + chunk(b"acTL", bytes(8)) + plain[33:]
    with pytest.warns(UserWarning, match="Invalid APNG"):
        Image.open(io.BytesIO(data))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(4) as pool:
            images = list(pool.map(load_image, [data] * 20))
    assert seen == []
    assert all(image.size == (32, 16) for image in images)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_encoded_images_come_back(format: str) -> None:
    text = encode_image(half_and_half(), format)
    assert base64.b64decode(text, validate=True) == decode_base64(text, param="x")
    image = load_image(decode_base64(text, param="x"))
    assert image.size == (32, 16)
    if format == "PNG":
        assert image.tobytes() == half_and_half().tobytes()
