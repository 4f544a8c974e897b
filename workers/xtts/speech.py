"""The speech of one request: its text in segments, the pauses between them, complete or in chunks."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import soxr
from numpy.typing import NDArray

from serving.audio import encode_audio
from shared import telemetry

from .encoder import StreamEncoder
from .engine import SpeechEngine
from .schemas import FinishReason, XttsChunk, XttsRequest, XttsResponse
from .text import SegmentEnd, TextTokenizer
from .voices import Samples, Voice, Voices, clone_voice

PAUSES_S: dict[SegmentEnd, float] = {"paragraph": 0.55, "sentence": 0.3, "clause": 0.12, "word": 0.0}
"""Silence after a segment, by its end, at speed 1."""
MAX_CHUNK_S = 4.0  # of the largest format, WAV at 48 kHz: half of what the platform takes in one post
SMALLER = "Ask for response_format mp3 or opus, which are a tenth of the size. "
CheckSize = Callable[[int, str], None]
"""Raises JobError where a result of so many bytes cannot be returned; then an advice."""


class Synthesizer:
    """Text to speech with one model. name, revision: of the model, for the responses."""

    def __init__(
        self,
        engine: SpeechEngine,
        text_tokenizer: TextTokenizer,
        built_in: dict[str, Voice],
        *,
        default_voice: str | None,
        voice_cache_size: int,
        name: str,
        revision: str | None,
    ) -> None:
        self.engine, self.text_tokenizer, self.name, self.revision = engine, text_tokenizer, name, revision
        self.text_thread = ThreadPoolExecutor(1, thread_name_prefix="text")
        self.codecs = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="audio")
        self.voices = Voices(
            built_in,
            default=default_voice,
            cache_size=voice_cache_size,
            clone=self.clone,
            executor=self.codecs,
        )

    async def clone(self, recordings: list[Samples]) -> Voice:
        """On the engine's thread: the encoders are parts of the transformer."""
        return await self.engine.call(lambda: clone_voice(self.engine.model, recordings))

    async def complete(self, request: XttsRequest, check_size: CheckSize) -> XttsResponse:
        """All of the speech as one file."""
        speech = _Speech(request, self)
        run = functools.partial(asyncio.get_running_loop().run_in_executor, self.codecs)
        parts, count = [], 0
        async with aclosing(speech.samples()) as generated:
            async for samples, _ in generated:
                parts.append(samples)
                count += len(samples)
                if request.response_format in ("wav", "pcm"):  # stop as soon as it is certain to be too large
                    seconds = count / self.engine.sample_rate
                    check_size(int(seconds * speech.rate * 2 * 4 / 3), SMALLER)
        audio, duration = await run(
            encode, parts, self.engine.sample_rate, speech.rate, request.response_format
        )
        check_size(len(audio), "" if request.response_format in ("mp3", "opus") else SMALLER)
        return speech.response(audio, duration)

    async def stream(self, request: XttsRequest) -> AsyncIterator[XttsChunk | XttsResponse]:
        """The speech in chunks, each a file, and the response without audio."""
        speech = _Speech(request, self)
        run = functools.partial(asyncio.get_running_loop().run_in_executor, self.codecs)
        max_chunk, index, count = int(MAX_CHUNK_S * speech.rate), 0, 0  # samples, chunks, samples
        async with aclosing(speech.resampled()) as generated:
            async for ready, _ in generated:
                for start in range(0, len(ready), max_chunk):
                    part = ready[start : start + max_chunk]
                    audio = await run(encode_audio, part, speech.rate, request.response_format)
                    yield XttsChunk(
                        audio=audio, format=request.response_format, sample_rate=speech.rate, index=index
                    )
                    index += 1
                count += len(ready)
        yield speech.response("", count / speech.rate)

    async def stream_file(self, request: XttsRequest) -> AsyncIterator[bytes]:
        """The speech as one file, in bytes that are ready."""
        speech = _Speech(request, self)
        run = functools.partial(asyncio.get_running_loop().run_in_executor, self.codecs)
        encoder, count = StreamEncoder(speech.rate, request.response_format), 0
        async with aclosing(speech.resampled()) as generated:
            async for samples, last in generated:
                yield await run(encoder.encode, samples, last)
                count += len(samples)
        telemetry.observe("audio_seconds", count / speech.rate)


