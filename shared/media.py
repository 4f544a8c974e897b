"""Media that a client sent, as objects in memory, and back: bytes, images, sound.

Every limit is checked before the work that it guards: bytes before base64 is decoded or a body is read,
pixels before an image is decoded, seconds before sound is where its header tells them, else while it is.
Nothing is written to disk. What cannot be read raises `JobError` with the field and the cause, and never
the text of a URL: passwords and signatures are in it.

`load_bytes` is a coroutine. The rest is plain and keeps a core busy: call it through `asyncio.to_thread`.

    data = await load_bytes(request.image, param="image")
    image = await asyncio.to_thread(load_image, data, param="image")
"""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import os
import re
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, unquote_to_bytes

from shared.errors import JobError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

MAX_BYTES = 50 * 2**20
MAX_PIXELS = 50_000_000
MAX_SECONDS = 3600.0

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # no EPS: PIL runs Ghostscript for it

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30}):")
_STANDARD = bytes.maketrans(b"-_", b"+/")
_SOCKET_TIMEOUT_S = 10.0
_FFMPEG_FORMATS = "mov,matroska,aac,amr,asf,mpegts,mp3,ogg,flac,wav"
_BLOCK = 2**16
# A pool of its own: servers that are slow must not keep the decoders of other jobs waiting.
_downloads = ThreadPoolExecutor(16, thread_name_prefix="download")


