"""OpenAI's request for speech as this worker's own."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from shared.errors import JobError, invalid
from shared.openai import check_model

from .schemas import SpeechRequest, XttsRequest

# Names that OpenAI's clients ask for, and voices of XTTS v2 like them. Without these it is the default voice.
OPENAI_VOICES = {
    "alloy": "Alison Dietlinde", "ash": "Damien Black", "ballad": "Royston Min", "coral": "Gracie Wise",
    "echo": "Andrew Chipper", "fable": "Craig Gutsy", "nova": "Daisy Studious", "onyx": "Viktor Menelaos",
    "sage": "Sofia Hellen", "shimmer": "Claribel Dervla", "verse": "Luis Moray", "marin": "Ana Florence",
    "cedar": "Aaron Dreschner",
}  # fmt: skip


def to_xtts_request(
    request: SpeechRequest, *, voices: Collection[str], served: Collection[str], stream: bool = False
) -> XttsRequest:
    """voices: the built-in ones. served: names of the model. Raises JobError for what is not served here."""
    check_model(request.model, *served)
    if request.response_format == "aac":
        message = "aac is not made here. Use mp3, opus, flac, wav or pcm."
        raise invalid("response_format", message, "unsupported")
    if request.stream_format == "sse":
        raise invalid("stream_format", "sse is not served here. Leave stream_format out.", "unsupported")
    if not 0.5 <= request.speed <= 2:
        raise invalid("speed", f"0.5 to 2 sounds like speech, got {request.speed:g}.")
    speaker: str | None = request.voice if isinstance(request.voice, str) else str(request.voice.get("id"))
    if speaker not in voices and speaker in OPENAI_VOICES:
        similar = OPENAI_VOICES[speaker]
        speaker = similar if similar in voices else None
    return XttsRequest(
        text=request.input, language=request.language, speed=request.speed, seed=request.seed,
        speaker=None if request.speaker_wav else speaker, speaker_wav=request.speaker_wav,
        response_format=request.response_format, sample_rate=request.sample_rate,
        stream=stream,
    )  # fmt: skip


@contextmanager
def caller_names() -> Iterator[None]:
    """Errors about fields of XttsRequest name those of SpeechRequest."""
    try:
        yield
    except JobError as error:
        name = {"text": "input", "speaker": "voice"}.get(error.param or "")
        if name is None:
            raise
        message = f"{name}{error.message.removeprefix(error.param or '')}"
        raise JobError(message, param=name, code=error.code, type=error.type) from None
