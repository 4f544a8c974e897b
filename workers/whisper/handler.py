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

Audio longer than the model's window of 30 seconds is cut where nobody speaks. The pieces of all jobs that
wait are heard in the same batches, on one of two engines: transformers, or CTranslate2 by faster-whisper.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from shared import openai_api, prewarm, startup
from shared.batching import DynamicBatcher
from shared.errors import JobError, StartError
from shared.hardware import pick_device
from shared.jobs import Request, current_job, job_handler, start_config
from shared.logs import log
from shared.media import encode_audio, load_audio, load_bytes
from shared.openai_api import ModelList, ModelsRequest, OpenAIRequest
from shared.settings import WorkerSettings, read_settings
from shared.volume import ModelPath, lease

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Samples = NDArray[np.float32]

RATE = 16_000  # Hz that the model hears
WINDOW_S = 30.0  # that it hears at once
FRAMES_PER_S = 50  # of the encoder's output; times are in these steps
# OpenAI's own thresholds and temperatures (openai/whisper, transcribe.py).
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MAX_COMPRESSION, MIN_LOGPROB, SILENCE = 2.4, -1.0, 0.6
MEDIAN_FRAMES = 7
# Windows in one batch. On a GPU more of them cost little more; two CPU cores are busy with a few.
GPU_BATCH, CPU_BATCH = 32, 8
PROGRESS_S, PROGRESS_GRACE_S = 5.0, 2.0
MAX_TRIES = 30  # at one piece, whose answers may each leave out their end
INAUDIBLE = 1e-4  # of full scale: less than the last bit of 16

# ---- settings ------------------------------------------------------------------------------------------


class Settings(WorkerSettings):
    model_name: str = Field(
        "openai/whisper-large-v3",
        description="Model id on the Hugging Face Hub, or a folder; with ENGINE=faster-whisper also one that "
        "is converted already, such as Systran/faster-whisper-large-v3",
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
        WINDOW_S, ge=1, le=WINDOW_S, description="Longest piece that long audio is cut into"
    )
    model_timestamps: bool = Field(
        True, description="false for models tuned without timestamps: each piece is then one segment"
    )
    max_audio_seconds: float = Field(14_400, ge=1, le=86_400, description="Longest audio of a job")
    max_audio_mb: float = Field(200, gt=0, le=2000, description="Largest audio file of a job, in MB")


# ---- requests and responses ----------------------------------------------------------------------------

ResponseFormat = Literal["json", "text", "srt", "vtt", "verbose_json"]
Task = Literal["transcribe", "translate"]


class WhisperRequest(Request):
    audio: str = Field(description="The sound: base64, a `data:` URI or an http(s) URL")
    timestamps: Annotated[bool | Literal["word"], BeforeValidator(lambda value: value or False)] = Field(
        False, description="Give `chunks`: true, one for each segment; `word`, one for each word"
    )
    language: str | None = Field(
        None, description="Spoken language, as `fr` or `french`; unset: what the first speech sounds like"
    )
    task: Task = Field("transcribe", description="Keep the language, or `translate` to English")
    word_timestamps: bool = Field(False, description="Give `words`, each with its times")
    response_format: ResponseFormat = Field(
        "json", description="`json`: the fields below; `verbose_json`: OpenAI's; else a text"
    )
    prompt: str | None = Field(
        None, max_length=4000, description="Names and words that may come, or what was said before"
    )
    temperature: float = Field(0.0, ge=0, le=1, description="Of sampling; 0: always the likeliest token")
    fallback: bool = Field(
        True, description="At temperature 0, hear what came out unlikely or repetitive again at higher ones"
    )
    beam_size: int = Field(1, ge=1, le=16, description="Width of the beam search; 1 is fastest")
    vad: bool = Field(True, description="Leave out what is no speech; false: hear everything, such as songs")
    clip_start: float = Field(0.0, ge=0, le=86_400, description="Begin at this second of the audio")
    clip_end: float | None = Field(
        None, gt=0, le=86_400, description="End at this second; unset: at the audio's end"
    )

    @field_validator("language", mode="before")
    @classmethod
    def _detect(cls, value: Any) -> Any:
        return None if value in ("", "auto") else value

    @model_validator(mode="after")
    def _clips(self) -> WhisperRequest:
        if self.clip_end is not None and self.clip_end <= self.clip_start:
            message = f"{self.clip_end:g} is not after clip_start, {self.clip_start:g}."
            raise _wrong("clip_end", "invalid_value", message)
        return self


def _wrong(param: str, code: str, message: str) -> JobError:
    return JobError(f"{param}: {message}", param=param, code=code)


class Chunk(BaseModel):
    timestamp: tuple[float, float] = Field(description="Start and end, in seconds of the audio")
    text: str = Field(description="Segment or word")


class Segment(BaseModel):
    id: int = Field(description="Its number, from 0")
    seek: int = Field(description="Where the window began that it was heard in, in hundredths of a second")
    start: float = Field(description="Seconds of the audio")
    end: float = Field(description="Seconds of the audio")
    text: str = Field(description="What was said, usually with a space before it")
    tokens: list[int] = Field(description="The model's tokens, those for times included")
    temperature: float = Field(description="At which it was made")
    avg_logprob: float = Field(description="Mean of the logarithm of its tokens' probabilities")
    compression_ratio: float = Field(description="Of the window's text by zlib: high where it repeats itself")
    no_speech_prob: float = Field(description="Probability that the window holds no speech")


class Word(BaseModel):
    word: str = Field(description="The word, punctuation included")
    start: float = Field(description="Seconds of the audio")
    end: float = Field(description="Seconds of the audio")


class WhisperResponse(BaseModel):
    text: str = Field(description="All that was said")
    chunks: list[Chunk] = Field(description="With `timestamps`: segments or words with their times")
    language: str | None = Field(description="Code of the spoken language; null where there is no speech")
    language_probability: float | None = Field(description="Of the detected one; null if it was given")
    task: Task = Field(description="What was done")
    duration: float = Field(description="Seconds of the audio")
    segments: list[Segment] = Field(description="What was said, piece by piece")
    words: list[Word] | None = Field(description="With `word_timestamps`, or `timestamps` of `word`")
    model: str = Field(description="The model, as MODEL_NAME gives it")
    revision: str | None = Field(description="Its commit, where known")


# ---- OpenAI's ------------------------------------------------------------------------------------------

Granularities = list[Literal["segment", "word"]]


def _granularities(value: Any) -> Any:
    """One may come as a text; none, as clients also write it, is the default."""
    return [value] if value and isinstance(value, str) else value or ["segment"]


