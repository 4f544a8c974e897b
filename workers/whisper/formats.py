"""A transcript as an answer, in each of the response formats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from shared.results import Media

from .schemas import (
    MEDIA_TYPES,
    Chunk,
    DurationUsage,
    OpenAIText,
    OpenAIVerbose,
    ResponseFormat,
    Segment,
    Task,
    TranslationRequest,
    WhisperRequest,
    WhisperResponse,
)

if TYPE_CHECKING:
    from .transcript import Transcript


def format_transcript(
    transcript: Transcript,
    response_format: ResponseFormat,
    task: Task,
    *,
    language_name: str,
    segments: bool = True,
    words: bool = False,
) -> OpenAIVerbose | str:
    """The transcript as text, srt, vtt or verbose_json, OpenAI's object.

    language_name: of the spoken language (`french`). segments, words: whether verbose_json has them.
    """
    if response_format == "srt":
        return srt(transcript.segments)
    if response_format == "vtt":
        return vtt(transcript.segments)
    if response_format == "text":
        return transcript.text + "\n"
    return OpenAIVerbose(
        task=task,
        language="english" if task == "translate" else language_name,
        duration=transcript.duration,
        text=transcript.text,
        segments=transcript.segments if segments else None,
        words=transcript.words if words else None,
        usage=DurationUsage(seconds=transcript.duration),
    )


def as_media(text: str, response_format: ResponseFormat) -> Media:
    """A text for HTTP, with the content type of its format."""
    return Media(text.encode(), f"{MEDIA_TYPES[response_format]}; charset=utf-8")


def respond(
    request: WhisperRequest, transcript: Transcript, language_name: str, *, model: str, revision: str | None
) -> WhisperResponse | OpenAIVerbose | str:
    """The answer to the worker's own request. model: the name that answers give."""
    if request.response_format != "json":
        return format_transcript(
            transcript,
            request.response_format,
            request.task,
            language_name=language_name,
            words=request.wants_words,
        )
    chunks: list[Chunk] = []
    if request.timestamps == "word":
        chunks = [Chunk(timestamp=(w.start, w.end), text=w.word) for w in transcript.words]
    elif request.timestamps:
        chunks = [Chunk(timestamp=(s.start, s.end), text=s.text) for s in transcript.segments]
    return WhisperResponse(
        text=transcript.text,
        chunks=chunks,
        language=transcript.language,
        language_probability=transcript.language_probability,
        task=request.task,
        duration=transcript.duration,
        segments=transcript.segments,
        words=transcript.words if request.wants_words else None,
        model=model,
        revision=revision,
    )


def respond_openai(
    request: TranslationRequest, transcript: Transcript, language_name: str
) -> OpenAIText | OpenAIVerbose | str:
    """The answer to OpenAI's request."""
    if request.response_format == "json":
        return OpenAIText(text=transcript.text, usage=DurationUsage(seconds=transcript.duration))
    return format_transcript(
        transcript,
        request.response_format,
        request.task,
        language_name=language_name,
        segments="segment" in request.granularities,
        words=request.wants_words,
    )


def srt(segments: Sequence[Segment]) -> str:
    """SubRip: numbered from 1, a comma before the milliseconds."""
    return "".join(f"{number}\n{cue}\n" for number, cue in enumerate(_cues(segments, ","), 1))


def vtt(segments: Sequence[Segment]) -> str:
    """WebVTT: a header, a dot before the milliseconds."""
    return "WEBVTT\n\n" + "".join(f"{cue}\n" for cue in _cues(segments, "."))


def _cues(segments: Sequence[Segment], decimal_marker: str) -> Iterator[str]:
    for segment in segments:
        start = format_timestamp(segment.start, decimal_marker)
        end = format_timestamp(segment.end, decimal_marker)
        yield f"{start} --> {end}\n{segment.text.strip().replace('-->', '->')}\n"


def format_timestamp(seconds: float, decimal_marker: str = ".") -> str:
    """`00:01:02.345`."""
    total, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{total // 3600:02}:{total // 60 % 60:02}:{total % 60:02}{decimal_marker}{milliseconds:03}"
