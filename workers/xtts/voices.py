"""Built-in voices, and voices cloned from recordings, which are kept under the hash of the recordings.

The content of the recordings is the only key: a job gets a cloned voice by sending its recordings.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from serving.audio import encode_audio, load_audio
from shared.decoding import load_bytes
from shared.errors import invalid

RECORDING_RATE = 22050  # Hz; of XTTS's encoders
MAX_RECORDING_BYTES = 20 * 2**20
MAX_RECORDING_S = 900.0
MIN_RECORDING_S = 1.0
SILENCE = 1e-3  # of full scale, -60 dB: the peak of a recording without a voice

Samples = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Voice:
    """latents, (1, 32, width), condition the transformer; embedding, (1, 512, 1), conditions the vocoder."""

    latents: torch.Tensor
    embedding: torch.Tensor


def read_recording(data: bytes, param: str) -> Samples:
    """The samples of a recording at RECORDING_RATE, without the silence around it.

    Raises JobError for a recording that is unreadable, silent or too short.
    """
    samples = load_audio(data, rate=RECORDING_RATE, param=param, max_seconds=MAX_RECORDING_S)
    loud = np.flatnonzero(np.abs(samples) > SILENCE)
    if not loud.size:
        raise invalid(param, "the recording is silent. Send a recording of a voice.", "silent")
    samples = samples[loud[0] : loud[-1] + 1]
    seconds = len(samples) / RECORDING_RATE
    if seconds < MIN_RECORDING_S:
        message = (
            f"{seconds:.2f} s of sound, and a voice takes at least {MIN_RECORDING_S:g} s. Send 6 s or more."
        )
        raise invalid(param, message, "too_short")
    return samples.clip(-1, 1)


def noise_recording(seconds: float = 6.0) -> str:
    """A recording of noise, base64, that `read_recording` accepts."""
    noise = np.random.default_rng(0).normal(0, 0.1, int(seconds * RECORDING_RATE))
    return encode_audio(noise.astype(np.float32), RECORDING_RATE)


def clone_voice(model: Any, recordings: Sequence[Samples]) -> Voice:
    """The voice of one or several recordings, as `Xtts.get_conditioning_latents` computes it from files."""
    config = model.config
    longest = RECORDING_RATE * config.max_ref_len  # samples
    waves = [torch.from_numpy(samples)[None, :longest] for samples in recordings]  # (1, samples) each
    if config.sound_norm_refs:
        waves = [wave / wave.abs().max() * 0.75 for wave in waves]
    embeddings = [model.get_speaker_embedding(wave, RECORDING_RATE) for wave in waves]  # (1, 512, 1) each
    latents = model.get_gpt_cond_latents(
        torch.cat(waves, dim=1).to(model.device), RECORDING_RATE,
        length=config.gpt_cond_len, chunk_length=config.gpt_cond_chunk_len,
    )  # fmt: skip
    return Voice(latents, torch.stack(embeddings).mean(dim=0))


class VoiceCache:
    """Voices by key; over `size` the least recently used is dropped."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.voices: OrderedDict[str, Voice] = OrderedDict()
        self.pending: dict[str, asyncio.Task[Voice]] = {}

    async def get(self, key: str, make: Callable[[], Coroutine[Any, Any, Voice]]) -> Voice:
        """The voice of `key`. `make` runs once for all that wait for it; a failure is not kept."""
        if key in self.voices:
            self.voices.move_to_end(key)
            return self.voices[key]
        if key not in self.pending:
            self.pending[key] = task = asyncio.create_task(make())
            task.add_done_callback(lambda task: self._keep(key, task))
        # A job that is cancelled does not cancel the voice of the others.
        return await asyncio.shield(self.pending[key])

    def _keep(self, key: str, task: asyncio.Task[Voice]) -> None:
        del self.pending[key]
        if not task.cancelled() and task.exception() is None:
            self.voices[key] = task.result()
            while len(self.voices) > self.size:
                self.voices.popitem(last=False)


class Voices:
    """The voices of a model.

    built_in: by name. default: the name for requests without one; None: there is none. clone: makes a voice
    of recordings. executor: decodes audio files.
    """

    def __init__(
        self,
        built_in: dict[str, Voice],
        *,
        default: str | None,
        cache_size: int,
        clone: Callable[[list[Samples]], Coroutine[Any, Any, Voice]],
        executor: Executor,
    ) -> None:
        self.built_in, self.default, self.clone, self.executor = built_in, default, clone, executor
        self.cache = VoiceCache(cache_size)

    def by_name(self, name: str | None) -> Voice:
        """A built-in voice. Raises JobError(code="unknown_voice")."""
        name = self.default if name is None else name
        if name is None or name not in self.built_in:
            known = ", ".join(self.built_in) or "none: send speaker_wav"
            problem = "this model has no default voice" if name is None else f"there is no voice {name!r}"
            raise invalid("speaker", f"{problem}. Voices: {known}.", "unknown_voice")
        return self.built_in[name]

    async def from_recordings(self, sources: Sequence[str]) -> Voice:
        """The voice of recordings, each as base64, `data:` URI or URL."""
        params = [f"speaker_wav.{i}" if len(sources) > 1 else "speaker_wav" for i in range(len(sources))]
        files = [
            await load_bytes(source, param=param, max_bytes=MAX_RECORDING_BYTES)
            for source, param in zip(sources, params, strict=True)
        ]

        async def make() -> Voice:
            loop = asyncio.get_running_loop()
            recordings = [
                await loop.run_in_executor(self.executor, read_recording, data, param)
                for data, param in zip(files, params, strict=True)
            ]
            return await self.clone(recordings)

        return await self.cache.get(await asyncio.to_thread(_hash, files), make)


def _hash(files: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in files)).hexdigest()