class TranslationRequest(OpenAIRequest):
    file: str = Field(description="The sound: base64, a `data:` URI or an http(s) URL")
    model: str | None = Field(None, description="The served model's name")
    prompt: str | None = Field(None, max_length=4000, description="Words that may come")
    response_format: ResponseFormat = Field("json", description="As OpenAI's")
    temperature: float = Field(0.0, ge=0, le=1, description="0: raised where the outcome is unlikely")
    vad: bool = Field(True, description="Not OpenAI's: false hears also what is no speech")
    stream: Annotated[bool | None, BeforeValidator(lambda value: value or None)] = Field(
        None, description="Not served"
    )

    @model_validator(mode="after")
    def _whole(self) -> TranslationRequest:
        if self.stream:
            raise _wrong("stream", "unsupported", "answers come whole here. Leave it out.")
        return self


class TranscriptionRequest(TranslationRequest):
    language: str | None = Field(None, description="Spoken language; unset: detected")
    timestamp_granularities: Annotated[Granularities, BeforeValidator(_granularities)] = Field(
        default=["segment"], max_length=2, description="Only with verbose_json"
    )

    @model_validator(mode="before")
    @classmethod
    def _form_name(cls, value: Any) -> Any:
        """Forms call the field `timestamp_granularities[]`."""
        name = "timestamp_granularities"
        if isinstance(value, dict) and f"{name}[]" in value:
            value = {**value, name: value.get(name) or value[f"{name}[]"]}
        return value

    @model_validator(mode="after")
    def _only_where_shown(self) -> TranscriptionRequest:
        if "word" in self.timestamp_granularities and self.response_format != "verbose_json":
            message = "words come only with response_format verbose_json."
            raise _wrong("timestamp_granularities", "invalid_value", message)
        return self


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


# ---- what an engine hears and says ---------------------------------------------------------------------


@dataclass(eq=False)
class Window:
    """At most 30 seconds, to be heard at once.

    features: log-mel, (mel bins, 3000). seconds: that hold sound. language: None, to be detected.
    """

    features: NDArray[np.float32]
    seconds: float
    language: str | None
    task: Task
    prompt: list[int]
    temperature: float
    beam_size: int
    align: bool
    over: bool = field(default=False)  # nobody waits for it


@dataclass(frozen=True)
class Heard:
    """tokens: text and times, without the end.

    begins: seconds of the window at which each text token begins, and the last one ends; it takes some
    milliseconds.
    """

    tokens: list[int]
    language: str | None
    language_probability: float | None
    avg_logprob: float
    no_speech_prob: float
    begins: Callable[[], list[float]] | None = None

    @property
    def nothing(self) -> bool:
        """Whether nobody speaks, by OpenAI's own measure."""
        return self.no_speech_prob > SILENCE and self.avg_logprob < MIN_LOGPROB


class Engine(Protocol):
    """One way to run the model. `decode` is for one thread at a time; its windows have one `key`."""

    def key(self, window: Window) -> Any: ...
    def decode(self, windows: Sequence[Window]) -> list[Heard]: ...


