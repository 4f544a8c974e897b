"""Speech from text with XTTS v2: seventeen languages, built-in voices, and any voice from a recording.

Request:  {"input": {"text": "Good morning.", "language": "en", "speaker": "Ana Florence"}}
          {"input": {"text": "Good morning.", "speaker_wav": "<base64, data: URI or http(s) URL>"}}
Response: {"audio": "<base64>", "format": "wav", "sample_rate": 24000, "duration": 1.37, "seconds": 0.5, ...}

With STREAMING=true and "stream": true the audio comes in chunks as it is spoken, {"audio": ..., "index": 0},
..., each a file of its own (or raw samples, with pcm), and ends with the object above, whose `audio` is then
empty.

Voices:   {"input": {"voices": true}}
OpenAI:   /v1/audio/speech and /v1/models, as {"openai_route": ..., "openai_input": ...} or through the
          endpoint's own /openai/v1 address. The answer is the object above: RunPod carries JSON only.

A text is spoken in pieces, one a sentence or less. The pieces of all jobs share the model's steps, and a new
one joins at the next token.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import threading
import time
import traceback
import unicodedata
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Hashable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from shared import openai_api, prewarm, startup
from shared.errors import JobError, StartError
from shared.generation import DecodeBatch, Logprob, SamplingParams, sample_next_tokens, preallocated_cache
from shared.hardware import parallel_batches, pick_device, share_cores
from shared.jobs import (
    Request,
    check_size,
    current_job,
    empty_cache,
    engine_stopped,
    is_cuda_broken,
    is_out_of_memory,
    job_handler,
    start_config,
)
from shared.logs import log
from shared.media import encode_audio, load_audio, load_bytes
from shared.openai_api import ModelList, ModelsRequest, OpenAIRequest
from shared.settings import DType, WorkerSettings, read_settings

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

Language = Literal[
    "en", "es", "fr", "de", "it", "pt", "pl", "tr", "ru", "nl", "cs", "ar", "zh-cn", "hu", "ko", "ja", "hi"
]  # fmt: skip
Format = Literal["wav", "flac", "mp3", "opus", "pcm"]
Rate = Literal[8000, 12000, 16000, 22050, 24000, 44100, 48000]
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
MAX_TEXT = 50_000
MAX_REFERENCES = 8
MAX_REFERENCE_BYTES = 20 * 2**20
MAX_REFERENCE_S = 900.0
MIN_REFERENCE_S = 1.0
SILENCE = 1e-3  # of full scale, -60 dB: the loudest sample of a recording with nothing in it
REFERENCE_RATE = 22050  # Hz; what XTTS listens to
# What OpenAI's clients ask for, as voices of XTTS v2 that are alike; those not named get the default voice.
OPENAI_VOICES = {
    "alloy": "Alison Dietlinde", "ash": "Damien Black", "ballad": "Royston Min", "coral": "Gracie Wise",
    "echo": "Andrew Chipper", "fable": "Craig Gutsy", "nova": "Daisy Studious", "onyx": "Viktor Menelaos",
    "sage": "Sofia Hellen", "shimmer": "Claribel Dervla", "verse": "Luis Moray", "marin": "Ana Florence",
    "cedar": "Aaron Dreschner",
}  # fmt: skip
# Seconds of silence after a piece, by what ends it, at speed 1.
PAUSES = {"paragraph": 0.55, "sentence": 0.3, "clause": 0.12, "word": 0.0}
STREAM_TOKENS = 20  # of XTTS v2's, 0.9 s: how much is spoken between two chunks
MAX_CHUNK_S = 4.0  # of the largest kind, 48 kHz WAV: half of what the platform takes in one post
MAX_DECODING = 64  # pieces that wait for the decoder; the transformer then waits too
# A frame of sound depends on 13.5 frames on either side: HiFi-GAN V1's convolutions, added up.
CONTEXT = 16
SMALLER = "Ask for response_format mp3 or opus, which are a tenth of the size. "


# ---- settings ------------------------------------------------------------------------------------------


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
        "auto", description="Of the transformer; auto: float32, which XTTS was made in, on every device"
    )
    max_batch_size: int = Field(16, ge=1, le=256, description="Most pieces of text spoken at the same time")
    voice_cache_size: int = Field(
        256, ge=1, le=100_000, description="Cloned voices kept in memory, 140 kB each, by their recordings"
    )


# ---- requests and responses ----------------------------------------------------------------------------


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


References = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(_as_list),
    Field(min_length=1, max_length=MAX_REFERENCES),
]


class XttsRequest(Request):
    text: str = Field(max_length=MAX_TEXT, description="What to say")
    language: Language = Field("en", description="The language of the text")
    speaker: str | None = Field(None, description="A built-in voice; unset: the default one")
    speaker_wav: References | None = Field(
        None,
        description="A recording of the voice, or up to eight: base64, a `data:` URI or an http(s) URL",
    )
    speed: float = Field(1.0, ge=0.5, le=2, description="2: twice as fast")
    temperature: float | None = Field(
        None, ge=0, le=2, description="Higher: livelier and less reliable; unset: the model's own, 0.75"
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="Draw from the likeliest tokens with this sum; unset: the model's, 0.85"
    )
    top_k: int | None = Field(
        None, ge=1, le=1000, description="Draw from so many of the likeliest tokens; unset: the model's, 50"
    )
    repetition_penalty: float | None = Field(
        None, ge=1, le=20, description="Against drawn-out sounds; unset: the model's own, 5"
    )
    seed: int | None = Field(
        None, description="The same seed gives the same speech; unset: another each time"
    )
    response_format: Format = Field("wav", description="pcm: 16 bits, little-endian, mono, without a header")
    sample_rate: Rate | None = Field(None, description="In Hz; unset: the model's own, 24000")
    stream: bool = Field(False, description="Send the audio in chunks as it is spoken")

    @model_validator(mode="after")
    def _fits_together(self) -> XttsRequest:
        if self.speaker is not None and self.speaker_wav is not None:
            raise _wrong("speaker", "invalid_value", "give either it or speaker_wav.")
        if self.response_format == "opus" and self.sample_rate not in (None, *OPUS_RATES):
            rates = ", ".join(map(str, OPUS_RATES))
            raise _wrong("sample_rate", "invalid_value", f"opus has {rates}, got {self.sample_rate}.")
        return self


class VoicesRequest(Request):
    voices: Literal[True] = Field(description="true: list the voices and languages")


class SpeechRequest(OpenAIRequest):
    """The body of POST /v1/audio/speech, and what this worker knows beside it."""

    input: str = Field(max_length=MAX_TEXT, description="What to say")
    voice: str | dict[str, Any] = Field(description="A built-in voice, or one of OpenAI's names")
    model: str | None = Field(None, description="The served model's name")
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = Field("mp3")
    speed: float = Field(1.0, ge=0.25, le=4)
    stream_format: Literal["audio", "sse"] = Field("audio")
    language: Language = Field("en", description="The language of the text; OpenAI has no such field")
    seed: int | None = Field(None, description="The same seed gives the same speech")
    sample_rate: Rate | None = Field(None, description="In Hz")
    speaker_wav: References | None = Field(None, description="Recordings of the voice, instead of `voice`")


def _wrong(param: str, code: str, message: str) -> JobError:
    return JobError(f"{param}: {message}", param=param, code=code)


class XttsChunk(BaseModel):
    audio: str = Field(description="Base64: a whole file, or raw samples with pcm")
    format: Format = Field(description="As asked")
    sample_rate: int = Field(description="In Hz")
    index: int = Field(description="Which chunk, from 0")


class XttsResponse(BaseModel):
    audio: str = Field(description="The speech, mono, as base64; empty at the end of a stream")
    format: Format = Field(description="As asked")
    sample_rate: int = Field(description="In Hz")
    duration: float = Field(description="Seconds of speech")
    seconds: float = Field(description="Seconds that the worker took, waiting for its turn included")
    finish_reason: Literal["stop", "length"] = Field(
        description="`length`: the model did not come to an end in some piece, which may sound cut off"
    )
    language: str = Field(description="The language")
    speaker: str | None = Field(description="The built-in voice; null for a cloned one")
    model: str = Field(description="The model, as MODEL_NAME gives it")
    revision: str | None = Field(description="Its commit, where known")


class VoicesResponse(BaseModel):
    voices: list[str] = Field(description="The built-in voices")
    default: str | None = Field(description="The one of a request that names none")
    languages: list[str] = Field(description="What `language` may be")
    formats: list[str] = Field(description="What `response_format` may be")


Asked = XttsRequest | VoicesRequest | SpeechRequest | ModelsRequest
Answer = XttsResponse | VoicesResponse | ModelList
ROUTES: dict[str, type[BaseModel]] = {"/v1/audio/speech": SpeechRequest, "/v1/models": ModelsRequest}


def read_speech(request: SpeechRequest, engine: Engine) -> XttsRequest:
    """OpenAI's request as this worker's own. Raises JobError for what it does not have."""
    openai_api.check_model(request.model, *engine.served)
    if request.response_format == "aac":
        raise _wrong(
            "response_format", "unsupported", "aac is not made here. Use mp3, opus, flac, wav or pcm."
        )
    if request.stream_format == "sse":
        raise _wrong("stream_format", "unsupported", "sse is not served here. Leave stream_format out.")
    if not 0.5 <= request.speed <= 2:
        raise _wrong("speed", "invalid_value", f"0.5 to 2 sounds like speech, got {request.speed:g}.")
    voice = request.voice if isinstance(request.voice, str) else str(request.voice.get("id"))
    speaker: str | None = voice
    if voice not in engine.speakers and voice in OPENAI_VOICES:
        speaker = OPENAI_VOICES[voice] if OPENAI_VOICES[voice] in engine.speakers else None
    return XttsRequest(
        text=request.input, language=request.language, speed=request.speed, seed=request.seed,
        speaker=None if request.speaker_wav else speaker, speaker_wav=request.speaker_wav,
        response_format=request.response_format, sample_rate=request.sample_rate,
    )  # fmt: skip


# ---- text ----------------------------------------------------------------------------------------------

End = Literal["paragraph", "sentence", "clause", "word"]
# Full stops after these end no sentence, nor do those after a single letter.
_SHORT = """
mr mrs ms dr drs prof st sr sra sta dra jr co ltd inc gen col capt lt sgt rev hon maj esq ft vs fig vol
approx ca cf etc mme mlle mm dhr mevr jhr sig dott fr hr bzw evtl ggf inkl usw bspw sog ing sw byk nőv p.ej
e.g i.e z.b d.h u.a s.a p.s a.m p.m ud uds av avda pag art tel г ул им руб тыс
"""
_ABBREVIATIONS = frozenset(_SHORT.split())
_LONGEST = 40  # more than an abbreviation, its marks and the white space after it
_CLOSERS = "\"'\u2019\u201d»)\\]}」』）"
# Possessive, and begun at the first of several marks only: a long row of them costs no more than it is long.
_SENTENCE = re.compile(rf"(?:(?<![.!?…؟।])[.!?…؟।]++[{_CLOSERS}]*+(?=\s)|[。！？]++[{_CLOSERS}]*+)\s*+")
_CLAUSE = re.compile(r"[,;:،؛–—](?=\s)|[，、；：]")
# Symbols that the library reads out; every other one is left out.
_READ_OUT = frozenset("&@%#$£€°")
_HINDI = ("शून्य", "एक", "दो", "तीन", "चार", "पाँच", "छह", "सात", "आठ", "नौ")  # num2words has no Hindi
_KEPT = re.compile(r"[^\W_]")


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    end: End


def speakable(text: str) -> str:
    """`text` without what nobody can say: emoji, control characters, symbols; line ends are kept."""
    text = (
        unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").replace("\u2029", "\n")
    )

    def kept(character: str) -> str:
        if character in _READ_OUT or character == "\n":
            return character
        category = unicodedata.category(character)
        # Joiners, and what makes an emoji of a letter; other marks belong to the letters of Arabic and Hindi.
        if category in ("Cf", "Me") or "\ufe00" <= character <= "\ufe0f":
            return ""
        return " " if category[0] in "SCZ" else character

    return "".join(map(kept, text))


def split(text: str, limit: int) -> list[Piece]:
    """Pieces of at most `limit` characters that say all of `text` in order, each with something to say.

    A text is cut at line ends and at the ends of sentences; a sentence over the limit after its last comma or
    semicolon in the piece's second half, else at a space, else anywhere.
    """
    pieces: list[Piece] = []
    for paragraph in text.split("\n"):
        begin = 0
        start_of = len(pieces)
        for match in _SENTENCE.finditer(paragraph):
            here = match.end()
            if not _ends(paragraph[max(begin, here - _LONGEST) : here], paragraph[here : here + 1]):
                continue
            pieces += _cut(paragraph[begin : match.end()], limit)
            begin = match.end()
        pieces += _cut(paragraph[begin:], limit)
        if len(pieces) > start_of:
            pieces[-1] = Piece(pieces[-1].text, "paragraph")
    return pieces


def _ends(sentence: str, following: str) -> bool:
    """Whether a full stop ends `sentence`, and does not belong to an abbreviation or a number in it."""
    stripped = sentence.rstrip()
    if not stripped.rstrip(_CLOSERS).endswith(".") or stripped.rstrip(_CLOSERS).endswith(".."):
        return True
    words = stripped.rstrip(_CLOSERS)[:-1].rsplit(None, 1)
    last = words[-1].lstrip("([{\"'«“„").lower() if words else ""
    if len(last) == 1 and last.isalpha():
        return False
    if last in ("no", "nr", "núm", "č"):
        return not following.isdigit()
    return not (last in _ABBREVIATIONS or following.islower() or (last.isdigit() and len(last) <= 2))


def _cut(sentence: str, limit: int) -> list[Piece]:
    rest = " ".join(sentence.split())
    pieces = []
    while len(rest) > limit:
        ends = [match.end() for match in _CLAUSE.finditer(rest, limit // 2, limit)]
        if ends:
            at, end = ends[-1], "clause"
        elif (at := rest.rfind(" ", 1, limit + 1)) > 0:
            end = "word"
        else:
            at, end = limit, "word"
        pieces.append(Piece(rest[:at].strip(), end))  # type: ignore[arg-type]
        rest = rest[at:].strip()
    pieces.append(Piece(rest, "sentence"))
    return [piece for piece in pieces if _KEPT.search(piece.text)]


# ---- the engine ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Voice:
    """latents (1, 32, width) condition the transformer, embedding (1, 512, 1) the decoder."""

    latents: torch.Tensor
    embedding: torch.Tensor


@dataclass(frozen=True, slots=True)
class Heard:
    """What has come since the last one; the one with a finish_reason is the last."""

    samples: Future[NDArray[np.float32]]
    finish_reason: Literal["stop", "length"] | None


@dataclass(slots=True, eq=False)
class Row:
    """One piece of text that is being spoken."""

    ids: list[int]
    voice: Voice
    sampling: SamplingParams
    speed: float
    seed: int
    each: bool  # tell what there is every STREAM_TOKENS, not only at the end
    job: Hashable
    inputs: Mapping[str, Any]
    loop: asyncio.AbstractEventLoop
    news: asyncio.Queue[Heard | Exception] = field(default_factory=asyncio.Queue)
    tokens: list[int] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)  # what the decoder makes sound of, one a token
    frames: int = 0  # of sound, told already
    sounds: list[Future[NDArray[np.float32]]] = field(default_factory=list)  # of those, in order
    over: bool = False
    random: random.Random = field(init=False)
    seen: torch.Tensor | None = None
    chances: list[Logprob] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin anew. What was told stays told: the same numbers are drawn again."""
        self.tokens, self.states, self.seen = [], [], None
        self.random = random.Random(self.seed)  # noqa: S311

    async def hear(self) -> tuple[NDArray[np.float32], Literal["stop", "length"] | None]:
        """The next samples, and why they are the last ones, if they are. Raises what stopped the speech."""
        news = await self.news.get()
        if isinstance(news, Exception):
            raise news
        return await asyncio.wrap_future(news.samples), news.finish_reason

    def stop(self) -> None:
        """Give its place up: nobody listens any more."""
        self.over = True
        for sound in self.sounds:
            sound.cancel()

    def tell(self, news: Heard | Exception) -> None:
        self.over = self.over or isinstance(news, Exception) or news.finish_reason is not None
        try:
            self.loop.call_soon_threadsafe(self.news.put_nowait, news)
        except RuntimeError:  # the loop is closed
            self.over = True


