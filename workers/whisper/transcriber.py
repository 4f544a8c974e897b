"""Audio of any length to segments: split into chunks, which are decoded beside those of all other jobs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.audio import load_audio
from serving.dynamic_batching import DynamicBatcher
from shared.decoding import load_bytes
from shared.errors import invalid

from .alignment import token_starts
from .chunking import Span, chunk_audio
from .engine import SAMPLE_RATE, DecodeRequest, DecodeResult, Engine, Samples
from .progress import OnProgress, Progress
from .schemas import Segment, WhisperRequest, Word
from .segments import TokenSegment, compression_ratio, is_silence, needs_fallback, split_segments
from .tokenizer import WhisperTokenizer

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # openai/whisper's
MAX_WINDOWS = 30  # of one chunk, each of whose results may leave out the end of its window
DOWNLOAD_TIMEOUT_S = 120.0


@dataclass
class Transcript:
    """The speech recognised in a chunk, or in all chunks of a job.

    duration: of the audio, in seconds.
    """

    language: str | None
    language_probability: float | None = None
    segments: list[Segment] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    duration: float = 0.0

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments).strip()


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
        self, request: WhisperRequest, *, param: str = "audio", on_progress: OnProgress | None = None
    ) -> Transcript:
        """The speech in the request's audio, which the client sent in the field `param`.

        on_progress: called on the event loop while a long request runs. Raises JobError.
        """
        code = self.tokenizer.language_code(request.language, request.task)
        request = request.model_copy(update={"language": code})
        prompt = await asyncio.to_thread(self.tokenizer.encode_prompt, request.prompt)
        samples = await self._load_audio(request.audio, param)
        duration = round(len(samples) / SAMPLE_RATE, 3)
        if request.clip_start and request.clip_start >= duration:
            message = f"{request.clip_start:g}, and the audio has {duration:g} seconds."
            raise invalid("clip_start", message)
        start = int(request.clip_start * SAMPLE_RATE)
        end = len(samples) if request.clip_end is None else int(request.clip_end * SAMPLE_RATE)
        samples = samples[start:end]
        chunks = await asyncio.to_thread(
            chunk_audio, samples, vad=request.vad, max_seconds=self.chunk_seconds
        )
        transcripts = await self._transcribe_chunks(samples, chunks, request, prompt, on_progress)
        spoken = [transcript for transcript in transcripts if transcript.segments]
        segments = [segment for transcript in spoken for segment in transcript.segments]
        for index, segment in enumerate(segments):
            segment.id = index
        return Transcript(
            language=spoken[0].language if spoken else request.language,
            language_probability=spoken[0].language_probability if spoken else None,
            segments=segments,
            words=[word for transcript in transcripts for word in transcript.words],
            duration=duration,
        )

    async def _load_audio(self, audio: str, param: str) -> Samples:
        data = await load_bytes(audio, param=param, max_bytes=self.max_bytes, timeout_s=DOWNLOAD_TIMEOUT_S)
        return await asyncio.to_thread(
            load_audio,
            data,
            rate=SAMPLE_RATE,
            param=param,
            max_seconds=self.max_seconds,
            allow_empty=True,
        )

    async def _transcribe_chunks(
        self,
        samples: Samples,
        chunks: list[Span],
        request: WhisperRequest,
        prompt: list[int],
        on_progress: OnProgress | None,
    ) -> list[Transcript]:
        """The transcript of each chunk: one by one until the language is known, then all at once."""
        progress = Progress(chunks, on_progress, at_least=2 * self.batch_size)
        # Features take a megabyte and more: enough for the batch that runs and the next.
        slots = asyncio.Semaphore(2 * self.batch_size)

        async def run(chunk: Span, request: WhisperRequest) -> Transcript:
            async with slots:
                transcript = await self.transcribe_chunk(samples, chunk, request, prompt)
            progress.chunk_done(chunk)
            return transcript

        first: list[Transcript] = []
        while request.language is None and chunks:
            # The language of a job is that of its first speech. A chunk or two may turn out to have none.
            chunk, *chunks = chunks
            first.append(await run(chunk, request))
            if first[-1].segments or len(first) == 3:
                request = request.model_copy(update={"language": first[-1].language})
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(run(chunk, request)) for chunk in chunks]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        await progress.settled()
        return [*first, *(task.result() for task in tasks)]

    async def transcribe_chunk(
        self, samples: Samples, chunk: Span, request: WhisperRequest, prompt: list[int]
    ) -> Transcript:
        """The speech of one chunk. What a result leaves out at its end is decoded again from there on.

        samples: of the request's clip. request: its language is a code, or None to be detected.
        prompt: token ids.
        """
        start, end = chunk
        transcript = Transcript(language=request.language)
        windows = 0
        while start < end:
            windows += 1
            seconds = (end - start) / SAMPLE_RATE
            result = await self.decode_with_fallback(samples[start:end], request, prompt)
            if request.language is None:
                transcript.language = result.language
                transcript.language_probability = result.language_probability
                request = request.model_copy(update={"language": result.language})
            if is_silence(result):
                break
            segments, covered = split_segments(result.tokens, self.tokenizer.timestamp_begin, seconds)
            if not covered or seconds - covered < 0.5 or windows == MAX_WINDOWS:
                # The rest is taken as it is: decoded again, it might never come to the end.
                rest = result.tokens[sum(len(tokens) for _, _, tokens in segments) :]
                segments += [(covered, seconds, rest)] if rest else []
                covered = seconds
            window_start = request.clip_start + start / SAMPLE_RATE
            await asyncio.to_thread(self._add_segments, transcript, segments, result, window_start)
            start += max(1, round(covered * SAMPLE_RATE))
        return transcript

    async def decode_with_fallback(
        self, samples: Samples, request: WhisperRequest, prompt: list[int]
    ) -> DecodeResult:
        """The result of a window at the first temperature that gives a probable text that does not repeat."""
        features = await asyncio.to_thread(self.log_mel, samples)
        use_fallback = request.fallback and not request.temperature
        for temperature in TEMPERATURES if use_fallback else (request.temperature,):
            decode_request = DecodeRequest(
                features=features,
                seconds=len(samples) / SAMPLE_RATE,
                language=request.language,
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
            if not needs_fallback(result, self.tokenizer.decode(result.tokens)):
                break
        return result

    def log_mel(self, samples: Samples) -> NDArray[np.float32]:
        """Log-mel spectrogram of a window, (n_mels, 3000)."""
        features: NDArray[np.float32] = self.feature_extractor(
            samples, sampling_rate=SAMPLE_RATE, return_tensors="np"
        )["input_features"][0]
        return features

    def _add_segments(
        self, transcript: Transcript, segments: list[TokenSegment], result: DecodeResult, window_start: float
    ) -> None:
        """Append the segments of a window, and their words, to the transcript of its chunk.

        window_start: in seconds of the audio.
        """
        ratio = compression_ratio(self.tokenizer.decode(result.tokens))
        starts = token_starts(result)
        used = 0  # text tokens of the segments before
        for start, end, tokens in segments:
            text_tokens = [token for token in tokens if token < self.tokenizer.eot]
            if starts and text_tokens:
                transcript.words += self._words(text_tokens, starts[used:], transcript.language, window_start)
            used += len(text_tokens)
            text = self.tokenizer.decode(text_tokens)
            if text.strip():
                segment = Segment(
                    id=0,
                    seek=round(window_start * 100),
                    start=round(window_start + start, 3),
                    end=round(window_start + end, 3),
                    text=text,
                    tokens=tokens,
                    temperature=result.temperature,
                    avg_logprob=round(result.avg_logprob, 4),
                    compression_ratio=round(ratio, 3),
                    no_speech_prob=round(result.no_speech_prob, 6),
                )
                transcript.segments.append(segment)

    def _words(
        self, tokens: list[int], starts: list[float], language: str | None, window_start: float
    ) -> list[Word]:
        """starts: seconds of the window at which each of `tokens` starts, and what follows them."""
        words = []
        first = 0
        for word, count in self.tokenizer.split_to_words(tokens, language):
            start, end = starts[first], starts[min(first + count, len(starts) - 1)]
            first += count
            if word.strip():
                words.append(
                    Word(
                        word=word.strip(),
                        start=round(window_start + start, 3),
                        end=round(window_start + max(start, end), 3),
                    )
                )
        return words
