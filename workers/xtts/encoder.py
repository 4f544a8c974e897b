"""Samples as one continuous audio file, whose bytes are ready while the rest is synthesised."""

from __future__ import annotations

import io
import struct

import numpy as np
import soundfile
from numpy.typing import NDArray

_UNKNOWN = 0xFFFFFFFF  # the size of a WAV file that is streamed, as ffmpeg writes it


class StreamEncoder:
    """One encoder for all of an answer, which can be read from its first byte on.

    rate: of the samples, in Hz. format: wav, mp3, opus, flac or pcm. WAV and PCM have 16 bits.
    """

    def __init__(self, rate: int, format: str) -> None:
        self.sink = _Sink()
        if format == "wav":
            self.sink.write(_wav_header(rate))
        kind = {"opus": ("OGG", "OPUS"), "wav": ("RAW", "PCM_16"), "pcm": ("RAW", "PCM_16")}
        container, subtype = kind.get(format, (format, None))
        # Without a header the duration of an MP3 follows from its constant bit rate, 80 kbit/s at 24 kHz.
        options = {"bitrate_mode": "CONSTANT", "compression_level": 0.5} if format == "mp3" else {}
        self.file = soundfile.SoundFile(self.sink, "w", rate, 1, subtype, format=container, **options)

    def encode(self, samples: NDArray[np.float32], last: bool) -> bytes:
        """The bytes that are complete with these samples (-1 to 1, clipped); none may follow the last."""
        self.file.write(np.clip(samples, -1, 1))
        if last:
            self.file.close()
        return self.sink.drain()


class _Sink(io.RawIOBase):
    """A file that is drained while it is written.

    The encoders of FLAC and MP3 go back to their header at the end, with the number of samples. That header
    has been sent: what is written before the end of the file is dropped.
    """

    def __init__(self) -> None:
        self.ready = bytearray()
        self.position = self.size = 0

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.position == self.size:
            self.ready += data
            self.size += len(data)
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def drain(self) -> bytes:
        data, self.ready = bytes(self.ready), bytearray()
        return data


def _wav_header(rate: int) -> bytes:
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, rate * 2, 2, 16)  # PCM, mono, 16 bits
    return struct.pack("<4sI4s", b"RIFF", _UNKNOWN, b"WAVE") + form + struct.pack("<4sI", b"data", _UNKNOWN)