class Speaker:
    """Speaks pieces of text with an Xtts, many at a time.

    The library speaks one piece after another. Here the transformer makes one token for all pieces at a time,
    from the same inputs (`Xtts.inference`); its states go through the decoder as they are, where the library
    computes them once more. A piece depends on nothing but itself: in float32 its tokens are those that it
    would get alone.

    The transformer is not thread-safe and has one thread. The decoder is a pure function and has others, so
    that pieces are spoken while it makes sound of those that have been.
    """

    def __init__(self, model: Any, *, max_rows: int = 16) -> None:
        self.model, self._gpt, self._device = model, model.gpt, model.device
        self._max_rows = max_rows
        self.max_text_tokens: int = model.args.gpt_max_text_tokens - 1
        self.max_tokens: int = self._gpt.max_gen_mel_tokens
        self._incoming: SimpleQueue[Row | tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._waiting: deque[Row] = deque()
        self._taken: list[Row] = []
        self._live: DecodeBatch[Row] | None = None
        self._dead: Exception | None = None
        self._lanes = parallel_batches(self._device)
        self._decoders = ThreadPoolExecutor(self._lanes, thread_name_prefix="decoder")
        self._decoding: list[Future[NDArray[np.float32]]] = []
        threading.Thread(target=self._work, name="engine", daemon=True).start()

    # -- for the event loop

    async def call(self, work: Callable[[], Any]) -> Any:
        """What `work` gives, run on the engine's thread between two tokens."""
        future: Future[Any] = Future()
        self._incoming.put((work, future))
        if self._dead is not None:
            raise self._dead
        return await asyncio.wrap_future(future)

    def begin(
        self, ids: list[int], voice: Voice, sampling: SamplingParams, *, seed: int, speed: float = 1.0,
        each: bool = False, job: Hashable = None,
    ) -> Row:  # fmt: skip
        """Start speaking; `row.hear` gives what there is to hear, `row.stop` ends it early."""
        import torch

        # The library counts the filler that stands for the prompt, 1, and the start as said already.
        said = torch.tensor([[1, self._gpt.start_audio_token]])
        row = Row(
            ids, voice, sampling, speed, seed, each, job, {"input_ids": said}, asyncio.get_running_loop()
        )
        self._incoming.put(row)
        if self._dead is not None:
            row.tell(self._dead)
        return row

    def close(self) -> None:
        """Let the thread end after the step that it is at. What still runs, and what comes later, fails."""
        self._incoming.put(None)

    # -- on the engine's thread

    def _work(self) -> None:
        end: Exception = RuntimeError("the speaker was closed")
        try:
            self._run()
        except BaseException as error:
            end = engine_stopped(error)
        # Who comes later finds _dead: it is set before the queue is read for the last time.
        self._dead = end
        rows = [*(self._live.rows if self._live else ()), *self._taken, *self._waiting]
        while not self._incoming.empty():
            item = self._incoming.get()
            if isinstance(item, Row):
                rows.append(item)
            elif item is not None and item[1].set_running_or_notify_cancel():
                item[1].set_exception(end)
        for row in rows:
            if not row.over:
                row.tell(end)
        self._decoders.shutdown(wait=False)  # what it has been given, it still does

    def _run(self) -> None:
        import torch

        with torch.inference_mode():
            while True:
                while not self._incoming.empty() or not (self._waiting or self._live):
                    item = self._incoming.get()
                    if item is None:
                        return
                    if isinstance(item, Row):
                        self._waiting.append(item)
                    else:
                        _carry_out(*item)
                self._turn()

    def _turn(self) -> None:
        """Take in who fits, then one more token for everybody."""
        share_cores(self._lanes, 1 + self._at_work())
        self._taken = self._admit()
        if self._taken:
            self._begin(self._taken)
            self._taken = []
        if self._live:
            self._advance(self._live)

    def _admit(self) -> list[Row]:
        """Take those who begin now out of the queue: each of the job with the fewest pieces going."""
        self._waiting = deque(row for row in self._waiting if not row.over)
        going = Counter(row.job for row in (self._live.rows if self._live else ()))
        chosen: list[Row] = []
        for _ in range(min(len(self._waiting), self._max_rows - going.total())):
            row = min(self._waiting, key=lambda row: going[row.job])
            self._waiting.remove(row)
            going[row.job] += 1
            chosen.append(row)
        return chosen

    def _begin(self, rows: list[Row]) -> None:
        """Read the texts of `rows`. Where that fails for several, half of them at a time."""
        problem = None
        try:
            self._prefill(rows)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            problem = error
        if problem is None:
            return
        no_memory = _check_memory(problem)
        rows = [row for row in rows if not row.over]
        if len(rows) > 1:
            half = len(rows) // 2
            self._begin(rows[:half])
            self._begin(rows[half:])
        elif rows and no_memory and self._live:
            self._shrink(len(self._live.rows))
            self._waiting.appendleft(rows[0])
        elif rows:
            rows[0].tell(problem)

    def _advance(self, batch: DecodeBatch[Row]) -> None:
        problem = None
        try:
            self._step(batch)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            problem = error
        if problem is None:
            return
        no_memory = _check_memory(problem)  # may raise: _work finds the rows in _live
        # Some layers of the cache are a token further than the others: who goes on begins anew.
        self._live = None
        rows = [row for row in batch.rows if not row.over]
        if no_memory and len(batch.rows) > 1:
            self._shrink(len(batch.rows) // 2)
            for row in reversed(rows):
                row.restart()
                self._waiting.appendleft(row)
        else:
            log.error("a step failed for %d pieces: %r", len(rows), problem)
            for row in rows:
                row.tell(problem)

    def _shrink(self, rows: int) -> None:
        self._max_rows = max(1, rows)
        log.warning("out of memory: at most %d pieces at a time from now on", self._max_rows)

    def _prefill(self, rows: list[Row]) -> None:
        """Voice, text and the start of speech, as embeddings, padded on the left."""
        import torch
        from torch.nn.functional import pad

        gpt = self._gpt
        prompts = []
        for row in rows:
            ids = [gpt.start_text_token, *row.ids, gpt.stop_text_token]
            text = torch.tensor([ids], device=self._device)
            start = torch.tensor([[gpt.start_audio_token]], device=self._device)
            parts = [row.voice.latents.to(self._device, gpt.mel_head.weight.dtype)]
            parts.append(gpt.text_embedding(text) + gpt.text_pos_embedding(text))
            parts.append(gpt.mel_embedding(start) + gpt.mel_pos_embedding(start))
            prompts.append(torch.cat(parts, dim=1)[0])
        width = max(len(prompt) for prompt in prompts)
        inputs = torch.stack([pad(prompt, (0, 0, width - len(prompt), 0)) for prompt in prompts])
        mask = torch.zeros(len(rows), width, dtype=torch.long, device=self._device)
        for place, prompt in enumerate(prompts):
            mask[place, width - len(prompt) :] = 1
        batch = DecodeBatch(rows, preallocated_cache(gpt.gpt), mask, mask[:, :0])
        output = gpt.gpt(
            inputs_embeds=inputs, attention_mask=mask, past_key_values=batch.cache, use_cache=True
        )
        if self._settle(batch, output.last_hidden_state[:, -1]):
            if self._live:
                self._live.join(batch)
            else:
                self._live = batch

    def _step(self, batch: DecodeBatch[Row]) -> None:
        import torch

        places = torch.tensor([[len(row.tokens)] for row in batch.rows], device=self._device)
        inputs = self._gpt.mel_embedding(batch.tokens) + self._gpt.mel_pos_embedding.emb(places)
        batch.mask = torch.cat([batch.mask, torch.ones_like(batch.mask[:, :1])], dim=1)
        output = self._gpt.gpt(
            inputs_embeds=inputs, attention_mask=batch.mask, past_key_values=batch.cache, use_cache=True
        )
        if not self._settle(batch, output.last_hidden_state[:, -1]):
            self._live = None

    def _settle(self, batch: DecodeBatch[Row], hidden: torch.Tensor) -> bool:
        """Give each row its token, tell what can be heard, drop who is over; False when none is left."""
        import torch

        states = self._gpt.final_norm(hidden)
        logits = self._gpt.mel_head(states).float()
        tokens = sample_next_tokens(logits, batch.rows)
        batch.tokens = torch.tensor(tokens, device=self._device)[:, None]
        for row, token, state in zip(batch.rows, tokens, states, strict=True):
            if not row.over:
                self._take(row, token, state)
        going = [place for place, row in enumerate(batch.rows) if not row.over]
        if 0 < len(going) < len(batch.rows):
            batch.keep(going)
        return bool(going)

    def _take(self, row: Row, token: int, state: torch.Tensor) -> None:
        if token < 0:
            return row.tell(_not_finite())
        row.tokens.append(token)
        row.states.append(state)
        end: Literal["stop", "length"] | None = None
        if token == self._gpt.stop_audio_token:
            end = "stop"
        elif len(row.tokens) >= row.sampling.max_tokens:
            end = "length"
        if end or (row.each and len(row.tokens) % STREAM_TOKENS == 0):
            try:
                self._sound(row, end)
            except Exception as error:
                _check_memory(error)
                row.tell(error)
        if row.over:  # its job keeps it until the last piece has been spoken
            row.states, row.seen = [], None

    def _sound(self, row: Row, end: Literal["stop", "length"] | None) -> None:
        """Tell what has become certain since the last time: all that there is, where this is the end.

        Steps and their order as in `Xtts.inference` and `HifiDecoder.forward`.
        """
        import torch
        from torch.nn.functional import interpolate

        decoder = self.model.hifigan_decoder
        frames = torch.stack(row.states).float().T[None]
        scales = [decoder.ar_mel_length_compression / decoder.output_hop_length]
        if decoder.output_sample_rate != decoder.input_sample_rate:
            scales.append(decoder.output_sample_rate / decoder.input_sample_rate)
        if row.speed != 1:
            scales.insert(0, max(1 / row.speed, 1 / len(row.states)))
        for scale in scales:
            frames = interpolate(frames, scale_factor=scale, mode="linear")
        certain = frames.shape[2]
        if end is None:
            # The newest frames lie between the last state and one that is still to come.
            certain -= CONTEXT + 2 * math.ceil(certain / len(row.states)) + 2
            if certain <= row.frames:
                return
        first = max(0, row.frames - CONTEXT)
        part = frames[:, :, first : certain + CONTEXT]
        self._decoding = [it for it in self._decoding if not it.done()]
        if len(self._decoding) >= MAX_DECODING:
            wait(self._decoding, return_when=FIRST_COMPLETED)
        sound = self._decoders.submit(
            self._decode, part, row.voice.embedding, row.frames - first, certain - first
        )
        row.frames = certain
        self._decoding.append(sound)
        row.sounds.append(sound)
        row.tell(Heard(sound, end))

    # -- on a decoder's thread

    def _decode(
        self, frames: torch.Tensor, embedding: torch.Tensor, begin: int, end: int
    ) -> NDArray[np.float32]:
        """The samples of the frames from `begin` to `end`; those around them are what they depend on."""
        import torch

        share_cores(self._lanes, self._at_work() + bool(self._live))
        decoder = self.model.hifigan_decoder
        with torch.inference_mode():
            wave = decoder.waveform_decoder(frames, g=embedding.to(self._device))
            samples = wave[0, 0, begin * decoder.output_hop_length : end * decoder.output_hop_length]
            if not samples.isfinite().all():
                raise _not_finite()
            return samples.cpu().numpy()  # type: ignore[no-any-return]

    def _at_work(self) -> int:
        """How many decoders have something to do."""
        return min(self._lanes, sum(not it.done() for it in self._decoding))


def _carry_out(work: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
        _check_memory(error)


def _check_memory(error: Exception) -> bool:
    """Whether `error` is one for want of memory. Raises it if a GPU does nothing more in this process."""
    if is_out_of_memory(error):
        empty_cache()
        return True
    if is_cuda_broken(error):
        raise error
    return False


def _not_finite() -> JobError:
    return JobError(
        "The model gave numbers that are not finite. Set DTYPE=float32.",
        code="not_finite",
        type="server_error",
    )


# ---- voices --------------------------------------------------------------------------------------------


class Voices:
    """Cloned voices by the hash of their recordings, the least recently used forgotten.

    The content is the only key: a job gets a voice by bringing its recording, and in no other way.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[str, Voice] = OrderedDict()
        self._coming: dict[str, asyncio.Task[Voice]] = {}

    async def get(self, key: str, make: Callable[[], Coroutine[Any, Any, Voice]]) -> Voice:
        """The voice of `key`; `make` is run once for all who wait for it."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key not in self._coming:
            self._coming[key] = task = asyncio.create_task(make())
            task.add_done_callback(lambda task: self._settle(key, task))
        return await asyncio.shield(self._coming[key])  # who waits may be cancelled, the others go on

    def _settle(self, key: str, task: asyncio.Task[Voice]) -> None:
        del self._coming[key]
        if not task.cancelled() and task.exception() is None:
            self._kept[key] = task.result()
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)


def read_reference(data: bytes, param: str) -> NDArray[np.float32]:
    """A recording from its first sound to its last, at REFERENCE_RATE. Raises JobError for one without."""
    import numpy as np

    samples = load_audio(data, rate=REFERENCE_RATE, param=param, max_seconds=MAX_REFERENCE_S)
    loud = np.flatnonzero(np.abs(samples) > SILENCE)
    if not loud.size:
        raise _wrong(param, "silent", "there is nothing to hear in it. Send a recording of a voice.")
    samples = samples[loud[0] : loud[-1] + 1]
    seconds = len(samples) / REFERENCE_RATE
    if seconds < MIN_REFERENCE_S:
        raise _wrong(
            param,
            "too_short",
            f"{seconds:.2f} s of sound, and a voice takes at least {MIN_REFERENCE_S:g} s. Send 6 s or more.",
        )
    return samples.clip(-1, 1)


def clone(model: Any, recordings: Sequence[NDArray[np.float32]]) -> Voice:
    """The voice of one or several recordings, as `Xtts.get_conditioning_latents` has it from files."""
    import torch

    config = model.config
    sounds = [torch.from_numpy(it)[None, : REFERENCE_RATE * config.max_ref_len] for it in recordings]
    if config.sound_norm_refs:
        sounds = [sound / sound.abs().max() * 0.75 for sound in sounds]
    embeddings = [model.get_speaker_embedding(sound, REFERENCE_RATE) for sound in sounds]
    latents = model.get_gpt_cond_latents(
        torch.cat(sounds, dim=1).to(model.device), REFERENCE_RATE,
        length=config.gpt_cond_len, chunk_length=config.gpt_cond_chunk_len,
    )  # fmt: skip
    return Voice(latents, torch.stack(embeddings).mean(dim=0))


# ---- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    speaker: Speaker
    tokenizer: Any
    languages: Sequence[str]
    speakers: dict[str, Voice]
    default: str | None
    voices: Voices
    sampling: SamplingParams  # the model's own
    rate: int
    name: str
    served: tuple[str, ...]
    revision: str | None
    # One thread: the dictionaries of some languages are not made for more.
    readers: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="text")
    )
    coders: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="audio")
    )

    async def read(self, text: str, language: str) -> list[tuple[list[int], End]]:
        return await asyncio.get_running_loop().run_in_executor(self.readers, self._read, text, language)

    def _read(self, text: str, language: str) -> list[tuple[list[int], End]]:
        """The tokens of each piece, and what ends it."""
        if language not in self.languages:
            raise _wrong(
                "language", "unsupported", f"{self.name} speaks {', '.join(self.languages)}, not {language}."
            )
        pieces = split(speakable(text), self.tokenizer.char_limits[language.partition("-")[0]])
        if not pieces:
            raise _wrong("text", "nothing_to_say", "there are no letters or digits in it. Send words.")
        return [read for piece in pieces for read in self._encode(piece, language)]

    def _encode(self, piece: Piece, language: str) -> list[tuple[list[int], End]]:
        text = piece.text.lower()
        try:
            ids = self.tokenizer.encode(text, lang=language)
        except Exception:  # a number that num2words has no name for, or not in this language
            digits = _HINDI if language == "hi" else "0123456789"
            spelt = re.sub(r"[0-9]", lambda match: f" {digits[int(match[0])]} ", text)
            try:
                ids = self.tokenizer.encode(" ".join(spelt.split()), lang=language)
            except Exception as error:
                log.warning("text that cannot be read in %s: %r", language, error)
                raise _wrong(
                    "text", "bad_text", f"{piece.text[:60]!r} cannot be read in {language}. Spell it out."
                ) from None
        if len(ids) <= self.speaker.max_text_tokens or len(piece.text) < 2:
            return [(ids[: self.speaker.max_text_tokens], piece.end)]
        # What is read out can be much longer than what is written: numbers are.
        halves = split(piece.text, (len(piece.text) + 1) // 2)
        halves[-1] = Piece(halves[-1].text, piece.end)
        return [read for half in halves for read in self._encode(half, language)]

    async def voice(self, request: XttsRequest) -> Voice:
        if request.speaker_wav is None:
            name = request.speaker if request.speaker is not None else self.default
            if name is None or name not in self.speakers:
                known = ", ".join(self.speakers) or "none: send speaker_wav"
                said = "this model has no default voice" if name is None else f"there is no voice {name!r}"
                raise _wrong("speaker", "unknown_voice", f"{said}. Voices: {known}.")
            return self.speakers[name]
        one = len(request.speaker_wav) == 1
        params = ["speaker_wav"] if one else [f"speaker_wav.{i}" for i in range(len(request.speaker_wav))]
        data = [
            await load_bytes(source, param=param, max_bytes=MAX_REFERENCE_BYTES)
            for source, param in zip(request.speaker_wav, params, strict=True)
        ]
        key = await asyncio.to_thread(_hash, data)

        async def make() -> Voice:
            run, loop = self.coders, asyncio.get_running_loop()
            found = [
                await loop.run_in_executor(run, read_reference, part, param)
                for part, param in zip(data, params, strict=True)
            ]
            cloned: Voice = await self.speaker.call(lambda: clone(self.speaker.model, found))
            return cloned

        return await self.voices.get(key, make)


def _hash(recordings: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in recordings)).hexdigest()


