"""Audio of any length to segments: split into chunks, which are decoded beside those of all other jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.audio import load_audio
from serving.dynamic_batching import DynamicBatcher
from shared.decoding import load_bytes
from shared.errors import invalid

from .chunking import Span, chunk_audio, detect_speech
from .engine import SAMPLE_RATE, DecodeRequest, DecodeResult, Engine, Samples
from .progress import OnProgress, Progress
from .schemas import AnyRequest
from .segments import is_silence, likeliest, needs_fallback, split_segments
from .tokenizer import WhisperTokenizer
from .transcript import Transcript
from .words import Seconds

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # openai/whisper's
# The language is that of the first chunk in which it is so probable, or else, of so many chunks, of the one
# in which it is most probable. Of a hundred languages, noise gets less than that for its likeliest.
LANGUAGE_PROBABILITY = 0.2
LANGUAGE_CHUNKS = 3
MAX_WINDOWS = 30  # of one chunk, each of whose results may leave out the end of its window
DOWNLOAD_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Audio:
    """The part of a request's audio that is transcribed.

    speech: spans of detected speech, in samples; empty without the detection. offset: start, in seconds.
    """

    samples: Samples
    speech: Sequence[Span]
    offset: float

    def speech_in(self, chunk: Span) -> list[Seconds]:
        """Start and end of the speech in a chunk, in seconds of the request's audio."""
        start, end = chunk
        return [
            (self.offset + max(first, start) / SAMPLE_RATE, self.offset + min(last, end) / SAMPLE_RATE)
            for first, last in self.speech
            if first < end and start < last
        ]