def decode_base64(text: str, *, param: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Decode base64 as the standard library's strict decoder does, after taking out ASCII white space,
    mapping the URL-safe alphabet to the standard one and adding missing padding.

    The two alphabets mixed in one text, padding that the last group does not need and any other character
    are refused.
    """
    try:
        packed = text.encode("ascii").translate(None, b" \t\n\r\v\f")
        body = packed.rstrip(b"=")
        if len(body) * 3 // 4 > max_bytes:
            raise _over(param, f"{max_bytes} bytes")
        padding = -len(body) % 4
        if len(packed) - len(body) > padding:
            raise ValueError("too much padding")
        if re.search(rb"[-_]", body) and re.search(rb"[+/]", body):
            raise ValueError("the standard and the URL-safe alphabet are mixed")
        return base64.b64decode(body.translate(_STANDARD) + b"=" * padding, validate=True)
    except UnicodeEncodeError:
        cause = "it is not ASCII"
    except ValueError as error:
        cause = str(error)
    raise _refused(param, f"not valid base64: {cause}", "bad_base64")


async def load_bytes(
    source: str, *, param: str, max_bytes: int = MAX_BYTES, timeout_s: float = 30.0
) -> bytes:
    """The bytes, at least one, of base64 text, of a `data:` URI or at an http(s) URL.

    URLs go through the SDK's download, which refuses addresses that are not public, behind redirects too.
    After `timeout_s`, or when the job is cancelled, this returns at once; the thread that reads ends with the
    next bytes that arrive, or after 10 s without any, and closes its connection.
    """
    source = source.strip()
    scheme = match[1].lower() if (match := _SCHEME.match(source)) else ""
    if scheme in ("http", "https"):
        data = await _download(source, param, max_bytes, timeout_s)
    elif scheme in ("", "data"):
        read = _read_data_uri if scheme else decode_base64
        data = await asyncio.to_thread(read, source, param=param, max_bytes=max_bytes)
    else:
        raise _refused(param, "neither base64 nor a data: URI nor an http(s) URL", "bad_url")
    if not data:
        raise _refused(param, "empty", "empty")
    return data


def load_image(data: bytes, *, param: str = "image", max_pixels: int = MAX_PIXELS) -> Image:
    """Decode an image (IMAGE_FORMATS) to RGB, upright by its EXIF orientation.

    Transparency is laid on white. Of an animation or a file of several pages the first is taken. 16 bits a
    channel become 8 by their high byte. CMYK is converted without its colour profile.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

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
        raise _over(param, f"{max_pixels} pixels") from None
    except UnidentifiedImageError:
        cause = "no image that this worker reads"
    except Exception:  # PIL's readers raise errors of every kind on broken files
        cause = "a damaged image, or one cut short"
    raise _refused(param, f"{cause}; send {', '.join(IMAGE_FORMATS)}", "bad_image")


def encode_image(image: Image, format: str = "PNG") -> str:
    """The image as base64 text of a format that PIL writes."""
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def load_audio(
    data: bytes,
    *,
    rate: int,
    param: str = "audio",
    max_seconds: float = MAX_SECONDS,
    allow_empty: bool = False,
) -> NDArray[np.float32]:
    """Decode sound to mono float32 at `rate` Hz, about -1 to 1, at least one sample.

    soundfile reads WAV, FLAC, MP3, OGG, Opus, AIFF and more; the rest (m4a, mp4, webm, aac, wma) PyAV
    reads. Of a file cut short comes the sound that is whole, where its format allows that.
    allow_empty: a whole file that holds no sample gives none, and is no error.
    """
    import numpy as np
    import soundfile

    # A file in memory: libsndfile stumbles over Python's own seeks.
    with os.fdopen(os.memfd_create("audio"), "wb") as file:
        file.write(data)
        file.seek(0)
        try:
            samples = _read_sound(file.fileno(), rate, param, max_seconds)
            if allow_empty and not samples.size:
                return samples
        except soundfile.LibsndfileError:
            samples = _read_with_av(file.fileno(), rate, param, max_seconds)
    if not samples.size or not np.isfinite(samples).all():
        cause = "samples that are no numbers" if samples.size else "no sound that this worker reads"
        raise _refused(param, f"{cause}; send WAV, FLAC, MP3, OGG or Opus", "bad_audio")
    return samples


def encode_audio(samples: NDArray[np.float32], rate: int, format: str = "wav") -> str:
    """Samples (-1 to 1, clipped; one dimension, or frames by channels) as base64 text.

    format: wav, flac, mp3, ogg (Vorbis), opus (8, 12, 16, 24 or 48 kHz only), pcm (16 bits, no header).
    """
    import soundfile

    special = {"opus": ("OGG", "OPUS"), "pcm": ("RAW", "PCM_16")}
    container, subtype = special.get(format, (format, None))
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, channels, subtype, format=container) as sound:
        for start in range(0, len(samples), _BLOCK):  # libsndfile crashes on one long write of Vorbis
            sound.write(samples[start : start + _BLOCK])
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _read_data_uri(uri: str, *, param: str, max_bytes: int) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma:
        raise _refused(param, "a data: URI without a comma", "bad_url")
    if head.lower().rstrip().endswith(";base64"):
        return decode_base64(unquote(body), param=param, max_bytes=max_bytes)
    if len(body) > 3 * max_bytes or len(data := unquote_to_bytes(body)) > max_bytes:
        raise _over(param, f"{max_bytes} bytes")
    return data


async def _download(url: str, param: str, max_bytes: int, timeout_s: float) -> bytes:
    abandoned = threading.Event()
    fetch = functools.partial(_fetch, url, param, max_bytes, min(timeout_s, _SOCKET_TIMEOUT_S), abandoned)
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.get_running_loop().run_in_executor(_downloads, fetch)
    except TimeoutError:
        raise _refused(param, f"the download took longer than {timeout_s:g} s", "download_timeout") from None
    finally:
        abandoned.set()


class _Abandoned(BaseException):
    """Nobody waits for this download any more. Not an Exception: HTTP libraries try again after those."""