class _Ignored:
    """Stands for the settings that XTTS's authors pickled into their weights; config.json has them too."""

    def __setstate__(self, state: object) -> None:
        pass


_PICKLED = (
    "TTS.tts.configs.xtts_config.XttsConfig",
    "TTS.tts.models.xtts.XttsArgs",
    "TTS.tts.models.xtts.XttsAudioConfig",
    "TTS.config.shared_configs.BaseDatasetConfig",
)


def read_weights(path: Path) -> dict[str, Any]:
    """The tensors of a checkpoint; no code of its pickle is run, and nothing is written beside it."""
    import torch

    with torch.serialization.safe_globals([(_Ignored, name) for name in _PICKLED]):
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    weights: dict[str, Any] = found["model"]
    return weights


def load(settings: Settings) -> Engine:
    if not settings.coqui_tos_agreed:
        raise StartError(
            "XTTS's weights are under the Coqui Public Model License, for non-commercial use only "
            "(https://coqui.ai/cpml.txt). Set COQUI_TOS_AGREED=1 if you agree, or have bought a licence.",
            code="licence_not_agreed",
        )
    found = prewarm.resolve(settings, settings.model_name, extra=("*.pth",))
    folder = Path(found.path)
    for name in ("config.json", "model.pth", "vocab.json"):
        if not (folder / name).is_file():
            raise StartError(f"{settings.model_name} has no {name}. Use an XTTS v2 model.", code="incomplete")
    with prewarm.phase("import"):
        import torch
        from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
        from TTS.config import load_config
        from TTS.tts.models.xtts import Xtts

    class Model(Xtts):  # type: ignore[misc]
        def _load_checkpoint(self, model_path: Path) -> dict[str, Any]:
            return read_weights(model_path)

    with prewarm.phase("load") as phase:
        device, _ = pick_device(settings)
        dtype = getattr(torch, "float32" if settings.dtype == "auto" else settings.dtype)
        kind = json.loads((folder / "config.json").read_text()).get("model")
        if kind != "xtts":
            raise StartError(
                f"{settings.model_name} is a {kind} model, and this worker speaks with XTTS v2.",
                code="unsupported_architecture",
            )
        config = load_config(str(folder / "config.json"))
        model = Model(config)
        model.load_checkpoint(config, checkpoint_dir=str(folder), eval=True)
        # The decoder's weights as they are, not as a direction and a length to be multiplied in every call.
        for module in model.hifigan_decoder.modules():
            if is_parametrized(module):
                remove_parametrizations(module, "weight")
        model = model.to(device)
        _cast(model.gpt, dtype)
        phase.bytes = sum(weight.nbytes for weight in model.parameters())
    kept = model.speaker_manager.speakers if model.speaker_manager else {}
    speakers = {
        name: Voice(it["gpt_cond_latent"].to(device), it["speaker_embedding"].to(device))
        for name, it in kept.items()
    }
    default = settings.default_speaker or next(
        (it for it in ("Ana Florence", *speakers) if it in speakers), None
    )
    if default is not None and default not in speakers:
        raise StartError(
            f"DEFAULT_SPEAKER={default!r}: no such voice. Use one of {', '.join(speakers)}.",
            code="bad_setting",
        )
    speaker = Speaker(model, max_rows=settings.max_batch_size)
    sampling = SamplingParams(
        speaker.max_tokens, config.temperature, config.top_p, top_k=config.top_k,
        repetition_penalty=float(config.repetition_penalty),
    )  # fmt: skip
    # The one language whose library is not there on every Python.
    languages = [it for it in config.languages if it != "ja" or importlib.util.find_spec("cutlet")]
    return Engine(
        speaker, model.tokenizer, languages, speakers, default, Voices(settings.voice_cache_size),
        sampling, model.args.output_sample_rate, settings.public_name,
        (settings.public_name, settings.model_name), found.revision,
    )  # fmt: skip