class Transcriber:
    """Runs an engine, and all that is done beside it.

    feature_extractor: transformers'. batch_size: windows in one batch. chunk_seconds: the longest chunk.
    max_bytes, max_seconds: the largest audio file and the longest audio of a request.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: WhisperTokenizer,
        feature_extractor: Any,
        *,
        batch_size: int,
        chunk_seconds: float = 30.0,
        max_bytes: int = 200_000_000,
        max_seconds: float = 14_400.0,
    ) -> None:
        self.engine, self.tokenizer, self.feature_extractor = engine, tokenizer, feature_extractor
        self.batch_size, self.chunk_seconds = batch_size, chunk_seconds
        self.max_bytes, self.max_seconds = max_bytes, max_seconds
        # Each window costs the same: the encoder takes 30 s, however much of it is audio.
        self._batcher: DynamicBatcher[DecodeRequest, DecodeResult] = DynamicBatcher(
            engine.decode, budget=batch_size, length=lambda _: 1, key=engine.key
        )

    async def transcribe(
        self, request: AnyRequest, *, param: str = "audio", on_progress: OnProgress | None = None
    ) -> Transcript:
        """All of the speech in the request's audio; see `stream`."""
        async with aclosing(self.stream(request, param=param, on_progress=on_progress)) as chunks:
            transcript = await anext(chunks)
            async for chunk in chunks:
                transcript.append(chunk)
        return transcript

    async def stream(
        self, request: AnyRequest, *, param: str = "audio", on_progress: OnProgress | None = None
    ) -> AsyncGenerator[Transcript, None]:
        """The transcript of each chunk in order, as soon as it is recognised; before them, an empty one.

        param: the field in which the client sent the audio. on_progress: called on the event loop while a
        long request runs. Raises JobError.
        """
        language = self.tokenizer.language_code(request.spoken_language, request.task)
        prompt = await asyncio.to_thread(self.tokenizer.encode_prompt, request.prompt)
        samples = await self._load_audio(request.audio, param)
        duration = round(len(samples) / SAMPLE_RATE, 3)
        if request.clip_start and request.clip_start >= duration:
            message = f"{request.clip_start:g}, and the audio has {duration:g} seconds."
            raise invalid("clip_start", message)
        yield Transcript(language=language, duration=duration)
        start = int(request.clip_start * SAMPLE_RATE)
        end = len(samples) if request.clip_end is None else int(request.clip_end * SAMPLE_RATE)
        samples = samples[start:end]
        speech = await asyncio.to_thread(detect_speech, samples) if request.vad else None
        chunks = await asyncio.to_thread(
            chunk_audio,
            samples,
            speech,
            max_seconds=self.chunk_seconds,
            first_speech_alone=language is None,
        )
        segments = 0
        audio = Audio(samples, speech or [], request.clip_start)
        async with aclosing(
            self._transcribe_chunks(audio, chunks, request, language, prompt, on_progress)
        ) as parts:
            async for part in parts:
                for index, segment in enumerate(part.segments, segments):
                    segment.id = index
                segments += len(part.segments)
                yield part

    async def _load_audio(self, audio: str | bytes, param: str) -> Samples:
        data = await load_bytes(audio, param=param, max_bytes=self.max_bytes, timeout_s=DOWNLOAD_TIMEOUT_S)
        return await asyncio.to_thread(
            load_audio, data, rate=SAMPLE_RATE, param=param, max_seconds=self.max_seconds
        )

    async def _transcribe_chunks(
        self,
        audio: Audio,
        chunks: list[Span],
        request: AnyRequest,
        language: str | None,
        prompt: list[int],
        on_progress: OnProgress | None,
    ) -> AsyncGenerator[Transcript, None]:
        """The transcript of each chunk: one by one until the language is known, then all at once.

        Chunks in which another language was detected are then decoded again.
        """
        progress = Progress(chunks, on_progress, at_least=2 * self.batch_size)
        # Features take a megabyte and more: enough for the batch that runs and the next.
        slots = asyncio.Semaphore(2 * self.batch_size)

        async def run(chunk: Span, language: str | None) -> Transcript:
            async with slots:
                transcript = await self.transcribe_chunk(audio, chunk, request, language, prompt)
            progress.chunk_done(chunk)
            return transcript

        first: list[Transcript] = []
        if language is None:
            for chunk in chunks[:LANGUAGE_CHUNKS]:
                first.append(await run(chunk, language))
                if first[-1].segments and (first[-1].language_probability or 1.0) >= LANGUAGE_PROBABILITY:
                    break
            spoken = [transcript for transcript in first if transcript.segments] or first
            surest = max(spoken, key=lambda t: t.language_probability or 0.0, default=None)
            language = surest.language if surest else None
        for chunk, transcript in zip(chunks, first, strict=False):
            if transcript.segments and transcript.language != language:
                transcript = await self.transcribe_chunk(audio, chunk, request, language, prompt)
                transcript.language_probability = surest.language_probability if surest else None
            yield transcript
        chunks = chunks[len(first) :]
        tasks = [asyncio.create_task(run(chunk, language)) for chunk in chunks]

        def cancel(_: object = None) -> None:
            for task in tasks:
                task.cancel()

        # A generator suspended at a `yield` does not notice the end of its task.
        job = asyncio.current_task()
        assert job is not None
        job.add_done_callback(cancel)
        try:
            for task in tasks:
                yield await task
        finally:
            cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            job.remove_done_callback(cancel)
        await progress.settled()

    async def transcribe_chunk(
        self, audio: Audio, chunk: Span, request: AnyRequest, language: str | None, prompt: list[int]
    ) -> Transcript:
        """The speech of one chunk. What a result leaves out at its end is decoded again from there on.

        language: its code; None: detected. prompt: token ids.
        """
        start, end = chunk
        transcript = Transcript(language=language)
        speech = audio.speech_in(chunk)
        windows = 0
        while start < end:
            windows += 1
            seconds = (end - start) / SAMPLE_RATE
            result = await self.decode_with_fallback(audio.samples[start:end], request, language, prompt)
            if language is None:
                language = transcript.language = result.language
                transcript.language_probability = result.language_probability
            if is_silence(result):
                break
            segments, covered = split_segments(result.tokens, self.tokenizer.timestamp_begin, seconds)
            if not covered or seconds - covered < 0.5 or windows == MAX_WINDOWS:
                # The rest is taken as it is: decoded again, it might never come to the end.
                rest = result.tokens[sum(len(tokens) for _, _, tokens in segments) :]
                segments += [(covered, seconds, rest)] if rest else []
                covered = seconds
            window_start = audio.offset + start / SAMPLE_RATE
            words_end = await asyncio.to_thread(
                transcript.add_window,
                result,
                segments,
                self.tokenizer,
                start=window_start,
                speech=speech,
                word_timestamps=request.wants_words,
            )
            covered = max(covered, words_end - window_start)
            if seconds - covered < 0.5:
                break
            start += max(1, round(covered * SAMPLE_RATE))
        return transcript

    async def decode_with_fallback(
        self, samples: Samples, request: AnyRequest, language: str | None, prompt: list[int]
    ) -> DecodeResult:
        """The result of a window at the first temperature that gives a probable text that does not repeat.

        Where no temperature does, the likeliest of the results.
        """
        features = await asyncio.to_thread(self.log_mel, samples)
        use_fallback = request.fallback and not request.temperature
        results: list[tuple[DecodeResult, str]] = []
        for temperature in TEMPERATURES if use_fallback else (request.temperature,):
            decode_request = DecodeRequest(
                features=features,
                seconds=len(samples) / SAMPLE_RATE,
                language=language,
                task=request.task,
                prompt=prompt,
                temperature=temperature,
                beam_size=request.beam_size,
                word_timestamps=request.wants_words,
            )
            try:
                (result,) = await self._batcher.submit([decode_request])
            finally:
                decode_request.cancelled = True  # a batch that still runs need not go on with it
            text = self.tokenizer.decode(result.tokens)
            if not needs_fallback(result, text):
                return result
            results.append((result, text))
        return likeliest(results)

    def log_mel(self, samples: Samples) -> NDArray[np.float32]:
        """Log-mel spectrogram of a window, (n_mels, 3000)."""
        features: NDArray[np.float32] = self.feature_extractor(
            samples, sampling_rate=SAMPLE_RATE, return_tensors="np"
        )["input_features"][0]
        return features
