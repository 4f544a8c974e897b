"""Settings, requests and responses of the whisper worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from shared.errors import invalid
from shared.openai import ModelsRequest, OpenAIRequest
from shared.requests import MediaSource, Request
from shared.results import EVENTS, JSON
from shared.settings import WorkerSettings

ResponseFormat = Literal["json", "text", "srt", "vtt", "verbose_json"]
Task = Literal["transcribe", "translate"]
MEDIA_TYPES = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}


class Settings(WorkerSettings):
    model_name: str = Field(
        "openai/whisper-large-v3",
        description="Model id on the Hugging Face Hub, or a folder; with ENGINE=faster-whisper also one in "
        "CTranslate2's format, such as Systran/faster-whisper-large-v3",
    )
    engine: Literal["transformers", "faster-whisper"] = Field(
        "transformers", description="What runs the model; faster-whisper stands for CTranslate2"
    )
    compute_type: Literal[
        "auto", "float32", "float16", "bfloat16", "int8", "int8_float32", "int8_float16", "int8_bfloat16"
    ] = Field("auto", description="Number format of faster-whisper's weights; auto: that of DTYPE")
    max_batch_windows: int | None = Field(
        None, ge=1, le=512, description="Windows of 30 s in one batch; unset: 32 on a GPU, 8 on CPU"
    )
    window_seconds: float = Field(
        30.0, ge=1, le=30, description="Longest chunk that long audio is split into, in seconds"
    )
    model_timestamps: bool = Field(
        True, description="false for models tuned without timestamps: each chunk is then one segment"
    )
    streaming: bool = Field(
        False,
        description="Answer through a generator, which can stream; RunPod then gives a plain job's answer as "
        "a list of one. Over HTTP every worker streams",
    )
    max_audio_seconds: float = Field(14_400, ge=1, le=86_400, description="Longest audio of a job")
    max_audio_mb: float = Field(200, gt=0, le=2000, description="Largest audio file of a job, in MB")


# ---- the worker's own requests and responses -----------------------------------------------------------


# Clients send null for what is unset.
Stream = Annotated[bool, BeforeValidator(lambda value: value or False)]


class WhisperRequest(Request):
    audio: MediaSource = Field(description="The audio file: base64, a `data:` URI or an http(s) URL")
    timestamps: Annotated[bool | Literal["word"], BeforeValidator(lambda value: value or False)] = Field(
        False, description="Return `chunks`: true, one for each segment; `word`, one for each word"
    )
    language: str | None = Field(
        None, description="Spoken language, as `fr` or `french`; unset: detected from the first speech"
    )
    task: Task = Field("transcribe", description="Keep the language, or `translate` to English")
    word_timestamps: bool = Field(False, description="Return `words`, each with its start and end")
    response_format: ResponseFormat = Field(
        "json", description="`json`: the fields below; `verbose_json`: OpenAI's object; else a text"
    )
    prompt: str | None = Field(
        None, max_length=4000, description="Text before the audio: names and spellings that may occur"
    )
    temperature: float = Field(0.0, ge=0, le=1, description="Sampling temperature; 0: greedy decoding")
    fallback: bool = Field(
        True, description="At temperature 0, decode unlikely or repetitive results again at higher ones"
    )
    beam_size: int = Field(1, ge=1, le=16, description="Beams of the beam search; 1, the fastest: greedy")
    vad: bool = Field(
        True, description="Voice activity detection: leave out what is not speech; false: decode all audio"
    )
    clip_start: float = Field(0.0, ge=0, le=86_400, description="Start of the part to transcribe, in seconds")
    clip_end: float | None = Field(
        None, gt=0, le=86_400, description="End of the part, in seconds; unset: the end of the audio"
    )
    stream: Stream = Field(False, description="Send each segment as soon as it is recognised")

    @field_validator("language", mode="before")
    @classmethod
    def _detect(cls, value: Any) -> Any:
        return None if value in ("", "auto") else value

    @model_validator(mode="after")
    def _streams_json(self) -> WhisperRequest:
        if self.stream and self.response_format != "json":
            raise invalid("response_format", "a stream is json. Leave response_format out.")
        return self

    @model_validator(mode="after")
    def _ends_after_start(self) -> WhisperRequest:
        if self.clip_end is not None and self.clip_end <= self.clip_start:
            raise invalid("clip_end", f"{self.clip_end:g} is not after clip_start, {self.clip_start:g}.")
        return self

    @property
    def spoken_language(self) -> str | None:
        return self.language

    @property
    def wants_words(self) -> bool:
        return self.word_timestamps or self.timestamps == "word"


class Chunk(BaseModel):
    timestamp: tuple[float, float] = Field(description="Start and end, in seconds of the audio")
    text: str = Field(description="Text of the segment or word")


class Segment(BaseModel):
    id: int = Field(description="Index of the segment, from 0")
    seek: int = Field(description="Start of the decoded window, in hundredths of a second")
    start: float = Field(description="Seconds of the audio")
    end: float = Field(description="Seconds of the audio")
    text: str = Field(description="Text, usually with a space before it")
    tokens: list[int] = Field(description="Token ids, timestamp tokens included")
    temperature: float = Field(description="Sampling temperature of this result")
    avg_logprob: float = Field(description="Mean log probability of the window's tokens")
    compression_ratio: float = Field(
        description="Length of the window's text by its length under zlib: high for repetitive text"
    )
    no_speech_prob: float = Field(description="Probability that the window has no speech")


class Word(BaseModel):
    word: str = Field(description="The word, punctuation included")
    start: float = Field(description="Seconds of the audio")
    end: float = Field(description="Seconds of the audio")


class StreamedSegment(Segment):
    """A part of a streamed answer."""

    words: list[Word] | None = Field(description="With `word_timestamps`, or `timestamps` of `word`")


class WhisperResponse(BaseModel):
    text: str = Field(description="All recognised speech")
    chunks: list[Chunk] = Field(description="With `timestamps`: segments or words with their times")
    language: str | None = Field(description="Code of the spoken language; null where there is no speech")
    language_probability: float | None = Field(
        description="Probability of the detected language; null if it was given"
    )
    task: Task = Field(description="The task of the request")
    duration: float = Field(description="Length of the audio in seconds")
    segments: list[Segment] = Field(description="Recognised speech in segments, in order")
    words: list[Word] | None = Field(description="With `word_timestamps`, or `timestamps` of `word`")
    model: str = Field(description="The model, as MODEL_NAME gives it")
    revision: str | None = Field(description="Its commit, where known")


# ---- OpenAI's ------------------------------------------------------------------------------------------

Granularity = Literal["segment", "word"]
Granularities = list[Granularity]


def _as_list(value: Any) -> Any:
    """A single granularity may come as a text; none, however a client writes it, is the default."""
    return [value] if value and isinstance(value, str) else value or ["segment"]


class TranslationRequest(OpenAIRequest):
    """OpenAI's request, which the transcriber reads as it is: what OpenAI has no field for is constant."""

    task: ClassVar[Task] = "translate"
    fallback: ClassVar[bool] = True
    beam_size: ClassVar[int] = 1
    clip_start: ClassVar[float] = 0.0
    clip_end: ClassVar[float | None] = None

    file: MediaSource = Field(description="The audio file: base64, a `data:` URI or an http(s) URL")
    model: str | None = Field(None, description="The served model's name")
    prompt: str | None = Field(None, max_length=4000, description="Text before the audio")
    response_format: ResponseFormat = Field("json", description="As OpenAI's")
    temperature: float = Field(0.0, ge=0, le=1, description="0: raised where the result is unlikely")
    vad: bool = Field(True, description="Not OpenAI's: false decodes all audio, speech or not")
    stream: Stream = Field(False, description="Send the text in events, as it is recognised")

    @model_validator(mode="after")
    def _streams_text(self) -> Self:
        if self.stream and self.response_format not in ("json", "text"):
            raise invalid("response_format", "a stream has events of text. Leave response_format out.")
        return self

    @property
    def audio(self) -> str | bytes:
        return self.file

    @property
    def spoken_language(self) -> str | None:
        return None

    @property
    def granularities(self) -> Sequence[Granularity]:
        return ["segment"]

    @property
    def wants_words(self) -> bool:
        return "word" in self.granularities