def _cast(gpt: Any, dtype: torch.dtype) -> None:
    """Put what makes tokens into `dtype`; what listens to recordings stays in float32."""
    import torch

    if dtype == torch.float32:
        return
    parts = (gpt.gpt, gpt.text_embedding, gpt.text_pos_embedding, gpt.mel_embedding, gpt.mel_pos_embedding)
    for part in (*parts, gpt.final_norm, gpt.mel_head):
        part.to(dtype)
    # The library's own gives zeros in float32, which would take everything after them along.
    gpt.gpt.wpe = lambda places: torch.zeros(
        (*places.shape, gpt.model_dim), device=places.device, dtype=dtype
    )


engine: Engine


# ---- handle --------------------------------------------------------------------------------------------


@job_handler(XttsRequest, VoicesRequest, routes=ROUTES)
async def handler(request: Asked) -> Answer:
    if isinstance(request, XttsRequest) and request.stream:
        raise _wrong(
            "stream", "unsupported", "this endpoint does not stream. Leave stream out, or set STREAMING=true."
        )
    return await answer(request, engine)


@job_handler(XttsRequest, VoicesRequest, routes=ROUTES)
async def stream_handler(request: Asked) -> AsyncIterator[Answer | XttsChunk]:
    """The handler where STREAMING is true."""
    if not isinstance(request, XttsRequest) or not request.stream:
        yield await answer(request, engine)
        return
    async for part in stream(request, engine):
        yield part


