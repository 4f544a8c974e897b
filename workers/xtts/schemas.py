"""Settings, requests and responses of the xtts worker."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from shared.errors import invalid
from shared.openai import OpenAIRequest
from shared.requests import Request
from shared.results import EVENTS, JSON
from shared.settings import DType, WorkerSettings

Language = Literal[
    "en", "es", "fr", "de", "it", "pt", "pl", "tr", "ru", "nl", "cs", "ar", "zh-cn", "hu", "ko", "ja", "hi"
]  # fmt: skip


def _canonical_language(value: Any) -> Any:
    """`pt` for `pt-BR`, `PT` and `pt_br`; `zh-cn` for `zh`; what is no language stays as it is."""
    if not isinstance(value, str):
        return value
    base = value.replace("_", "-").partition("-")[0].lower()
    base = "zh-cn" if base == "zh" else base
    return base if base in get_args(Language) else value


SpokenLanguage = Annotated[Language, BeforeValidator(_canonical_language)]
Format = Literal["wav", "flac", "mp3", "opus", "pcm"]
SampleRate = Literal[8000, 12000, 16000, 22050, 24000, 44100, 48000]
FinishReason = Literal["stop", "length"]
MEDIA_TYPES: dict[Format, str] = {
    "wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "opus": "audio/ogg", "pcm": "audio/pcm",
}  # fmt: skip
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
MAX_TEXT = 50_000  # characters
MAX_RECORDINGS = 8


class Settings(WorkerSettings):
    model_name: str = Field("coqui/XTTS-v2", description="Model id on the Hugging Face Hub, or a folder")
    coqui_tos_agreed: bool = Field(
        False,
        description="1: you have agreed to the licence of XTTS, which is for non-commercial use, or have "
        "bought another. Nothing is loaded without it",
    )
    default_speaker: str | None = Field(
        None, description="Voice of requests that name none; unset: Ana Florence, or the model's first"
    )
    streaming: bool = Field(
        False,
        description="Answer through a generator, which can stream; RunPod then gives a plain job's answer as "
        "a list of one",
    )
    dtype: DType = Field(
        "auto", description="Of the transformer; auto: float32, which XTTS was trained in, on every device"
    )
    max_batch_size: int = Field(16, ge=1, le=256, description="Most segments of text decoded together")
    voice_cache_size: int = Field(
        256, ge=1, le=100_000, description="Cloned voices kept in memory, 140 kB each, by their recordings"
    )


# ---- requests --------------------------------------------------------------------------------------------


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_Recording = Annotated[str, Field(min_length=1)]
_Recordings = Annotated[list[_Recording], Field(min_length=1, max_length=MAX_RECORDINGS)]
Recordings = Annotated[
    _Recordings, BeforeValidator(_as_list, json_schema_input_type=_Recording | _Recordings)
]


class XttsRequest(Request):
    text: str = Field(max_length=MAX_TEXT, description="The text to speak")
    language: SpokenLanguage = Field(
        "en", description="The language of the text; also with a region, and in capitals: `pt-BR`, `zh`, `EN`"
    )
    speaker: str | None = Field(None, description="A built-in voice; unset: the default one")
    speaker_wav: Recordings | None = Field(
        None,
        description="A recording of the voice, or up to eight: base64, a `data:` URI or an http(s) URL",
    )
    speed: float = Field(1.0, ge=0.5, le=2, description="2: twice as fast")
    temperature: float | None = Field(
        None, ge=0, le=2, description="Higher: livelier and less reliable; unset: the model's own, 0.75"
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Sample from the likeliest tokens with this sum; unset: the model's, 0.85",
    )
    top_k: int | None = Field(
        None, ge=1, le=1000, description="Sample from so many of the likeliest tokens; unset: the model's, 50"
    )
    repetition_penalty: float | None = Field(
        None, ge=1, le=20, description="Against drawn-out sounds; unset: the model's own, 5"
    )
    seed: int | None = Field(
        None, description="The same seed gives the same speech; unset: another each time"
    )
    response_format: Format = Field("wav", description="pcm: 16 bits, little-endian, mono, without a header")
    sample_rate: SampleRate | None = Field(None, description="In Hz; unset: the model's own, 24000")
    stream: bool = Field(False, description="Send the audio in chunks while it is generated")

    @model_validator(mode="after")
    def _check_combinations(self) -> XttsRequest:
        if self.speaker is not None and self.speaker_wav is not None:
            raise invalid("speaker", "give either it or speaker_wav.")
        if self.response_format == "opus" and self.sample_rate not in (None, *OPUS_RATES):
            rates = ", ".join(map(str, OPUS_RATES))
            raise invalid("sample_rate", f"opus has {rates}, got {self.sample_rate}.")
        return self


class VoicesRequest(Request):
    voices: Literal[True] = Field(description="true: list the voices and languages")


class SpeechRequest(OpenAIRequest):
    """The body of POST /v1/audio/speech, with fields of this worker beside OpenAI's."""

    input: str = Field(max_length=MAX_TEXT, description="The text to speak")
    voice: str | dict[str, Any] = Field(description="A built-in voice, or one of OpenAI's names")
    model: str | None = Field(None, description="The served model's name")
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = Field("mp3")
    speed: float = Field(1.0, ge=0.25, le=4)
    stream_format: Literal["audio", "sse"] = Field("audio")
    language: SpokenLanguage = Field("en", description="The language of the text; OpenAI has no such field")
    seed: int | None = Field(None, description="The same seed gives the same speech")
    sample_rate: SampleRate | None = Field(None, description="In Hz")
    speaker_wav: Recordings | None = Field(None, description="Recordings of the voice, instead of `voice`")

    @property
    def stream_over_http(self) -> bool:
        """Over HTTP the answer is a file, sent while it is generated; in queue mode an XttsResponse."""
        return True


# ---- responses -------------------------------------------------------------------------------------------


class XttsChunk(BaseModel):
    audio: str = Field(description="Base64: a complete file, or raw samples with pcm")
    format: Format = Field(description="The `response_format` of the request")
    sample_rate: int = Field(description="In Hz")
    index: int = Field(description="Number of the chunk, from 0")


class XttsResponse(BaseModel):
    audio: str = Field(description="The speech, mono, as base64; empty at the end of a stream")
    format: Format = Field(description="The `response_format` of the request")
    sample_rate: int = Field(description="In Hz")
    duration: float = Field(description="Seconds of speech")
    seconds: float = Field(description="Seconds that the worker took, with the time in its queue")
    finish_reason: FinishReason = Field(
        description="`length`: some segment reached the model's most tokens, and may sound cut off"
    )
    language: str = Field(description="The language")
    speaker: str | None = Field(description="The built-in voice; null for a cloned one")
    model: str = Field(description="The model, as MODEL_NAME gives it")
    revision: str | None = Field(description="Its commit, where known")


class VoicesResponse(BaseModel):
    voices: list[str] = Field(description="The built-in voices")
    default: str | None = Field(description="The voice of a request that names none")
    languages: list[str] = Field(description="Values of `language`")
    formats: list[str] = Field(description="Values of `response_format`")


ANSWERS: dict[type[BaseModel], dict[str, Any]] = {
    XttsRequest: {JSON: XttsResponse, EVENTS: XttsChunk | XttsResponse},
    VoicesRequest: {JSON: VoicesResponse},
    SpeechRequest: dict.fromkeys(MEDIA_TYPES.values(), bytes),
}
