"""Whisper: speech to text and to English, of any length, in any format.

Request:  {"input": {"audio": "<base64, data: URI or http(s) URL>", "timestamps": true}}
Response: {"text": "Hello world.", "chunks": [{"timestamp": [0.0, 1.8], "text": " Hello world."}],
           "language": "en", "language_probability": 0.98, "task": "transcribe", "duration": 2.4,
           "segments": [{"id": 0, "seek": 0, "start": 0.0, "end": 1.8, "text": " Hello world.",
                         "tokens": [50365, 2425, 1002, 13, 50455], "temperature": 0.0, "avg_logprob": -0.21,
                         "compression_ratio": 0.6, "no_speech_prob": 0.01}],
           "words": null, "model": "openai/whisper-large-v3", "revision": "06f2..."}

With `response_format` text, srt or vtt the answer is that text alone, with verbose_json OpenAI's object.

OpenAI:   /v1/audio/transcriptions, /v1/audio/translations and /v1/models, as {"openai_route": ...,
          "openai_input": ...} or through the endpoint's /openai/v1, the file in base64 or as a URL.

Audio longer than the model's window of 30 seconds is split where nobody speaks. The chunks of all jobs that
wait are decoded in the same batches, on one of two engines: transformers, or CTranslate2 by faster-whisper.
"""

from __future__ import annotations

import base64
import io
import os
import random
import wave
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from shared import prewarm, startup, telemetry
from shared.device import pick_device
from shared.jobs import Job, job_handler
from shared.openai import ModelList, ModelsRequest, check_model, model_list
from shared.results import Media
from shared.settings import read_settings

from .formats import as_media, respond, respond_openai
from .schemas import (
    ANSWERS,
    ROUTES,
    OpenAIText,
    OpenAIVerbose,
    Settings,
    StreamedSegment,
    TranscriptionRequest,
    TranslationRequest,
    WhisperRequest,
    WhisperResponse,
)

if TYPE_CHECKING:
    from .engine import Engine
    from .tokenizer import WhisperTokenizer
    from .transcriber import Transcriber

# Windows in one batch. On a GPU more of them cost little more; two CPU cores are busy with a few.
GPU_BATCH_SIZE, CPU_BATCH_SIZE = 32, 8


# ---- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """The loaded model. name: the one that requests and answers use."""

    transcriber: Transcriber
    name: str
    revision: str | None


model: Model


def load(settings: Settings) -> Model:
    model_path = startup.resolve(settings, settings.model_name)
    with startup.phase("import"):
        from .transcriber import Transcriber

        load_engine: Callable[..., tuple[Engine, WhisperTokenizer, Any]]
        if settings.engine == "transformers":
            from .engine_transformers import load as load_transformers

            load_engine = load_transformers
        else:
            from .engine_ctranslate2 import load as load_ctranslate2

            load_engine = partial(load_ctranslate2, compute_type=settings.compute_type)
    device, dtype = pick_device(settings.device, settings.dtype)
    engine, tokenizer, feature_extractor = load_engine(
        model_path, name=settings.model_name, device=device, dtype=dtype, timestamps=settings.model_timestamps
    )
    transcriber = Transcriber(
        engine,
        tokenizer,
        feature_extractor,
        batch_size=settings.max_batch_windows
        or (GPU_BATCH_SIZE if device.type == "cuda" else CPU_BATCH_SIZE),
        chunk_seconds=settings.window_seconds,
        max_bytes=int(settings.max_audio_mb * 1e6),
        max_seconds=settings.max_audio_seconds,
    )
    return Model(transcriber, settings.public_name, model_path.revision)


# ---- handle --------------------------------------------------------------------------------------------


@job_handler(
    WhisperRequest,
    routes=ROUTES,
    answers=ANSWERS,
)
async def handler(
    request: WhisperRequest | TranscriptionRequest | TranslationRequest | ModelsRequest, job: Job
) -> WhisperResponse | OpenAIText | OpenAIVerbose | ModelList | Media | str:
    if isinstance(request, ModelsRequest):
        return model_list(model.name)
    transcriber = model.transcriber
    on_progress = partial(report_progress, job) if job.transport == "queue" else None
    if isinstance(request, WhisperRequest):
        transcript = await transcriber.transcribe(request, on_progress=on_progress)
        language_name = transcriber.tokenizer.language_name(transcript.language)
        return respond(request, transcript, language_name, model=model.name, revision=model.revision)
    check_model(request.model, model.name)
    transcript = await transcriber.transcribe(request, param="file", on_progress=on_progress)
    language_name = transcriber.tokenizer.language_name(transcript.language)
    answer = respond_openai(request, transcript, language_name)
    if not isinstance(answer, str):
        return answer
    telemetry.observe("audio_seconds", transcript.duration)  # a text does not state it
    return as_media(answer, request.response_format) if job.transport == "http" else answer


@handler.streamed
async def stream(
    request: WhisperRequest | TranscriptionRequest | TranslationRequest, job: Job
) -> AsyncIterator[StreamedSegment | WhisperResponse | str]:
    """Segments as they are recognised; on OpenAI routes OpenAI's events, texts already."""
    from .streams import stream_events, stream_segments

    parts: AsyncGenerator[Any, None]
    if isinstance(request, WhisperRequest):
        chunks = model.transcriber.stream(request)
        parts = stream_segments(request, chunks, model=model.name, revision=model.revision)
    else:
        check_model(request.model, model.name)
        parts = stream_events(model.transcriber.stream(request, param="file"))
    async with aclosing(parts):
        async for part in parts:
            yield part


def report_progress(job: Job, done_s: float, total_s: float) -> None:
    """Send the platform, where there is one, how many seconds of the job's audio are decoded."""
    if not os.environ.get("RUNPOD_WEBHOOK_POST_OUTPUT"):
        return
    import runpod

    percent = round(100 * done_s / total_s, 1)
    progress = {"percent": percent, "seconds": round(done_s, 1), "of": round(total_s, 1)}
    runpod.serverless.progress_update(job.data, {"progress": progress})


# ---- start ---------------------------------------------------------------------------------------------


def noise_file(seconds: float = 1.0, rate: int = 16_000) -> str:
    """White noise as a WAV file in base64."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(rate)
        file.writeframes(random.Random(0).randbytes(int(seconds * rate)))  # noqa: S311
    return base64.b64encode(buffer.getvalue()).decode()


def prepare() -> Settings:
    global model
    settings = read_settings(Settings)
    model = load(settings)
    if settings.prewarm:
        # Decoding with word times, without speech detection in its way; then the detection's own model.
        noise = {"audio": noise_file(), "fallback": False}
        prewarm.run(handler, [{**noise, "vad": False, "word_timestamps": True}, noise])
    return settings


def main() -> None:
    startup.serve(handler, prepare, worker="whisper")


if __name__ == "__main__":
    main()
