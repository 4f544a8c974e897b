"""SubRip and WebVTT, to the letter."""

from workers.whisper.formats import srt, vtt
from workers.whisper.schemas import Segment


def segment(start: float, end: float, text: str) -> Segment:
    zeros = {"temperature": 0.0, "avg_logprob": 0.0, "compression_ratio": 1.0, "no_speech_prob": 0.0}
    return Segment(id=0, seek=0, start=start, end=end, text=text, tokens=[], **zeros)


SEGMENTS = [
    segment(0, 1.5, " Hello, world."),
    segment(59.9996, 3723.004, " a --> b"),
    segment(3723.004, 90000, "é"),
]


def test_srt_is_exact() -> None:
    assert srt(SEGMENTS) == (
        "1\n00:00:00,000 --> 00:00:01,500\nHello, world.\n\n"
        "2\n00:01:00,000 --> 01:02:03,004\na -> b\n\n"
        "3\n01:02:03,004 --> 25:00:00,000\né\n\n"
    )
    assert srt([]) == ""


def test_vtt_is_exact() -> None:
    assert vtt(SEGMENTS) == (
        "WEBVTT\n\n"
        "00:00:00.000 --> 00:00:01.500\nHello, world.\n\n"
        "00:01:00.000 --> 01:02:03.004\na -> b\n\n"
        "01:02:03.004 --> 25:00:00.000\né\n\n"
    )
    assert vtt([]) == "WEBVTT\n\n"
