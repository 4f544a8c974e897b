"""Audio from the transformer's hidden states: XTTS's HiFi-GAN, on threads of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from shared.device import share_cores
from shared.errors import not_finite

# A frame of audio depends on 13.5 frames on either side: the receptive field of HiFi-GAN V1's convolutions.
CONTEXT_FRAMES = 16
MAX_PENDING = 64
NOT_FINITE_ADVICE = "Set DTYPE=float32."


class Vocoder:
    """Steps and their order are those of `Xtts.inference` and `HifiDecoder.forward`.

    decoder: the model's HifiDecoder. max_pending: tasks in the queue; beyond it `submit` blocks, so that the
    transformer cannot run ahead without bound. decoding: whether the transformer needs cores as well.
    """

    def __init__(
        self,
        decoder: Any,
        *,
        device: torch.device,
        threads: int,
        max_pending: int,
        decoding: Callable[[], bool],
    ) -> None:
        self.decoder, self.device, self.threads = decoder, device, threads
        self.max_pending, self.decoding = max_pending, decoding
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="vocoder")
        self.pending: list[Future[NDArray[np.float32]]] = []
        self.scales = [decoder.ar_mel_length_compression / decoder.output_hop_length]
        if decoder.output_sample_rate != decoder.input_sample_rate:
            self.scales.append(decoder.output_sample_rate / decoder.input_sample_rate)

    def busy(self) -> int:
        """How many threads have work."""
        return min(self.threads, sum(not samples.done() for samples in self.pending))

    def interpolate(self, hidden_states: Sequence[torch.Tensor], speed: float) -> torch.Tensor:
        """Frames, (1, width, frames), of hidden states, (width,) each, one for a token."""
        frames = torch.stack(list(hidden_states)).float().T[None]  # (1, width, tokens)
        stretch = [] if speed == 1 else [max(1 / speed, 1 / len(hidden_states))]
        for scale in (*stretch, *self.scales):
            frames = interpolate(frames, scale_factor=scale, mode="linear")
        return frames

    def uncertain_frames(self, frames: int, tokens: int) -> int:
        """How many of the last frames change with the next token: by interpolation and by convolution."""
        return CONTEXT_FRAMES + 2 * math.ceil(frames / tokens) + 2

    def submit(
        self, frames: torch.Tensor, embedding: torch.Tensor, begin: int, end: int
    ) -> Future[NDArray[np.float32]]:
        """The samples of frames[:, :, begin:end], later. embedding: the voice's, (1, 512, 1)."""
        self.pending = [samples for samples in self.pending if not samples.done()]
        if len(self.pending) >= self.max_pending:
            wait(self.pending, return_when=FIRST_COMPLETED)
        first = max(0, begin - CONTEXT_FRAMES)
        part = frames[:, :, first : end + CONTEXT_FRAMES]
        samples = self.pool.submit(self.decode, part, embedding, begin - first, end - first)
        self.pending.append(samples)
        return samples

    def decode(
        self, frames: torch.Tensor, embedding: torch.Tensor, begin: int, end: int
    ) -> NDArray[np.float32]:
        """The samples of the frames from `begin` to `end`; the others are context. On a vocoder's thread."""
        share_cores(self.threads, self.busy() + self.decoding())
        with torch.inference_mode():
            wave = self.decoder.waveform_decoder(frames, g=embedding.to(self.device))  # (1, 1, samples)
            hop: int = self.decoder.output_hop_length
            samples = wave[0, 0, begin * hop : end * hop]
            if not samples.isfinite().all():
                raise not_finite(NOT_FINITE_ADVICE)
            return samples.cpu().numpy()  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the threads when the queue is empty."""
        self.pool.shutdown(wait=False)