class Speech:
    """One job's speech, as it comes."""

    def __init__(self, request: XttsRequest, engine: Engine) -> None:
        self.request, self.engine = request, engine
        self.begun = time.perf_counter()
        self.rate = request.sample_rate or engine.rate
        self.finish_reason: Literal["stop", "length"] = "stop"

    async def samples(self) -> AsyncGenerator[tuple[NDArray[np.float32], bool]]:
        """Samples at the engine's rate, pauses included, and whether they are the last."""
        import numpy as np

        request, engine = self.request, self.engine
        read, voice = await engine.read(request.text, request.language), await engine.voice(request)
        given = {
            name: getattr(request, name)
            for name in ("temperature", "top_p", "top_k", "repetition_penalty")
            if getattr(request, name) is not None
        }
        sampling = replace(engine.sampling, **given)
        # Each piece draws numbers of its own, so that none depends on how long another was.
        seeds = random.Random(request.seed)  # noqa: S311
        rows = [
            engine.speaker.begin(
                ids,
                voice,
                sampling,
                speed=request.speed,
                seed=seeds.getrandbits(64),
                each=request.stream,
                job=self,
            )
            for ids, _ in read
        ]

        def stop(_: object = None) -> None:
            for row in rows:
                row.stop()

        # A generator that waits at a `yield` does not hear of the end of its task.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(stop)
        pause = np.zeros(0, np.float32)
        try:
            for row, (_, end) in zip(rows, read, strict=True):
                reason = None
                while reason is None:
                    samples, reason = await row.hear()
                    if reason == "length":
                        self.finish_reason = "length"
                    yield np.concatenate([pause, samples]), reason is not None and row is rows[-1]
                    pause = pause[:0]
                pause = np.zeros(int(PAUSES[end] / request.speed * engine.rate), np.float32)
        finally:
            stop()
            task.remove_done_callback(stop)

    def check_size(self, samples: int) -> None:
        """Stop as soon as the answer is larger than what can be returned, where that is plain to see."""
        if self.request.response_format in ("wav", "pcm"):
            seconds = samples / self.engine.rate
            check_size(int(seconds * self.rate * 2 * 4 / 3), current_job.get(), SMALLER)

    def encode(self, parts: Sequence[NDArray[np.float32]]) -> tuple[str, float]:
        """All of it as base64, and its seconds."""
        import numpy as np

        samples = resampler(self.engine.rate, self.rate)(np.concatenate(parts), True)
        # Resampling may overshoot.
        samples = samples / max(1.0, float(np.abs(samples).max()))
        return encode_audio(samples, self.rate, self.request.response_format), len(samples) / self.rate

    def response(self, audio: str, duration: float) -> XttsResponse:
        request, engine = self.request, self.engine
        speaker = None if request.speaker_wav else request.speaker or engine.default
        return XttsResponse(
            audio=audio, format=request.response_format, sample_rate=self.rate, duration=round(duration, 3),
            seconds=round(time.perf_counter() - self.begun, 3), finish_reason=self.finish_reason,
            language=request.language, speaker=speaker, model=engine.name, revision=engine.revision,
        )  # fmt: skip


