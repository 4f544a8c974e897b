"""A transcript as the parts of a streamed answer, each as soon as it is recognised."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from shared import telemetry
from shared.openai import DONE, sse

from .formats import respond
from .schemas import StreamedSegment, TextDelta, TextDone, WhisperRequest, WhisperResponse
from .transcript import Transcript

Chunks = AsyncGenerator[Transcript, None]
"""What `Transcriber.stream` gives: an empty transcript, then that of each chunk."""


async def stream_segments(
    request: WhisperRequest, chunks: Chunks, *, model: str, revision: str | None
) -> AsyncGenerator[StreamedSegment | WhisperResponse, None]:
    """Each segment; at the end the response, without what the parts before had."""
    async with aclosing(chunks):
        transcript = await anext(chunks)
        async for chunk in chunks:
            transcript.append(chunk)
            for segment, words in zip(chunk.segments, chunk.segment_words, strict=True):
                yield StreamedSegment(**dict(segment), words=words if request.wants_words else None)
    rest = replace(transcript, segments=[], segment_words=[])
    answer = respond(request, rest, "", model=model, revision=revision)
    assert isinstance(answer, WhisperResponse)  # a stream is json
    yield answer.model_copy(update={"text": transcript.text})


async def stream_events(chunks: Chunks) -> AsyncGenerator[str, None]:
    """OpenAI's events: the text of each segment, then all of it. The deltas joined are the text."""
    async with aclosing(chunks):
        transcript = await anext(chunks)
        telemetry.observe("audio_seconds", transcript.duration)  # the events do not state it
        async for chunk in chunks:
            for segment in chunk.segments:
                begun = bool(transcript.segments)
                transcript.segments.append(segment)
                yield sse(TextDelta(delta=segment.text if begun else segment.text.lstrip()))
    yield sse(TextDone(text=transcript.text)) + DONE