class TranscriptionRequest(TranslationRequest):
    task: ClassVar[Task] = "transcribe"

    language: str | None = Field(None, description="Spoken language; unset: detected")
    timestamp_granularities: Annotated[
        Granularities, BeforeValidator(_as_list, json_schema_input_type=Granularity | Granularities)
    ] = Field(default=["segment"], max_length=2, description="Only with verbose_json")

    @model_validator(mode="before")
    @classmethod
    def _form_name(cls, value: Any) -> Any:
        """Forms name the field `timestamp_granularities[]`."""
        name = "timestamp_granularities"
        if isinstance(value, dict) and f"{name}[]" in value:
            value = {**value, name: value.get(name) or value[f"{name}[]"]}
        return value

    @model_validator(mode="after")
    def _words_only_in_verbose_json(self) -> Self:
        if "word" in self.timestamp_granularities and self.response_format != "verbose_json":
            message = "words are returned only with response_format verbose_json."
            raise invalid("timestamp_granularities", message)
        return self

    @property
    def spoken_language(self) -> str | None:
        return self.language or None

    @property
    def granularities(self) -> Sequence[Granularity]:
        return self.timestamp_granularities


AnyRequest = WhisperRequest | TranslationRequest


class DurationUsage(BaseModel):
    type: Literal["duration"] = "duration"
    seconds: float


class OpenAIText(BaseModel):
    text: str
    usage: DurationUsage


class OpenAIVerbose(BaseModel):
    task: Task
    language: str
    duration: float
    text: str
    segments: list[Segment] | None
    words: list[Word] | None
    usage: DurationUsage


class TextDelta(BaseModel):
    type: Literal["transcript.text.delta"] = "transcript.text.delta"
    delta: str


class TextDone(BaseModel):
    type: Literal["transcript.text.done"] = "transcript.text.done"
    text: str


ROUTES: dict[str, type[BaseModel]] = {
    "/v1/audio/transcriptions": TranscriptionRequest,
    "/v1/audio/translations": TranslationRequest,
    "/v1/models": ModelsRequest,
}
OPENAI_ANSWERS: dict[str, Any] = {
    JSON: OpenAIText | OpenAIVerbose,
    **dict.fromkeys(MEDIA_TYPES.values(), str),
    EVENTS: TextDelta | TextDone,
}
ANSWERS: dict[type[BaseModel], dict[str, Any]] = {
    WhisperRequest: {JSON: WhisperResponse | OpenAIVerbose | str, EVENTS: StreamedSegment | WhisperResponse},
    TranscriptionRequest: OPENAI_ANSWERS,
    TranslationRequest: OPENAI_ANSWERS,
}
