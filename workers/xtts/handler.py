"""Speech from text with XTTS v2: seventeen languages, built-in voices, and any voice from a recording.

Request:  {"input": {"text": "Good morning.", "language": "en", "speaker": "Ana Florence"}}
          {"input": {"text": "Good morning.", "speaker_wav": "<base64, data: URI or http(s) URL>"}}
Response: {"audio": "<base64>", "format": "wav", "sample_rate": 24000, "duration": 1.37, "seconds": 0.5, ...}

With STREAMING=true and "stream": true the audio comes in chunks while it is generated, {"audio": ...,
"index": 0}, ..., each a file of its own (or raw samples, with pcm), and ends with the object above, whose
`audio` is then empty.

Voices:   {"input": {"voices": true}}
OpenAI:   /v1/audio/speech and /v1/models. In queue mode as {"openai_route": ..., "openai_input": ...} or
          through the endpoint's own /openai/v1 address, and the answer is the object above: queues carry JSON
          only. Over HTTP the answer of /v1/audio/speech is an audio file, sent while it is generated.

A text is split into segments, a sentence or less each. The segments of all jobs share the model's decode
steps, and a new one joins at the next token.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from shared import prewarm, startup
from shared.device import pick_device
from shared.errors import StartError
from shared.jobs import Job, job_handler
from shared.openai import ModelList, ModelsRequest, model_list
from shared.results import Media
from shared.settings import read_settings

from .openai_speech import caller_names, to_xtts_request
from .schemas import (
    ANSWERS,
    MEDIA_TYPES,
    Format,
    Settings,
    SpeechRequest,
    VoicesRequest,
    VoicesResponse,
    XttsChunk,
    XttsRequest,
    XttsResponse,
)

if TYPE_CHECKING:
    from .speech import Synthesizer


# ---- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """The loaded model. served: every name that a request may call it by."""

    synthesizer: Synthesizer
    served: tuple[str, ...]


engine: Engine


def load(settings: Settings) -> Engine:
    if not settings.coqui_tos_agreed:
        raise StartError(
            "XTTS's weights are under the Coqui Public Model License, for non-commercial use only "
            "(https://coqui.ai/cpml.txt). Set COQUI_TOS_AGREED=1 if you agree, or have bought a licence.",
            code="licence_not_agreed",
        )
    model_path = startup.resolve(settings, settings.model_name, extra=("*.pth",))
    folder = Path(model_path.path)
    for name in ("config.json", "model.pth", "vocab.json"):
        if not (folder / name).is_file():
            raise StartError(f"{settings.model_name} has no {name}. Use an XTTS v2 model.", code="incomplete")
    with startup.phase("import"):
        from .engine import SpeechEngine
        from .loading import built_in_voices, default_voice, languages, load_model
        from .speech import Synthesizer
        from .text import TextTokenizer
    with startup.phase("load") as phase:
        device, _ = pick_device(settings.device)
        model = load_model(folder, device=device, dtype=settings.dtype)
        phase.bytes = sum(weight.nbytes for weight in model.parameters())
    voices = built_in_voices(model)
    default = default_voice(voices, settings.default_speaker)
    decode_loop = SpeechEngine(model, max_batch_size=settings.max_batch_size)
    synthesizer = Synthesizer(
        decode_loop,
        TextTokenizer(model.tokenizer, languages=languages(model), max_tokens=decode_loop.max_text_tokens),
        voices,
        default_voice=default,
        voice_cache_size=settings.voice_cache_size,
        name=settings.public_name,
        revision=model_path.revision,
    )
    return Engine(synthesizer, (settings.public_name, settings.model_name))


# ---- handle --------------------------------------------------------------------------------------------


@job_handler(
    XttsRequest,
    VoicesRequest,
    routes={"/v1/audio/speech": SpeechRequest, "/v1/models": ModelsRequest},
    answers=ANSWERS,
)
async def handler(
    request: XttsRequest | VoicesRequest | SpeechRequest | ModelsRequest, job: Job
) -> XttsResponse | VoicesResponse | ModelList:
    synthesizer = engine.synthesizer
    if isinstance(request, ModelsRequest):
        return model_list(synthesizer.name)
    voices = synthesizer.voices
    if isinstance(request, VoicesRequest):
        return VoicesResponse(
            voices=list(voices.built_in),
            default=voices.default,
            languages=synthesizer.text_tokenizer.languages,
            formats=list(get_args(Format)),
        )
    if isinstance(request, SpeechRequest):
        request = to_xtts_request(request, voices=voices.built_in, served=engine.served)
        with caller_names():
            return await synthesizer.complete(request, job.check_size)
    return await synthesizer.complete(request, job.check_size)


@handler.streamed
async def stream(
    request: XttsRequest | SpeechRequest, job: Job
) -> AsyncIterator[XttsChunk | XttsResponse | Media]:
    synthesizer = engine.synthesizer
    if isinstance(request, XttsRequest):
        async for part in synthesizer.stream(request):
            yield part
        return
    voices = synthesizer.voices.built_in
    request = to_xtts_request(request, voices=voices, served=engine.served, stream=True)
    media_type = MEDIA_TYPES[request.response_format]
    with caller_names():
        async for data in synthesizer.stream_file(request):
            yield Media(data, media_type)


# ---- start ---------------------------------------------------------------------------------------------


def prepare() -> Settings:
    global engine
    settings = read_settings(Settings)
    engine = load(settings)
    if settings.prewarm:
        prewarm.run(handler, _prewarm_inputs())
    return settings


def _prewarm_inputs() -> list[dict[str, Any]]:
    """A voice from a recording of noise, and the default voice where there is one."""
    from .voices import noise_recording

    inputs = [{"text": "Warm.", "speaker_wav": noise_recording()}]
    if engine.synthesizer.voices.default is not None:
        inputs.append({"text": "This is warm."})
    return inputs


def main() -> None:
    startup.serve(handler, prepare, worker="xtts")


if __name__ == "__main__":
    main()