def _fetch(url: str, param: str, max_bytes: int, patience_s: float, abandoned: threading.Event) -> bytes:
    from runpod.serverless.utils import rp_ssrf
    from urllib3.exceptions import HTTPError

    def leave_if_abandoned(*_: Any) -> None:
        if abandoned.is_set():
            raise _Abandoned

    headers = {"Accept-Encoding": "identity"}
    # A socket's time-out starts anew with each byte, and a server can trickle headers as well as a body. A
    # profile function is called in this thread at each call of Python, so after each wait on the socket.
    sys.setprofile(leave_if_abandoned)
    try:
        with rp_ssrf.safe_get(url, timeout=patience_s, headers=headers, max_bytes=max_bytes) as response:
            if response.status_code == 200:
                return b"".join(rp_ssrf.iter_content_capped(response, _BLOCK, max_bytes))
            cause = f"the server answered {response.status_code}"
    except rp_ssrf.SSRFError as error:
        if "size cap" in str(error):
            raise _over(param, f"{max_bytes} bytes") from None
        cause = re.sub(r"\S*://.*", "the URL", str(error).split(": ")[0], flags=re.DOTALL)
    except (OSError, ValueError, HTTPError) as error:  # their texts quote the URL
        cause = type(error).__name__
    finally:
        sys.setprofile(None)
    raise _refused(param, f"the download failed: {cause}", "download_failed")


def _read_sound(fd: int, rate: int, param: str, max_seconds: float) -> NDArray[np.float32]:
    import numpy as np
    import soundfile
    import soxr

    with soundfile.SoundFile(fd, closefd=False) as sound:
        if not 1_000 <= sound.samplerate <= 1_000_000:
            raise _refused(param, f"a sample rate of {sound.samplerate} Hz", "bad_audio")
        limit = int(max_seconds * sound.samplerate)
        if limit < sound.frames < 2**63 - 1:  # which is how libsndfile says unknown: FLAC written to a pipe
            raise _over(param, f"{max_seconds:g} seconds")
        sound.seekable = lambda: False  # else it seeks after each read, and fails at the end of such a FLAC
        resampler = soxr.ResampleStream(sound.samplerate, rate, 1, dtype="float32")
        pieces = []
        while len(block := sound.read(max(1, _BLOCK // sound.channels), dtype="float32", always_2d=True)):
            limit -= len(block)
            if limit < 0:
                raise _over(param, f"{max_seconds:g} seconds")
            pieces.append(resampler.resample_chunk(block.mean(axis=1)))
        pieces.append(resampler.resample_chunk(np.zeros(0, "float32"), last=True))
    return np.concatenate(pieces)


def _read_with_av(fd: int, rate: int, param: str, max_seconds: float) -> NDArray[np.float32]:
    """No samples where PyAV cannot read it; of a damaged file those before the damage."""
    import av
    import numpy as np

    limit = int(max_seconds * rate)
    pieces = [np.zeros(0, np.float32)]
    options = {"format_whitelist": _FFMPEG_FORMATS, "protocol_whitelist": "none"}
    os.lseek(fd, 0, os.SEEK_SET)
    with (
        suppress(av.FFmpegError, IndexError, ValueError, EOFError),
        os.fdopen(os.dup(fd), "rb") as file,
        av.open(file, options=options, metadata_errors="ignore") as container,
    ):
        resampler = av.AudioResampler("fltp", None, rate)  # its own mono is 1.41 times too loud
        frames = container.decode(container.streams.audio[0])
        with suppress(av.FFmpegError, EOFError):
            for frame in frames:
                for part in resampler.resample(frame):
                    pieces.append(part.to_ndarray().mean(axis=0))
                    limit -= len(pieces[-1])
                if limit < 0:
                    raise _over(param, f"{max_seconds:g} seconds")
        pieces += [part.to_ndarray().mean(axis=0) for part in resampler.resample(None)]
    return np.concatenate(pieces)


def _refused(param: str, cause: str, code: str) -> JobError:
    return JobError(f"{param}: {cause}.", param=param, code=code)


def _over(param: str, limit: str) -> JobError:
    return _refused(param, f"over the limit of {limit}", "too_large")
