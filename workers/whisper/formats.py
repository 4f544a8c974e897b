"""A transcript in OpenAI's response formats other than `json`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .schemas import DurationUsage, OpenAIVerbose, ResponseFormat, Segment, Task

if TYPE_CHECKING:
    from .transcriber import Transcript


def format_transcript(
    transcript: Transcript,
    response_format: ResponseFormat,
    task: Task,
    *,
    language_name: str,
    segments: bool = True,
    words: bool = False,
) -> OpenAIVerbose | str:
    """The transcript as text, srt, vtt or verbose_json.

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