class _Speech:
    """One request while it is answered. rate: of the answer, in Hz."""

    def __init__(self, request: XttsRequest, synthesizer: Synthesizer) -> None:
        self.request, self.synthesizer = request, synthesizer
        self.begin = time.perf_counter()
        self.rate: int = request.sample_rate or synthesizer.engine.sample_rate
        self.finish_reason: FinishReason = "stop"

    async def samples(self) -> AsyncGenerator[tuple[NDArray[np.float32], bool]]:
        """Samples at the engine's rate, pauses included, and whether they are the last."""
        request, engine, voices = self.request, self.synthesizer.engine, self.synthesizer.voices
        segments = await asyncio.get_running_loop().run_in_executor(
            self.synthesizer.text_thread,
            self.synthesizer.text_tokenizer.encode,
            request.text,
            request.language,
        )
        if request.speaker_wav is None:
            voice = voices.by_name(request.speaker)
        else:
            voice = await voices.from_recordings(request.speaker_wav)
        chosen = request.model_dump(include={"temperature", "top_p", "top_k", "repetition_penalty"})
        params = replace(
            engine.default_params, **{name: value for name, value in chosen.items() if value is not None}
        )
        # Each segment has its own random numbers, so that none depends on how many tokens another has.
        seeds = random.Random(request.seed)  # noqa: S311
        sequences = [
            engine.synthesize(
                segment.token_ids, voice, params,
                speed=request.speed, seed=seeds.getrandbits(64), streamed=request.stream, job=self,
            )
            for segment in segments
        ]  # fmt: skip

        def stop(_: object = None) -> None:
            for sequence in sequences:
                sequence.stop()

        # A generator suspended at a `yield` does not notice the end of its task.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(stop)
        pause = np.zeros(0, np.float32)
        try:
            for sequence, segment in zip(sequences, segments, strict=True):
                reason = None
                while reason is None:
                    samples, reason = await sequence.next_audio()
                    if reason == "length":
                        self.finish_reason = "length"
                    last = reason is not None and sequence is sequences[-1]
                    yield np.concatenate([pause, samples]), last
                    pause = pause[:0]
                seconds = PAUSES_S[segment.end] / request.speed
                pause = np.zeros(int(seconds * engine.sample_rate), np.float32)
        finally:
            stop()
            task.remove_done_callback(stop)

    async def resampled(self) -> AsyncGenerator[tuple[NDArray[np.float32], bool]]:
        """As `samples`, at the rate of the answer."""
        run = functools.partial(asyncio.get_running_loop().run_in_executor, self.synthesizer.codecs)
        resample = resampler(self.synthesizer.engine.sample_rate, self.rate)
        async with aclosing(self.samples()) as generated:
            async for samples, last in generated:
                yield await run(resample, samples, last), last

    def response(self, audio: str, duration: float) -> XttsResponse:
        request, synthesizer = self.request, self.synthesizer
        speaker = None if request.speaker_wav else request.speaker or synthesizer.voices.default
        return XttsResponse(
            audio=audio, format=request.response_format, sample_rate=self.rate, duration=round(duration, 3),
            seconds=round(time.perf_counter() - self.begin, 3), finish_reason=self.finish_reason,
            language=request.language, speaker=speaker, model=synthesizer.name,
            revision=synthesizer.revision,
        )  # fmt: skip


def encode(
    parts: Sequence[NDArray[np.float32]], rate: int, wanted_rate: int, response_format: str
) -> tuple[str, float]:
    """All parts, at `rate` Hz, as one base64 file at `wanted_rate`, and its seconds."""
    samples = resampler(rate, wanted_rate)(np.concatenate(parts), True)
    samples = samples / max(1.0, float(np.abs(samples).max()))  # resampling may overshoot
    return encode_audio(samples, wanted_rate, response_format), len(samples) / wanted_rate


def resampler(rate: int, wanted_rate: int) -> Callable[[NDArray[np.float32], bool], NDArray[np.float32]]:
    """A function that resamples audio part by part, called with True at the last part."""
    if rate == wanted_rate:
        return lambda samples, last: samples
    resample: Callable[[NDArray[np.float32], bool], NDArray[np.float32]]
    resample = soxr.ResampleStream(rate, wanted_rate, 1, dtype="float32").resample_chunk
    return resample