def resampler(given: int, wanted: int) -> Callable[[NDArray[np.float32], bool], NDArray[np.float32]]:
    """From one rate to another, piece by piece; True with the last."""
    if given == wanted:
        return lambda samples, last: samples
    import soxr

    resample: Callable[[NDArray[np.float32], bool], NDArray[np.float32]]
    resample = soxr.ResampleStream(given, wanted, 1, dtype="float32").resample_chunk
    return resample


async def answer(request: Asked, engine: Engine) -> Answer:
    if isinstance(request, ModelsRequest):
        return openai_api.model_list(engine.name)
    if isinstance(request, VoicesRequest):
        return VoicesResponse(
            voices=list(engine.speakers), default=engine.default, languages=list(engine.languages),
            formats=list(get_args(Format)),
        )  # fmt: skip
    if isinstance(request, SpeechRequest):
        request = read_speech(request, engine)
    speech, parts, count = Speech(request, engine), [], 0
    async with aclosing(speech.samples()) as spoken:
        async for samples, _ in spoken:
            parts.append(samples)
            count += len(samples)
            speech.check_size(count)
    run = asyncio.get_running_loop().run_in_executor
    audio, duration = await run(engine.coders, speech.encode, parts)
    small = request.response_format in ("mp3", "opus")
    check_size(len(audio), current_job.get(), "" if small else SMALLER)
    return speech.response(audio, duration)