class Vocabulary:
    """The tokenizer, and the numbers of Whisper's own tokens.

    languages: code by token; empty for an English-only model.
    """

    def __init__(self, tokenizer: Any, *, multilingual: bool, positions: int, timestamps: bool) -> None:
        from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

        self.tokenizer, self.positions, self.timestamps = tokenizer, positions, timestamps
        self.names, self._codes = LANGUAGES, TO_LANGUAGE_CODE
        known = tokenizer.get_vocab()
        self.end: int = known["<|endoftext|>"]
        self.start: int = known["<|startoftranscript|>"]
        self.no_times: int = known["<|notimestamps|>"]
        self.first_time = self.no_times + 1
        self._previous: int = known["<|startofprev|>"]
        # Older models write it <|nocaptions|>.
        self.no_speech: int = known.get("<|nospeech|>", known.get("<|nocaptions|>", self.no_times - 1))
        self.languages: dict[int, str] = {}
        if multilingual:
            self.tasks = {task: known[f"<|{task}|>"] for task in ("transcribe", "translate")}
            codes = (code for code in LANGUAGES if f"<|{code}|>" in known)
            self.languages = {known[f"<|{code}|>"]: code for code in codes}
        self._tokens = {code: token for token, code in self.languages.items()}

    def language(self, asked: str | None, task: Task) -> str | None:
        """The code of a language that a request names. Raises JobError for one that the model lacks."""
        if not self.languages:
            if task == "translate":
                raise _wrong("task", "invalid_value", "this model only transcribes English. Use transcribe.")
            if asked and asked.strip("<|> ").lower() not in ("en", "english"):
                raise _wrong("language", "invalid_value", f"{asked!r}, and this model knows only English.")
            return "en"
        if asked is None:
            return None
        name = asked.strip("<|> ").lower()
        code = str(self._codes.get(name, name))
        if code not in self._tokens:
            known = ", ".join(sorted(self._tokens))
            raise _wrong("language", "invalid_value", f"{asked[:40]!r} is not known. Use one of {known}.")
        return code

    def prompt(self, text: str | None) -> list[int]:
        """The tokens of a request's `prompt`; of a long one the end, which is what the model has room for."""
        if not text or not text.strip():
            return []
        ids: list[int] = self.tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"]
        ids = [token for token in ids if token < self.end]
        return [self._previous, *ids[-(self.positions // 2 - 1) :]]

    def head(self, language: str | None, task: Task) -> list[int]:
        """What stands before the answer, a prompt left out."""
        head = [self.start]
        if self.languages:
            head += [self._tokens[language or "en"], self.tasks[task]]
        return head if self.timestamps else [*head, self.no_times]

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            [token for token in tokens if token < self.end],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return text

    def words(self, tokens: Sequence[int], language: str | None) -> list[tuple[str, int]]:
        """Words, and how many tokens each takes."""
        from transformers.models.whisper.tokenization_whisper import _combine_tokens_into_words

        name = self.names.get(language or "en", "english")
        words, ids, _ = _combine_tokens_into_words(self.tokenizer, list(tokens), name)
        return [(word, len(part)) for word, part in zip(words, ids, strict=True)]


def begin_of_tokens(tokens: Sequence[int], frames: Sequence[int]) -> list[float]:
    """Seconds at which each token begins, from a path through tokens and frames that never goes back."""
    import numpy as np

    steps = np.pad(np.diff(np.asarray(tokens)), (1, 0), constant_values=1).astype(bool)
    begins: list[float] = (np.asarray(frames)[steps] / FRAMES_PER_S).tolist()
    return begins


def time_warp(cost: NDArray[np.float32]) -> tuple[list[int], list[int]]:
    """Dynamic time warping: the cheapest path through `cost`, (tokens, frames), from corner to corner.

    Diagonal by diagonal, which numpy does in one step each: cell by cell, Python takes a second a window.
    """
    import numpy as np

    rows, columns = cost.shape
    total = np.full((rows + 1, columns + 1), np.inf, np.float32)
    total[0, 0] = 0
    came = np.zeros((rows + 1, columns + 1), np.int8)  # 0: from both, 1: from the row before, 2: the column
    for diagonal in range(2, rows + columns + 1):
        i = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        j = diagonal - i
        before = np.stack([total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]])
        came[i, j] = before.argmin(axis=0)
        total[i, j] = cost[i - 1, j - 1] + before.min(axis=0)
    path, i, j = [], rows, columns
    while i and j:
        path.append((i - 1, j - 1))
        step = came[i, j]
        i, j = i - (step != 2), j - (step != 1)
    tokens, frames = zip(*reversed(path), strict=True)
    return list(tokens), list(frames)


# ---- the engine of transformers ------------------------------------------------------------------------


class Rules:
    """A logits processor: which tokens Whisper may say next (openai/whisper, decoding.py).

    Times come in pairs but at the start and the end, never go back, and one is forced when times together
    are likelier than any text.
    """

    def __init__(self, words: Vocabulary, config: Any, begin: int, device: torch.device) -> None:
        import torch

        self.words, self.begin = words, begin
        self.never = torch.tensor([*(config.suppress_tokens or []), words.no_times], device=device)
        self.not_first = torch.tensor(config.begin_suppress_tokens or [], dtype=torch.long, device=device)
        self.latest = getattr(config, "max_initial_timestamp_index", None)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Log probabilities of what is allowed."""
        return self._allow(ids[:, self.begin :], scores.float()).log_softmax(-1)

    def _allow(self, made: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        first, nothing = self.words.first_time, float("-inf")
        scores = scores.index_fill(1, self.never, nothing)
        if not made.shape[1]:
            scores = scores.index_fill(1, self.not_first, nothing)
        text, times = scores[:, :first], scores[:, first:]
        if not self.words.timestamps:
            times.fill_(nothing)
            return scores
        if not made.shape[1]:
            text.fill_(nothing)
            if self.latest is not None:
                times[:, self.latest + 1 :] = nothing
            return scores
        last = made[:, -1] >= first
        before = made[:, -2] >= first if made.shape[1] > 1 else torch.ones_like(last)
        times.masked_fill_((last & before)[:, None], nothing)
        scores[:, : self.words.end].masked_fill_((last & ~before)[:, None], nothing)
        floor = (made - first).clamp(min=-1).amax(1) + 1 - (last & ~before).long()
        times.masked_fill_(torch.arange(times.shape[1], device=made.device) < floor[:, None], nothing)
        text.masked_fill_((times.logsumexp(1) > text.amax(1))[:, None], nothing)
        return scores


class TransformersEngine:
    """transformers' model. Windows of any languages, tasks, prompts and temperatures share a batch."""

    def __init__(self, model: Any, words: Vocabulary) -> None:
        self.model, self.words = model, words
        config = model.generation_config
        heads = getattr(config, "alignment_heads", None)
        layers = range(model.config.decoder_layers // 2, model.config.decoder_layers)
        # As openai/whisper does where nobody has said which heads follow the sound: the later half.
        self.heads: list[tuple[int, int]] = [(layer, head) for layer, head in heads or []] or [
            (layer, head) for layer in layers for head in range(model.config.decoder_attention_heads)
        ]

    def key(self, window: Window) -> Any:
        return window.beam_size if not window.temperature else 1

    def decode(self, windows: Sequence[Window]) -> list[Heard]:
        import numpy as np
        import torch

        model = self.model
        with torch.inference_mode():
            features = torch.from_numpy(np.stack([window.features for window in windows]))
            states = model.model.encoder(features.to(model.device, model.dtype)).last_hidden_state
            languages = self._languages(states, windows)
            heads = [
                self.words.head(code, window.task)
                for window, (code, _) in zip(windows, languages, strict=True)
            ]
            say = self._search if self.key(windows[0]) > 1 else self._sample
            said = say(states, windows, heads)
            aligned = self._align(states, windows, heads, [tokens for tokens, _, _ in said])
        return [
            Heard(tokens, code, probability, logprob, silence, begins)
            for (tokens, logprob, silence), (code, probability), begins in zip(
                said, languages, aligned, strict=True
            )
        ]

    def _languages(
        self, states: torch.Tensor, windows: Sequence[Window]
    ) -> list[tuple[str | None, float | None]]:
        """Of each window the language it was given, or that it sounds most like, with its probability."""
        import torch

        found: list[tuple[str | None, float | None]] = [(window.language, None) for window in windows]
        rows = [row for row, window in enumerate(windows) if window.language is None]
        if rows and self.words.languages:
            start = torch.full((len(rows), 1), self.words.start, device=states.device)
            out = self.model.model.decoder(input_ids=start, encoder_hidden_states=states[rows])
            tokens = list(self.words.languages)
            chances = self.model.proj_out(out.last_hidden_state[:, -1])[:, tokens].float().softmax(-1)
            for row, chance in zip(rows, chances, strict=True):
                best = int(chance.argmax())
                found[row] = (self.words.languages[tokens[best]], float(chance[best]))
        return found

    def _prompts(
        self, windows: Sequence[Window], heads: list[list[int]], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prompts and heads, padded on the left, and the mask; None where nothing is padded."""
        import torch

        rows = [[*window.prompt, *head] for window, head in zip(windows, heads, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([[self.words.end] * (width - len(row)) + row for row in rows], device=device)
        if all(len(row) == width for row in rows):
            return ids, None
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        return ids, mask

    def _limit(self, width: int) -> int:
        """The most tokens after a prompt of `width`."""
        return min(self.words.positions // 2, self.words.positions - width)

    def _cache(self) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def _sample(
        self, states: torch.Tensor, windows: Sequence[Window], heads: list[list[int]]
    ) -> list[tuple[list[int], float, float]]:
        """Tokens, their mean log probability and the probability of silence, token by token.

        Windows that are through leave the batch.
        """
        import torch

        ids, mask = self._prompts(windows, heads, states.device)
        begin = ids.shape[1]
        rules = Rules(self.words, self.model.generation_config, begin, states.device)
        heat = torch.tensor([window.temperature for window in windows], device=states.device)
        cache, rows = self._cache(), list(range(len(windows)))
        done: set[int] = set()
        sums, silence = [0.0] * len(windows), [0.0] * len(windows)
        said: list[list[int]] = [[] for _ in windows]
        latest = ids
        for step in range(self._limit(begin)):
            places = None
            if mask is not None:
                places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -latest.shape[1] :]
            out = self.model.model.decoder(
                input_ids=latest, attention_mask=mask, position_ids=places,
                encoder_hidden_states=states, past_key_values=cache, use_cache=True,
            ).last_hidden_state  # fmt: skip
            if not step:
                starts = out[:, -len(heads[0])]  # what follows <|startoftranscript|>
                chances = self.model.proj_out(starts).float().softmax(-1)[:, self.words.no_speech]
                silence = chances.tolist()
            logprobs = rules(ids, self.model.proj_out(out[:, -1]))
            chosen = logprobs.argmax(-1)
            if heat.any():
                drawn = torch.multinomial((logprobs / heat.clamp(min=0.01)[:, None]).softmax(-1), 1)[:, 0]
                chosen = torch.where(heat > 0, drawn, chosen)
            gained = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
            for row, token, gain in zip(rows, chosen.tolist(), gained, strict=True):
                if row not in done:
                    sums[row] += gain
                    said[row].append(token)
                    if token == self.words.end or windows[row].over:
                        done.add(row)
            if len(done) == len(windows):
                break
            latest = chosen[:, None]
            ids = torch.cat([ids, latest], 1)
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(latest)], 1)
            left = [place for place, row in enumerate(rows) if row not in done]
            if len(left) <= 0.75 * len(rows):  # to copy the others' cache costs a step or two
                keep = torch.tensor(left, device=states.device)
                cache.batch_select_indices(keep)
                ids, latest, heat, states = ids[keep], latest[keep], heat[keep], states[keep]
                mask = None if mask is None else mask[keep]
                rows = [rows[place] for place in left]
        return [
            ([token for token in tokens if token != self.words.end], total / max(1, len(tokens)), quiet)
            for tokens, total, quiet in zip(said, sums, silence, strict=True)
        ]

    def _search(
        self, states: torch.Tensor, windows: Sequence[Window], heads: list[list[int]]
    ) -> list[tuple[list[int], float, float]]:
        """The same by beam search, the library's."""
        import torch
        from transformers import GenerationConfig, GenerationMixin, StoppingCriteriaList
        from transformers.modeling_outputs import BaseModelOutput

        words, beams = self.words, windows[0].beam_size
        ids, mask = self._prompts(windows, heads, states.device)
        ones = torch.ones_like(ids) if mask is None else mask
        out = self.model.model.decoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=states,
                                       position_ids=(ones.cumsum(-1) - 1).clamp(min=0))  # fmt: skip
        starts = self.model.proj_out(out.last_hidden_state[:, -len(heads[0])])
        silence = starts.float().softmax(-1)[:, words.no_speech].tolist()
        cache = self._cache()
        cache.cross_attention_cache.reorder_cache = lambda _: None  # beams of a window hear the same

        def over(made: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            gone = [window.over for window in windows]
            return torch.tensor(gone, device=made.device).repeat_interleave(len(made) // len(gone))

        found = GenerationMixin.generate(
            self.model,
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            decoder_input_ids=ids,
            decoder_attention_mask=ones,
            attention_mask=torch.ones(states.shape[:2], device=states.device),  # unused, but warned of
            past_key_values=cache,
            generation_config=GenerationConfig(
                num_beams=beams, do_sample=False, max_length=ids.shape[1] + self._limit(ids.shape[1]),
                eos_token_id=words.end, pad_token_id=words.end, decoder_start_token_id=words.start,
                return_dict_in_generate=True, output_scores=True,
            ),
            logits_processor=[Rules(words, self.model.generation_config, ids.shape[1], states.device)],
            stopping_criteria=StoppingCriteriaList([over]),
        )  # fmt: skip
        rows = found.sequences[:, ids.shape[1] :].tolist()
        tokens = [row[: row.index(words.end)] if words.end in row else row for row in rows]
        return list(zip(tokens, found.sequences_scores.tolist(), silence, strict=True))

    def _align(
        self,
        states: torch.Tensor,
        windows: Sequence[Window],
        heads: list[list[int]],
        said: list[list[int]],
    ) -> list[Callable[[], list[float]] | None]:
        """For windows that ask for it: when each text token begins, by where the alignment heads looked."""
        import torch

        found: list[Callable[[], list[float]] | None] = [None] * len(windows)
        words = self.words
        texts = [[token for token in tokens if token < words.end] for tokens in said]
        chosen = [row for row, window in enumerate(windows) if window.align and texts[row]]
        if not chosen:
            return found
        before = [[token for token in heads[row] if token != words.no_times] for row in chosen]
        # The attention that gives a token is that of the place before it.
        rows = [
            [*head, words.no_times, *texts[row], words.end] for head, row in zip(before, chosen, strict=True)
        ]
        width = max(map(len, rows))
        ids = torch.tensor([row + [words.end] * (width - len(row)) for row in rows], device=states.device)
        seen: dict[int, torch.Tensor] = {}
        layers = self.model.model.decoder.layers
        hooks = [
            layers[layer].encoder_attn.register_forward_pre_hook(
                lambda _, args, named, layer=layer: seen.update(
                    {layer: args[0] if args else named["hidden_states"]}
                ),
                with_kwargs=True,
            )
            for layer in {layer for layer, _ in self.heads}
        ]
        try:
            self.model.model.decoder(input_ids=ids, encoder_hidden_states=states[chosen])
        finally:
            for hook in hooks:
                hook.remove()
        for place, row in enumerate(chosen):
            frames = max(1, round(windows[row].seconds * FRAMES_PER_S))
            first = len(before[place])
            total = torch.zeros(len(rows[place]), frames, device=states.device)
            for layer, head in self.heads:  # one by one: all of a large model's take gigabytes
                attention = layers[layer].encoder_attn
                part = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
                asked = attention.q_proj(seen[layer][place])[:, part] * attention.scaling
                offered = attention.k_proj(states[row, :frames])[:, part]
                weights = (asked @ offered.T).float().softmax(-1)[: len(rows[place])]
                spread, mean = torch.std_mean(weights, dim=0, keepdim=True, unbiased=False)
                total += median((weights - mean) / spread.clamp(min=1e-9))
            cost = -(total / len(self.heads))[first : len(rows[place]) - 1].cpu().numpy()
            found[row] = partial(_warped, cost)
        return found


def _warped(cost: NDArray[np.float32]) -> list[float]:
    return begin_of_tokens(*time_warp(cost))


def median(values: torch.Tensor) -> torch.Tensor:
    """The running median over MEDIAN_FRAMES of the last dimension."""
    import torch

    side = MEDIAN_FRAMES // 2
    if values.shape[-1] <= side:
        return values
    padded = torch.nn.functional.pad(values, (side, side), mode="reflect")
    return padded.unfold(-1, MEDIAN_FRAMES, 1).sort().values[..., side]


# ---- the engine of faster-whisper ----------------------------------------------------------------------


class CTranslateEngine:
    """CTranslate2's model. One temperature and one beam size in a batch."""

    def __init__(self, model: Any, words: Vocabulary, suppress: list[int]) -> None:
        self.model, self.words, self.suppress = model, words, suppress

    def key(self, window: Window) -> Any:
        beams = 1 if window.temperature else window.beam_size
        return beams, window.temperature, len(window.prompt)  # CTranslate2 pads no prompts

    def decode(self, windows: Sequence[Window]) -> list[Heard]:
        import ctranslate2
        import numpy as np

        features = np.ascontiguousarray(np.stack([window.features for window in windows]))
        states = self.model.encode(ctranslate2.StorageView.from_array(features))
        languages: list[tuple[str | None, float | None]] = [(window.language, None) for window in windows]
        if self.words.languages and any(window.language is None for window in windows):
            for row, chances in enumerate(self.model.detect_language(states)):
                if windows[row].language is None:
                    token, probability = chances[0]
                    languages[row] = (token.strip("<|>"), float(probability))
        heads = [
            self.words.head(code, window.task) for window, (code, _) in zip(windows, languages, strict=True)
        ]
        beams, temperature, _ = self.key(windows[0])
        results = self.model.generate(
            states,
            [[*window.prompt, *head] for window, head in zip(windows, heads, strict=True)],
            beam_size=beams,
            sampling_topk=0 if temperature else 1,
            sampling_temperature=temperature or 1.0,
            max_length=self.words.positions,  # it makes at most half of it, and what a prompt leaves
            return_scores=True,
            return_no_speech_prob=True,
            suppress_tokens=self.suppress,
        )
        said = [[token for token in result.sequences_ids[0] if token != self.words.end] for result in results]
        aligned = self._align(features, windows, heads, said)
        return [
            Heard(
                # The score is the mean over the tokens without the end.
                tokens, *language, result.scores[0] * len(tokens) / (len(tokens) + 1),
                result.no_speech_prob, aligned.get(row),
            )
            for row, (tokens, language, result) in enumerate(zip(said, languages, results, strict=True))
        ]  # fmt: skip

    def _align(
        self,
        features: NDArray[np.float32],
        windows: Sequence[Window],
        heads: list[list[int]],
        said: list[list[int]],
    ) -> dict[int, Callable[[], list[float]]]:
        """As the other engine's; windows of one language and task at once."""
        import ctranslate2

        found: dict[int, Callable[[], list[float]]] = {}
        texts = [[token for token in tokens if token < self.words.end] for tokens in said]
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, window in enumerate(windows):
            if window.align and texts[row]:
                groups.setdefault(tuple(heads[row]), []).append(row)
        for head, rows in groups.items():
            paths = self.model.align(
                ctranslate2.StorageView.from_array(features[rows]),
                [token for token in head if token != self.words.no_times],
                [texts[row] for row in rows],
                [max(2, round(windows[row].seconds * 2 * FRAMES_PER_S)) for row in rows],
                median_filter_width=MEDIAN_FRAMES,
            )
            found |= {row: partial(_followed, path.alignments) for row, path in zip(rows, paths, strict=True)}
        return found


def _followed(path: list[tuple[int, int]]) -> list[float]:
    tokens, frames = zip(*path, strict=True)
    return begin_of_tokens(tokens, frames)


# ---- pieces --------------------------------------------------------------------------------------------


def speech(samples: Samples) -> list[tuple[int, int]]:
    """Where silero's model hears somebody speak, in samples, with 0.2 s around it."""
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    options = VadOptions(min_silence_duration_ms=400, speech_pad_ms=200)
    spans = []
    # Block by block: it takes several times the memory of its sound.
    for start, end in quiet_cuts(samples, 0, len(samples), 600 * RATE):
        found = get_speech_timestamps(samples[start:end], options)
        spans += [(start + span["start"], start + span["end"]) for span in found]
    return spans


def quiet_cuts(samples: Samples, start: int, end: int, limit: int) -> list[tuple[int, int]]:
    """From `start` to `end` in parts of at most `limit` samples, which touch and hold everything.

    Of all ways to cut it the one whose cuts are quietest, each beside the sound around it, and few: one more
    part costs as much as a cut at a tenth of that loudness.
    """
    import numpy as np

    if end - start <= limit:
        return [(start, end)]
    frame = RATE // 50
    count = (end - start) // frame
    block = samples[start : start + count * frame].reshape(count, frame)
    loud = np.sqrt(np.einsum("ij,ij->i", block, block) / frame)
    # A pause is longer than the gap in a consonant.
    quiet = np.convolve(np.pad(loud, 7, mode="edge"), np.ones(15, np.float32) / 15, mode="valid")
    sums, here = np.pad(loud.cumsum(dtype=float), (1, 0)), np.arange(count)
    low, high = np.maximum(here - limit // frame, 0), np.minimum(here + limit // frame, count)
    around = (sums[high] - sums[low]) / (high - low)
    cost = quiet / np.maximum(around, 1e-9) + 0.1
    # One may come in each quarter of a second; of shorter parts, in each 120th.
    every = max(1, limit // (120 * frame))
    rows = np.pad(cost, (0, -count % every), constant_values=np.inf).reshape(-1, every)
    frames = np.arange(len(rows)) * every + rows.argmin(1)
    places = np.concatenate([[start], start + frames * frame + frame // 2, [end]])
    costs = [0.0, *cost[frames].tolist(), 0.0]
    first = np.searchsorted(places, places - limit).tolist()
    best, before = np.zeros(len(places)), [0] * len(places)
    for place in range(1, len(places)):
        before[place] = first[place] + int(best[first[place] : place].argmin())
        best[place] = best[before[place]] + costs[place]
    parts, place = [], len(places) - 1
    while place:
        parts.append((int(places[before[place]]), int(places[place])))
        place = before[place]
    return parts[::-1]


def cut(samples: Samples, *, vad: bool, limit_s: float) -> list[tuple[int, int]]:
    """What is to be heard, as pieces of at most `limit_s` seconds, in order, none overlapping the next.

    Without `vad` they hold everything but what is inaudible as a whole.
    """
    import numpy as np

    limit = int(limit_s * RATE)
    pieces: list[tuple[int, int]] = []
    for span in speech(samples) if vad else [(0, len(samples))]:
        for start, end in quiet_cuts(samples, *span, limit):
            if pieces and vad and end - pieces[-1][0] <= limit:
                pieces[-1] = (pieces[-1][0], end)
            else:
                pieces.append((start, end))
    return [
        (start, end) for start, end in pieces if end > start and np.abs(samples[start:end]).max() > INAUDIBLE
    ]


@dataclass(frozen=True)
class Span:
    """Part of a window's answer: seconds in the window, and tokens, those of its times included."""

    start: float
    end: float
    tokens: list[int]


def spans(tokens: Sequence[int], first_time: int, seconds: float) -> tuple[list[Span], float]:
    """A window's answer in parts, and how many of its `seconds` they cover.

    As openai/whisper reads it: where the answer ends within a part that has no end yet, that part is left
    out, to be heard again from its start.
    """
    is_time = [token >= first_time for token in tokens]

    def at(index: int) -> float:
        return min(seconds, round((tokens[index] - first_time) / FRAMES_PER_S, 2))

    ends = [index for index in range(1, len(tokens)) if is_time[index - 1] and is_time[index]]
    closed = is_time[-2:] == [False, True]
    if not ends:
        last = next((at(index) for index in reversed(range(len(tokens))) if is_time[index]), 0.0)
        first = at(0) if tokens and is_time[0] else 0.0
        return [Span(first, last if last > first else seconds, list(tokens))] if tokens else [], seconds
    if closed:
        ends.append(len(tokens))
    begins = [0, *ends[:-1]]
    found = [
        Span(at(begin), at(end - 1), list(tokens[begin:end])) for begin, end in zip(begins, ends, strict=True)
    ]
    return found, seconds if closed else at(ends[-1] - 1)


# ---- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What a job asks of each of its windows."""

    language: str | None
    task: Task
    prompt: list[int]
    temperatures: Sequence[float]
    beam_size: int
    align: bool


@dataclass
class Piece:
    """What was heard in one piece of a job."""

    segments: list[Segment] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    language: str | None = None
    language_probability: float | None = None


class Listener:
    """Holds the engine, and everything that is done beside it."""

    def __init__(
        self,
        engine: Engine,
        words: Vocabulary,
        extractor: Any,
        settings: Settings,
        found: ModelPath,
        batch: int,
    ) -> None:
        self.engine, self.words, self.settings = engine, words, settings
        self.name, self.revision = settings.public_name, found.revision
        self._extractor, self._batch = extractor, batch
        # Each window costs the same: the encoder takes 30 s, whatever they hold.
        self._batcher: DynamicBatcher[Window, Heard] = DynamicBatcher(
            engine.decode, budget=batch, length=lambda _: 1, key=engine.key
        )

    def features(self, samples: Samples) -> NDArray[np.float32]:
        """Log-mel features of a window, (mel bins, 3000)."""
        found: NDArray[np.float32] = self._extractor(samples, sampling_rate=RATE, return_tensors="np")[
            "input_features"
        ][0]
        return found

    async def listen(self, samples: Samples, options: Options, *, vad: bool, offset: float) -> list[Piece]:
        """What is said in `samples`, which begin at `offset` seconds of the audio, piece by piece."""
        pieces = await asyncio.to_thread(cut, samples, vad=vad, limit_s=self.settings.window_seconds)
        if not pieces:
            return []
        progress = Progress(pieces, at_least=2 * self._batch)
        # Enough for the batch that runs and the next: features take a megabyte and more.
        turns = asyncio.Semaphore(2 * self._batch)

        async def hear(piece: tuple[int, int], options: Options) -> Piece:
            async with turns:
                heard = await self._hear(samples, piece, options, offset)
            progress.heard(piece)
            return heard

        done: list[Piece] = []
        while options.language is None and pieces:
            # The language of a job is that of its first speech; a piece or two may turn out to have none.
            first, *pieces = pieces
            done.append(await hear(first, options))
            if done[-1].segments or len(done) == 3:
                options = replace(options, language=done[-1].language)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(hear(piece, options)) for piece in pieces]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        await progress.settled()
        return [*done, *(task.result() for task in tasks)]

    async def _hear(self, samples: Samples, piece: tuple[int, int], options: Options, offset: float) -> Piece:
        """One piece; what its answer leaves out at the end is heard again from there."""
        start, end = piece
        heard = Piece(language=options.language)
        tries = 0
        while start < end:
            tries += 1
            seconds = (end - start) / RATE
            features = await asyncio.to_thread(self.features, samples[start:end])
            temperature, said = await self._decode(features, seconds, options)
            if heard.language is None:
                heard.language, heard.language_probability = said.language, said.language_probability
                options = replace(options, language=said.language)
            if said.nothing:
                break
            parts, covered = spans(said.tokens, self.words.first_time, seconds)
            if not covered or seconds - covered < 0.5 or tries == MAX_TRIES:
                # The rest is taken as it is: heard again, it might never come to the end.
                rest = said.tokens[sum(len(part.tokens) for part in parts) :]
                parts += [Span(covered, seconds, rest)] if rest else []
                covered = seconds
            at = offset + start / RATE
            begins = await asyncio.to_thread(said.begins) if said.begins else []
            self._add(heard, parts, said, temperature, at, begins)
            start += max(1, round(covered * RATE))
        return heard

    async def _decode(
        self, features: NDArray[np.float32], seconds: float, options: Options
    ) -> tuple[float, Heard]:
        """What the window says at the first temperature that makes sense of it."""
        said: Heard | None = None
        for temperature in options.temperatures:
            window = Window(
                features, seconds, options.language, options.task, options.prompt, temperature,
                options.beam_size, options.align,
            )  # fmt: skip
            try:
                (said,) = await self._batcher.submit([window])
            finally:
                window.over = True
            likely = said.avg_logprob >= MIN_LOGPROB
            if said.nothing or (likely and repetition(self.words.decode(said.tokens)) <= MAX_COMPRESSION):
                break
        assert said is not None
        return temperature, said

    def _add(
        self, heard: Piece, parts: list[Span], said: Heard, temperature: float, at: float, begins: list[float]
    ) -> None:
        """Put the parts of a window that begins at the second `at` into the piece."""
        text = self.words.decode(said.tokens)
        used = 0
        for part in parts:
            tokens = [token for token in part.tokens if token < self.words.end]
            if begins and tokens:
                place = used
                for word, count in self.words.words(tokens, heard.language):
                    start, end = begins[place], begins[min(place + count, len(begins) - 1)]
                    place += count
                    if word.strip():
                        times = {"start": round(at + start, 3), "end": round(at + max(start, end), 3)}
                        heard.words.append(Word(word=word.strip(), **times))
            used += len(tokens)
            said_here = self.words.decode(tokens)
            if said_here.strip():
                heard.segments.append(
                    Segment(
                        id=0, seek=round(at * 100), start=round(at + part.start, 3),
                        end=round(at + part.end, 3), text=said_here, tokens=part.tokens,
                        temperature=temperature, avg_logprob=round(said.avg_logprob, 4),
                        compression_ratio=round(repetition(text), 3),
                        no_speech_prob=round(said.no_speech_prob, 6),
                    )
                )  # fmt: skip


def repetition(text: str) -> float:
    """How much smaller zlib makes it: text that repeats itself has more than 2.4."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0


class Progress:
    """Tells the platform how far a long job is, at most every PROGRESS_S.

    An update that arrived after the result would put the job back to running: none is sent when less than
    `at_least` pieces are left, and `settled` waits until the last one must have arrived.
    """

    def __init__(self, pieces: Sequence[tuple[int, int]], at_least: int) -> None:
        self._left, self._least = len(pieces), at_least
        self._total = sum(end - start for start, end in pieces) / RATE
        self._done = 0.0
        self._said = time.monotonic()
        self._sent = False

    def heard(self, piece: tuple[int, int]) -> None:
        self._left -= 1
        self._done += (piece[1] - piece[0]) / RATE
        if self._left < self._least or time.monotonic() - self._said < PROGRESS_S:
            return
        self._said, self._sent = time.monotonic(), True
        done = {"percent": round(100 * self._done / self._total, 1)}
        report({"progress": {**done, "seconds": round(self._done, 1), "of": round(self._total, 1)}})

    async def settled(self) -> None:
        if self._sent:
            await asyncio.sleep(max(0.0, self._said + PROGRESS_GRACE_S - time.monotonic()))


def report(progress: dict[str, Any]) -> None:
    """Send a progress update of the running job, where a platform listens."""
    if not os.environ.get("RUNPOD_WEBHOOK_POST_OUTPUT"):
        return
    import runpod

    runpod.serverless.progress_update(current_job.get(), progress)


def load(settings: Settings) -> Listener:
    found = prewarm.resolve(settings, settings.model_name)
    load_engine = load_transformers if settings.engine == "transformers" else load_faster_whisper
    return load_engine(settings, found)


def load_transformers(settings: Settings, found: ModelPath) -> Listener:
    config = _read_json(found.path / "config.json")
    if config.get("model_type") != "whisper":
        if (found.path / "model.bin").exists() and (found.path / "vocabulary.json").exists():
            message = f"{settings.model_name} is a CTranslate2 model. Set ENGINE=faster-whisper."
        else:
            message = f"{settings.model_name} is a model of the type {config.get('model_type')}, not whisper."
        raise StartError(message, code="unsupported_architecture")
    with prewarm.phase("import"):
        from transformers import WhisperForConditionalGeneration
    with prewarm.phase("load") as phase:
        device, dtype = pick_device(settings)
        tokenizer, extractor = load_processor(settings, found)
        model, report = WhisperForConditionalGeneration.from_pretrained(
            found.path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise StartError(
                f"{settings.model_name} lacks {len(report['missing_keys'])} weights, such as "
                f"{min(report['missing_keys'])}. Use another checkpoint.",
                code="incomplete",
            )
        model.to(device).eval()
        phase.bytes = sum(weight.nbytes for weight in model.parameters())
    # Fine-tunes may lack the key; then the size tells, as in openai/whisper: English-only models have 51864.
    told = getattr(model.generation_config, "is_multilingual", None)
    multilingual = model.config.vocab_size >= 51_865 if told is None else bool(told)
    words = Vocabulary(
        tokenizer, multilingual=multilingual, positions=model.config.max_target_positions,
        timestamps=settings.model_timestamps,
    )  # fmt: skip
    batch = settings.max_batch_windows or (GPU_BATCH if device.type == "cuda" else CPU_BATCH)
    return Listener(TransformersEngine(model, words), words, extractor, settings, found, batch)


def load_faster_whisper(settings: Settings, found: ModelPath) -> Listener:
    device, dtype = pick_device(settings)
    kind = settings.compute_type
    if kind == "auto":
        kind = str(dtype).removeprefix("torch.")  # type: ignore[assignment]
    folder = found.path
    if not (folder / "model.bin").exists():
        with prewarm.phase("convert"):
            folder = convert(found, "float32" if kind == "float32" else "float16", settings.model_name)
    with prewarm.phase("import"):
        if device.type == "cuda":
            load_cublas()
        import ctranslate2
    with prewarm.phase("load") as phase:
        tokenizer, extractor = load_processor(settings, found)
        try:
            # faster-whisper's own class would fetch a tokenizer for a folder that has none.
            model = ctranslate2.models.Whisper(
                str(folder), device=device.type, device_index=device.index or 0, compute_type=kind
            )
        except ValueError as error:
            cause = str(error).strip().partition("\n")[0]
            raise StartError(f"COMPUTE_TYPE={kind}: {cause}", code="bad_setting") from error
        phase.bytes = (folder / "model.bin").stat().st_size
    if extractor.feature_size != model.n_mels:
        from transformers import WhisperFeatureExtractor

        extractor = WhisperFeatureExtractor(feature_size=model.n_mels)
    words = Vocabulary(
        tokenizer, multilingual=model.is_multilingual, positions=448, timestamps=settings.model_timestamps
    )
    config = _read_json(folder / "config.json")
    suppress = list(config.get("suppress_ids") or [])
    batch = settings.max_batch_windows or (GPU_BATCH if device.type == "cuda" else CPU_BATCH)
    return Listener(CTranslateEngine(model, words, suppress), words, extractor, settings, found, batch)


def load_processor(settings: Settings, found: ModelPath) -> tuple[Any, Any]:
    """Tokenizer and feature extractor; of a CTranslate2 folder that has no extractor, the usual one."""
    from transformers import WhisperFeatureExtractor, WhisperTokenizerFast

    try:
        tokenizer = WhisperTokenizerFast.from_pretrained(found.path, local_files_only=True)
        if {"<|startoftranscript|>", "<|notimestamps|>"} - tokenizer.get_vocab().keys():
            raise ValueError("Whisper's own tokens are missing")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        cause = str(error).strip().partition("\n")[0]
        message = f"{settings.model_name} comes without a whole tokenizer: {cause}"
        raise StartError(message, code="incomplete") from error
    try:
        extractor = WhisperFeatureExtractor.from_pretrained(found.path, local_files_only=True)
    except (OSError, ValueError):
        bins = _read_json(found.path / "config.json").get("num_mel_bins", 80)
        extractor = WhisperFeatureExtractor(feature_size=bins)
    return tokenizer, extractor


def convert(found: ModelPath, kind: str, name: str) -> Path:
    """The folder of the model in CTranslate2's format: made once, on the volume where there is one.

    Raises StartError for a model that CTranslate2 has no form for.
    """
    import ctranslate2

    volume = Path(os.environ.get("RUNPOD_VOLUME_PATH") or "/runpod-volume")
    home = volume if os.access(volume, os.W_OK) else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    stamp = zlib.crc32(json.dumps([str(found.path), found.bytes]).encode())
    version = found.revision or f"{stamp:08x}"
    place = home.expanduser() / "ctranslate2" / found.name.strip("/").replace("/", "--")
    folder = place / f"{version}-{kind}-{ctranslate2.__version__}"
    with lease(place / f"{folder.name}.lease"):
        if not (folder / "model.bin").exists():
            log.info("convert model=%s to=%s", name, folder)
            files = ("tokenizer.json", "preprocessor_config.json", "generation_config.json")
            there = [file for file in files if (found.path / file).exists()]
            new = Path(tempfile.mkdtemp(dir=place))
            try:
                converter = ctranslate2.converters.TransformersConverter(str(found.path), copy_files=there)
                converter.convert(str(new / "model"), quantization=kind)
                shutil.rmtree(folder, ignore_errors=True)
                (new / "model").rename(folder)
            except (ValueError, KeyError, AttributeError) as error:
                message = f"{name} cannot be converted for CTranslate2: {error}. Use ENGINE=transformers."
                raise StartError(message, code="unsupported_architecture") from error
            finally:
                shutil.rmtree(new, ignore_errors=True)
    return folder


def load_cublas() -> None:
    """CTranslate2 looks for CUDA 12's cuBLAS by its name alone: loaded from its wheel, it is found."""
    import ctypes
    from importlib.util import find_spec

    spec = find_spec("nvidia.cublas")
    for root in spec.submodule_search_locations or [] if spec else []:
        for name in ("libcublasLt.so.12", "libcublas.so.12"):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(Path(root) / "lib" / name), mode=ctypes.RTLD_GLOBAL)


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


listener: Listener


# ---- handle --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transcript:
    """What a job heard."""

    segments: list[Segment]
    words: list[Word]
    language: str | None
    probability: float | None
    duration: float

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments).strip()


@job_handler(
    WhisperRequest,
    routes={
        "/v1/audio/transcriptions": TranscriptionRequest,
        "/v1/audio/translations": TranslationRequest,
        "/v1/models": ModelsRequest,
    },
)
async def handler(
    request: WhisperRequest | TranscriptionRequest | TranslationRequest | ModelsRequest,
) -> WhisperResponse | OpenAIText | OpenAIVerbose | ModelList | str:
    if isinstance(request, ModelsRequest):
        return openai_api.model_list(listener.name)
    if isinstance(request, WhisperRequest):
        return await answer(request, listener)
    return await answer_openai(request, listener)


async def answer(request: WhisperRequest, listener: Listener) -> WhisperResponse | OpenAIVerbose | str:
    words = request.word_timestamps or request.timestamps == "word"
    heard = await transcribe(request, "audio", listener, words=words)
    if request.response_format != "json":
        return shown(heard, request.response_format, request.task, listener, words=words)
    chunks: list[Chunk] = []
    if request.timestamps == "word":
        chunks = [Chunk(timestamp=(word.start, word.end), text=word.word) for word in heard.words]
    elif request.timestamps:
        chunks = [Chunk(timestamp=(part.start, part.end), text=part.text) for part in heard.segments]
    return WhisperResponse(
        text=heard.text,
        chunks=chunks,
        language=heard.language,
        language_probability=heard.probability,
        task=request.task,
        duration=heard.duration,
        segments=heard.segments,
        words=heard.words if words else None,
        model=listener.name,
        revision=listener.revision,
    )


async def answer_openai(
    request: TranscriptionRequest | TranslationRequest, listener: Listener
) -> OpenAIText | OpenAIVerbose | str:
    openai_api.check_model(request.model, listener.name)
    task: Task = "transcribe" if isinstance(request, TranscriptionRequest) else "translate"
    shows: Granularities = ["segment"]
    language = None
    if isinstance(request, TranscriptionRequest):
        shows, language = request.timestamp_granularities, request.language or None
    own = WhisperRequest(
        audio=request.file, task=task, language=language, prompt=request.prompt,
        temperature=request.temperature, vad=request.vad,
    )  # fmt: skip
    heard = await transcribe(own, "file", listener, words="word" in shows)
    if request.response_format == "json":
        return OpenAIText(text=heard.text, usage=DurationUsage(seconds=heard.duration))
    return shown(
        heard, request.response_format, task, listener, words="word" in shows, segments="segment" in shows
    )


async def transcribe(request: WhisperRequest, param: str, listener: Listener, *, words: bool) -> Transcript:
    """What is said in the request's audio, which came in the field `param`."""
    settings, vocabulary = listener.settings, listener.words
    options = Options(
        language=vocabulary.language(request.language, request.task),
        task=request.task,
        prompt=await asyncio.to_thread(vocabulary.prompt, request.prompt),
        temperatures=TEMPERATURES if request.fallback and not request.temperature else (request.temperature,),
        beam_size=request.beam_size,
        align=words,
    )
    limit = int(settings.max_audio_mb * 1e6)
    data = await load_bytes(request.audio, param=param, max_bytes=limit, timeout_s=120)
    samples = await asyncio.to_thread(
        load_audio, data, rate=RATE, param=param, max_seconds=settings.max_audio_seconds, allow_empty=True
    )
    del data
    duration = round(len(samples) / RATE, 3)
    if request.clip_start and request.clip_start >= duration:
        message = f"{request.clip_start:g}, and the audio has {duration:g} seconds."
        raise _wrong("clip_start", "invalid_value", message)
    begin = int(request.clip_start * RATE)
    end = len(samples) if request.clip_end is None else int(request.clip_end * RATE)
    pieces = await listener.listen(samples[begin:end], options, vad=request.vad, offset=request.clip_start)
    segments = [segment for piece in pieces for segment in piece.segments]
    first = next((piece for piece in pieces if piece.segments), None)
    for number, segment in enumerate(segments):
        segment.id = number
    return Transcript(
        segments=segments,
        words=[word for piece in pieces for word in piece.words],
        language=first.language if first else options.language,
        probability=first.language_probability if first else None,
        duration=duration,
    )


# ---- formats -------------------------------------------------------------------------------------------


def shown(
    heard: Transcript,
    format: ResponseFormat,
    task: Task,
    listener: Listener,
    *,
    words: bool,
    segments: bool = True,
) -> OpenAIVerbose | str:
    """The transcript in one of OpenAI's formats, `json` left out."""
    if format == "srt":
        return srt(heard.segments)
    if format == "vtt":
        return vtt(heard.segments)
    if format == "text":
        return heard.text + "\n"
    names = listener.words.names
    return OpenAIVerbose(
        task=task,
        language="english" if task == "translate" else names.get(heard.language or "", heard.language or ""),
        duration=heard.duration,
        text=heard.text,
        segments=heard.segments if segments else None,
        words=heard.words if words else None,
        usage=DurationUsage(seconds=heard.duration),
    )


def clock(seconds: float, mark: str) -> str:
    """`00:01:02.345`, with `mark` before the thousandths."""
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{mark}{thousandths:03}"


def cues(segments: Sequence[Segment], mark: str) -> Iterator[str]:
    for segment in segments:
        text = segment.text.strip().replace("-->", "->")
        yield f"{clock(segment.start, mark)} --> {clock(segment.end, mark)}\n{text}\n"


def srt(segments: Sequence[Segment]) -> str:
    """SubRip: numbered from 1, a comma before the thousandths."""
    return "".join(f"{number}\n{cue}\n" for number, cue in enumerate(cues(segments, ","), 1))


def vtt(segments: Sequence[Segment]) -> str:
    """WebVTT: a header, a dot before the thousandths."""
    return "WEBVTT\n\n" + "".join(f"{cue}\n" for cue in cues(segments, "."))


# ---- start ---------------------------------------------------------------------------------------------


def prepare() -> dict[str, Any]:
    global listener
    settings = read_settings(Settings)
    listener = load(settings)
    if settings.prewarm:
        import numpy as np

        # A second of noise, heard with all that an engine has; and silero's model.
        noise = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
        sound = {"audio": encode_audio(noise, RATE, "wav"), "fallback": False}
        prewarm.run(handler, [{**sound, "vad": False, "word_timestamps": True}, sound])
    return start_config(handler, settings)


def main() -> None:
    config = startup.run(prepare, worker="whisper")
    import runpod

    runpod.serverless.start(config)


if __name__ == "__main__":
    main()
