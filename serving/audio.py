"""Audio files to samples, and samples to audio files.

The functions block: call them through `asyncio.to_thread`.
"""

from __future__ import annotations

import base64
import io
import os
from contextlib import suppress

import av
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from shared.decoding import too_large
from shared.errors import invalid

MAX_SECONDS = 3600.0
# FFmpeg's demuxers that are tried. None of them opens another file, as those of playlists do.
FFMPEG_FORMATS = (
    "mov,matroska,aac,amr,asf,mpegts,mp3,ogg,flac,wav,avi,flv,mpeg,ac3,eac3,dts,aiff,au,caf,w64,wv,ape,tta,rm"
)
READABLE = (
    "WAV, FLAC, MP3, OGG, Opus, AIFF, M4A, MP4, MOV, WebM, MKV, AAC, WMA, AMR, AVI, FLV, MPEG, AC-3 and more"
)
_BLOCK = 2**16


def load_audio(
    data: bytes, *, rate: int, param: str = "audio", max_seconds: float = MAX_SECONDS
) -> NDArray[np.float32]:
    """Decode an audio file to mono float32 samples at `rate` Hz, about -1 to 1, at least one.

    soundfile reads WAV, FLAC, MP3, OGG, Opus, AIFF and more; PyAV the rest (m4a, mp4, webm, aac, wma), and
    what soundfile reads no sample of, such as a WAV whose header has lengths of 0. A truncated file is
    decoded up to its end, where its format allows that.
    param: the request's field, for errors. Raises JobError(code="bad_audio" or "too_large").
    """
    samples = np.zeros(0, np.float32)
    # A file in memory: libsndfile fails with the seeks of Python's own file objects.
    with os.fdopen(os.memfd_create("audio"), "wb") as file:
        file.write(data)
        file.seek(0)
        with suppress(soundfile.LibsndfileError):
            samples = _read_with_soundfile(file.fileno(), rate, param, max_seconds)
        if not samples.size:
            samples = _read_with_av(file.fileno(), rate, param, max_seconds)
    if not samples.size:
        cause = "no audio that this worker can read, or an empty one"
    elif not np.isfinite(samples).all():
        cause = "samples that are not numbers"
    else:
        return samples
    raise invalid(param, f"{cause}; it reads {READABLE}.", "bad_audio")


def encode_audio(samples: NDArray[np.float32], rate: int, format: str = "wav") -> str:
    """Samples (-1 to 1, clipped; one dimension, or frames by channels) as base64 text.

    format: wav, flac, mp3, ogg (Vorbis), opus (8, 12, 16, 24 or 48 kHz only), pcm (16 bits, no header).
    """
    special = {"opus": ("OGG", "OPUS"), "pcm": ("RAW", "PCM_16")}
    container, subtype = special.get(format, (format, None))
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, channels, subtype, format=container) as sound:
        for start in range(0, len(samples), _BLOCK):  # libsndfile crashes on one long write of Vorbis
            sound.write(samples[start : start + _BLOCK])
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _read_with_soundfile(fd: int, rate: int, param: str, max_seconds: float) -> NDArray[np.float32]:
    with soundfile.SoundFile(fd, closefd=False) as sound:
        if not 1_000 <= sound.samplerate <= 1_000_000:
            raise invalid(param, f"a sample rate of {sound.samplerate} Hz.", "bad_audio")
        limit = int(max_seconds * sound.samplerate)
        if limit < sound.frames < 2**63 - 1:  # the largest number: unknown, as in FLAC written to a pipe
            raise too_large(param, f"{max_seconds:g} seconds")
        sound.seekable = lambda: False  # soundfile seeks after each read, which fails at such a FLAC's end
        resampler = soxr.ResampleStream(sound.samplerate, rate, 1, dtype="float32")
        blocks = []
        while len(block := sound.read(max(1, _BLOCK // sound.channels), dtype="float32", always_2d=True)):
            limit -= len(block)
            if limit < 0:
                raise too_large(param, f"{max_seconds:g} seconds")
            blocks.append(resampler.resample_chunk(block.mean(axis=1)))
        blocks.append(resampler.resample_chunk(np.zeros(0, "float32"), last=True))
    return _joined(blocks)


def _read_with_av(fd: int, rate: int, param: str, max_seconds: float) -> NDArray[np.float32]:
    """The samples of a damaged file before the damage; none of a file that PyAV cannot read."""
    limit = int(max_seconds * rate)
    blocks: list[NDArray[np.float32]] = []
    options = {"format_whitelist": FFMPEG_FORMATS, "protocol_whitelist": "none"}
    os.lseek(fd, 0, os.SEEK_SET)
    with (
        suppress(av.FFmpegError, IndexError, ValueError, EOFError),
        os.fdopen(os.dup(fd), "rb") as file,
        av.open(file, options=options, metadata_errors="ignore") as container,
    ):
        resampler = av.AudioResampler("fltp", None, rate)  # PyAV's mono is 1.41 times too loud
        frames = container.decode(container.streams.audio[0])
        with suppress(av.FFmpegError, EOFError):
            for frame in frames:
                for part in resampler.resample(frame):
                    blocks.append(part.to_ndarray().mean(axis=0))
                    limit -= len(blocks[-1])
                if limit < 0:
                    raise too_large(param, f"{max_seconds:g} seconds")
        blocks += [part.to_ndarray().mean(axis=0) for part in resampler.resample(None)]
    return _joined(blocks)


def _joined(blocks: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The blocks in one array, copied one by one.

    numpy's concatenate holds the interpreter lock, and so stops the event loop, for 0.1 s with an hour.
    """
    samples = np.empty(sum(map(len, blocks)), np.float32)
    end = 0
    for block in blocks:
        start, end = end, end + len(block)
        samples[start:end] = block
    return samples