async def stream(request: XttsRequest, engine: Engine) -> AsyncIterator[XttsChunk | XttsResponse]:
    speech = Speech(request, engine)
    run = functools.partial(asyncio.get_running_loop().run_in_executor, engine.coders)
    resample = await run(resampler, engine.rate, speech.rate)
    room, index, told = int(MAX_CHUNK_S * speech.rate), 0, 0
    async with aclosing(speech.samples()) as spoken:
        async for samples, last in spoken:
            ready = await run(resample, samples, last)
            for start in range(0, len(ready), room):
                part = ready[start : start + room]
                audio = await run(encode_audio, part, speech.rate, request.response_format)
                yield XttsChunk(
                    audio=audio, format=request.response_format, sample_rate=speech.rate, index=index
                )
                index += 1
            told += len(ready)
    yield speech.response("", told / speech.rate)


# ---- start ---------------------------------------------------------------------------------------------


def prepare() -> dict[str, Any]:
    global engine
    settings = read_settings(Settings)
    engine = load(settings)
    serving = stream_handler if settings.streaming else handler
    if settings.prewarm:
        import numpy as np

        noise = np.random.default_rng(0).normal(0, 0.1, 6 * REFERENCE_RATE).astype(np.float32)
        asked: list[dict[str, Any]] = [{"text": "Warm.", "speaker_wav": encode_audio(noise, REFERENCE_RATE)}]
        if engine.default is not None:
            asked.append({"text": "This is warm.", "stream": settings.streaming})
        prewarm.run(serving, asked)
    return start_config(serving, settings)


def main() -> None:
    config = startup.run(prepare, worker="xtts")
    import runpod

    runpod.serverless.start(config)


if __name__ == "__main__":
    main()
