"""The xtts worker with a small random XTTS of the real classes: it babbles, in several voices."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import pickle
import shutil
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import boto3
import numpy as np
import openai
import pytest
import requests
import soundfile
import soxr
from numpy.typing import NDArray

from local import Platform, running
from shared import jobs, startup
from shared.errors import JobError, StartError
from shared.media import encode_audio
from shared.openai_api import ModelsRequest
from tools.models import local_env
from tools.models.tiny_xtts import LANGUAGES, SPEAKERS
from tools.workers import load_handler

engine = pytest.mark.engine
Samples = NDArray[np.float32]
RATE = 24000


def recording(seconds: float = 3.0, *, pitch: float = 180.0, rate: int = 22050) -> Samples:
    """Something like a voice: a hum with overtones that swells and sinks."""
    t = np.arange(int(seconds * rate)) / rate
    hum = sum(np.sin(2 * np.pi * pitch * k * t) / k for k in range(1, 8))
    return (0.2 * hum * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))).astype(np.float32)


def wav(samples: Samples, rate: int = 22050, **options: Any) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **{"format": "WAV", **options})
    return base64.b64encode(buffer.getvalue()).decode()


def heard(answer: dict[str, Any]) -> Samples:
    """The samples of an answer or a chunk, by libsndfile."""
    data = base64.b64decode(answer["audio"], validate=True)
    if answer["format"] == "pcm":
        return (np.frombuffer(data, "<i2") / 32768).astype(np.float32)
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert samples.ndim == 1
    assert rate == answer["sample_rate"]
    assert np.isfinite(samples).all()
    return samples  # type: ignore[no-any-return]


def alike(one: Samples, other: Samples) -> bool:
    """The same but for the last bits: batches may round otherwise than a lone run."""
    return one.shape == other.shape and bool(np.abs(one - other).max() < 1e-3)


# ---- requests, without a model -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def xtts() -> ModuleType:
    return load_handler("xtts")


@pytest.mark.parametrize(
    ("payload", "param", "code"),
    [
        ({}, "text", "missing_field"),
        ({"text": 5}, "text", "invalid_value"),
        ({"text": "a" * 50_001}, "text", "invalid_value"),
        ({"text": "a", "speeker": "Ana"}, "speeker", "unknown_field"),
        ({"text": "a", "language": "la"}, "language", "invalid_value"),
        ({"text": "a", "speaker": "A", "speaker_wav": "B"}, "speaker", "invalid_value"),
        ({"text": "a", "speaker_wav": []}, "speaker_wav", "invalid_value"),
        ({"text": "a", "speaker_wav": ["x"] * 9}, "speaker_wav", "invalid_value"),
        ({"text": "a", "speaker_wav": ["x", ""]}, "speaker_wav.1", "invalid_value"),
        ({"text": "a", "speed": 0.4}, "speed", "invalid_value"),
        ({"text": "a", "speed": 2.1}, "speed", "invalid_value"),
        ({"text": "a", "temperature": -1}, "temperature", "invalid_value"),
        ({"text": "a", "top_p": 0}, "top_p", "invalid_value"),
        ({"text": "a", "top_k": 0}, "top_k", "invalid_value"),
        ({"text": "a", "repetition_penalty": 0.5}, "repetition_penalty", "invalid_value"),
        ({"text": "a", "seed": 1.5}, "seed", "invalid_value"),
        ({"text": "a", "response_format": "ogg"}, "response_format", "invalid_value"),
        ({"text": "a", "sample_rate": 96000}, "sample_rate", "invalid_value"),
        ({"text": "a", "response_format": "opus", "sample_rate": 44100}, "sample_rate", "invalid_value"),
        ({"voices": False}, "voices", "invalid_value"),
    ],
)
def test_what_is_refused(xtts: ModuleType, payload: dict[str, Any], param: str, code: str) -> None:
    job = {"id": "1", "input": payload}
    with pytest.raises(JobError) as caught:
        jobs.parse(job, [xtts.XttsRequest, xtts.VoicesRequest], xtts.ROUTES)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_a_request_needs_no_more_than_a_text(xtts: ModuleType) -> None:
    request = jobs.validate(xtts.XttsRequest, {"text": "Hello."})
    assert request.model_dump(exclude_unset=True) == {"text": "Hello."}
    assert (request.language, request.response_format, request.stream) == ("en", "wav", False)  # type: ignore[attr-defined]
    assert jobs.validate(xtts.XttsRequest, {"text": "", "speaker_wav": "abc"}).speaker_wav == ["abc"]  # type: ignore[attr-defined]


# ---- text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("Hello 👋🏽 world 👨‍👩‍👧 ❤️!", "Hello world !"),
        ("5 € & 10 % @ 20 °", "5 € & 10 % @ 20 °"),
        ("a\x00b\u200bc\ufeffd", "a bcd"),
        ("caf\u0065\u0301", "café"),
        ("नमस्ते", "नमस्ते"),
        ("\U0001f1e9\U0001f1ea ★ → ©", ""),
        ("1️⃣ first", "1 first"),
    ],
)
def test_what_nobody_can_say_is_left_out(xtts: ModuleType, text: str, spoken: str) -> None:
    assert " ".join(xtts.speakable(text).split()) == spoken


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Mr. Smith met Dr. J. R. Jones. He left.", ["Mr. Smith met Dr. J. R. Jones.", "He left."]),
        ("It costs 3.50 dollars. Or 4.", ["It costs 3.50 dollars.", "Or 4."]),
        ("Am 3. Mai kam er. Dann ging er.", ["Am 3. Mai kam er.", "Dann ging er."]),
        ('Well... yes. «Oui.» "No." End', ["Well...", "yes.", "«Oui.»", '"No."', "End"]),
        ("e.g. this, approx. five. Fine.", ["e.g. this, approx. five.", "Fine."]),
        ("今日は。元気ですか？はい", ["今日は。", "元気ですか？", "はい"]),
        ("नमस्ते। कैसे हो?", ["नमस्ते।", "कैसे हो?"]),
        ("كيف حالك؟ بخير.", ["كيف حالك؟", "بخير."]),
        ("In 1999. Then", ["In 1999.", "Then"]),
        ("Take no. 5. No. 6. No. Not that.", ["Take no. 5. No. 6. No.", "Not that."]),
        ("One.\n\n\nTwo\nthree", ["One.", "Two", "three"]),
        ("?! ... -- \n , .", []),
        ("", []),
        ("Yes. ... No.", ["Yes.", "No."]),
    ],
)
def test_a_text_is_cut_at_its_sentences(xtts: ModuleType, text: str, pieces: list[str]) -> None:
    assert [piece.text for piece in xtts.split(text, 250)] == pieces


def test_pauses_are_those_of_what_ends_a_piece(xtts: ModuleType) -> None:
    long = "Word " + "word " * 19 + "and, then; " + "word " * 30
    pieces = xtts.split(f"One. {long.strip()}. Three.\nFour.", 120)
    assert [piece.end for piece in pieces] == [
        "sentence", "clause", "word", "sentence", "paragraph", "paragraph",
    ]  # fmt: skip
    assert pieces[1].text.endswith("then;")
    assert list(xtts.PAUSES) == ["paragraph", "sentence", "clause", "word"]
    assert sorted(xtts.PAUSES.values(), reverse=True) == list(xtts.PAUSES.values())


@pytest.mark.parametrize("limit", [71, 250])
@pytest.mark.parametrize(
    "text",
    [
        "word " * 500,
        "x" * 500,
        "one, two; three: " * 100,
        "。".join("日本語の文章" * n for n in range(1, 20)),
        "，".join(["中文"] * 300),
        " ".join("a" * n for n in range(1, 90)),
    ],
    ids=["words", "one word", "clauses", "japanese", "chinese", "growing words"],
)
def test_nothing_is_lost_and_no_piece_is_over_the_limit(xtts: ModuleType, text: str, limit: int) -> None:
    pieces = xtts.split(text, limit)
    assert max(len(piece.text) for piece in pieces) <= limit
    assert "".join("".join(piece.text for piece in pieces).split()) == "".join(text.split())


def test_a_long_text_is_cut_in_time_that_grows_with_it(xtts: ModuleType) -> None:
    """The largest text that a job may have, of what makes patterns slow."""
    for unit in ("a", ".", "Mr. ", "a. ", '."', "x, ", "。", "\n"):
        pieces = xtts.split((unit * xtts.MAX_TEXT)[: xtts.MAX_TEXT], 250)
        assert all(len(piece.text) <= 250 for piece in pieces)


# ---- the licence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", "0", "false"])
def test_nothing_is_loaded_before_the_licence_is_agreed_to(
    xtts: ModuleType, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COQUI_TOS_AGREED", raising=False)
    if value is not None:
        monkeypatch.setenv("COQUI_TOS_AGREED", value)
    with pytest.raises(StartError, match=r"non-commercial.*COQUI_TOS_AGREED=1") as caught:
        xtts.prepare()
    assert caught.value.code == "licence_not_agreed"
    assert startup.classify(caught.value) is caught.value


@engine
def test_a_worker_without_the_licence_says_so_to_every_job() -> None:
    with running("xtts", env={"COQUI_TOS_AGREED": "", "MODEL_NAME": "/nowhere"}) as platform:
        for _ in range(2):
            problem = problem_of(post(platform, {"text": "Hello."}))
            assert problem["code"] == "licence_not_agreed"
            assert "COQUI_TOS_AGREED=1" in problem["message"]


# ---- the engine, in this process -----------------------------------------------------------------------

ENV = {"HF_HUB_OFFLINE": "1", "MAX_BATCH_SIZE": "8", "VOICE_CACHE_SIZE": "4"}


def loaded(module: ModuleType, **env: str) -> Any:
    """An engine with the environment `env` on top of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**local_env("xtts"), **ENV, **env}.items():
            patch.setenv(name, value)
        return module.load(module.read_settings(module.Settings))


@pytest.fixture(scope="module")
def worker(xtts: ModuleType) -> Iterator[ModuleType]:
    """The handler's module with an engine. Importing TTS warns of what is not ours."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        xtts.engine = loaded(xtts)
    yield xtts
    xtts.engine.speaker.close()


ids = itertools.count()


async def send(worker: ModuleType, **payload: Any) -> dict[str, Any]:
    answer: dict[str, Any] = await worker.handler({"id": f"job-{next(ids)}", "input": payload})
    return answer


async def say(worker: ModuleType, text: str = "Hello world.", **payload: Any) -> dict[str, Any]:
    answer = await send(worker, text=text, **payload)
    assert "error" not in answer, answer["error"]
    return answer


async def error(worker: ModuleType, **payload: Any) -> dict[str, Any]:
    answer = await send(worker, **payload)
    assert "error" in answer, answer.keys()
    return json.loads(answer["error"])  # type: ignore[no-any-return]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110 (of another thread)
            await asyncio.sleep(0.002)


class Gate:
    """Holds up a function of the engine: `held` counts the calls that have come, `open` lets all through."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.real, self.held, self.open = real, 0, threading.Event()

    def __call__(self, *given: Any) -> Any:
        self.held += 1
        assert self.open.wait(120)
        return self.real(*given)


async def speak(worker: ModuleType, text: str, **options: Any) -> tuple[Any, list[Samples]]:
    """One piece of text by the engine: the row, and the samples as they came."""
    speaker = worker.engine.speaker
    voice = options.pop("voice", worker.engine.speakers[SPEAKERS[0]])
    sampling = options.pop("sampling", worker.engine.sampling)
    tokens = worker.engine.tokenizer.encode(text, lang="en")
    row = speaker.begin(tokens, voice, sampling, **{"seed": 1, **options})
    came = []
    while True:
        samples, reason = await row.hear()
        came.append(samples)
        if reason is not None:
            return row, came


def greedy(worker: ModuleType, penalty: float = 1.0) -> Any:
    from dataclasses import replace

    return replace(worker.engine.sampling, temperature=0.0, repetition_penalty=penalty)


@engine
@pytest.mark.parametrize("penalty", [1.0, 2.0])
@pytest.mark.parametrize("speed", [1.0, 1.4, 0.8])
async def test_it_speaks_as_the_library_does(worker: ModuleType, speed: float, penalty: float) -> None:
    """`Xtts.inference` with the same choice of tokens, the likeliest, gives the same samples."""
    model, voice = worker.engine.speaker.model, worker.engine.speakers[SPEAKERS[1]]
    text = "hello world, this is a sentence"

    def library() -> Samples:
        found: Samples = model.inference(
            text, "en", voice.latents, voice.embedding, do_sample=False, speed=speed,
            repetition_penalty=penalty, top_k=0, top_p=1.0, temperature=1.0,
        )["wav"]  # fmt: skip
        return found

    theirs = await worker.engine.speaker.call(library)
    _, ours = await speak(worker, text, voice=voice, sampling=greedy(worker, penalty), speed=speed)
    assert alike(np.concatenate(ours), theirs)


@pytest.fixture
def small_parts(worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What streams has a part after 24 tokens: with the default, 20, one of 40, the most here, has none."""
    monkeypatch.setattr(worker, "STREAM_TOKENS", 8)


@engine
@pytest.mark.usefixtures("small_parts")
async def test_a_piece_is_the_same_alone_in_company_and_in_parts(worker: ModuleType) -> None:
    texts = [f"number {n} " * (1 + n % 4) for n in range(12)]  # more than run at a time
    alone = [await speak(worker, text, seed=n) for n, text in enumerate(texts)]
    beside = await asyncio.gather(
        *(speak(worker, text, seed=n, each=n % 2 == 0, job=n) for n, text in enumerate(texts))
    )
    lengths = {len(row.tokens) for row, _ in alone}
    assert len(lengths) > 3, "they end at different times"
    for (row, samples), (again, parts) in zip(alone, beside, strict=True):
        assert again.tokens == row.tokens
        assert alike(np.concatenate(parts), np.concatenate(samples))
    assert any(len(parts) > 1 for _, parts in beside), "what streams comes in parts"


@engine
@pytest.mark.usefixtures("small_parts")
async def test_one_who_comes_later_joins(worker: ModuleType) -> None:
    """Beside one that has begun already, told by its first part."""
    speaker, voice = worker.engine.speaker, worker.engine.speakers[SPEAKERS[0]]
    sampling = greedy(worker)
    _, wanted = await speak(worker, "later", sampling=sampling)
    tokens = worker.engine.tokenizer.encode("first", lang="en")
    first = speaker.begin(tokens, voice, worker.engine.sampling, seed=LONG, each=True)
    _, reason = await first.hear()
    assert reason is None
    _, samples = await speak(worker, "later", sampling=sampling)
    assert alike(np.concatenate(samples), np.concatenate(wanted))
    while (await first.hear())[1] is None:
        pass


LONG = 1  # a seed with which "first" is spoken in two parts or more; the test above fails with another


@pytest.fixture
async def gated(worker: ModuleType) -> AsyncIterator[tuple[Any, Gate, Callable[[int], Any]]]:
    """An engine whose one decoder waits at a gate, and what begins a piece in it."""
    speaker = worker.Speaker(worker.engine.speaker.model)
    speaker._decoders = ThreadPoolExecutor(1)
    speaker._decode = gate = Gate(speaker._decode)
    tokens = worker.engine.tokenizer.encode("hello", lang="en")

    def begin(seed: int) -> Any:
        return speaker.begin(tokens, worker.engine.speakers[SPEAKERS[0]], worker.engine.sampling, seed=seed)

    yield speaker, gate, begin
    gate.open.set()
    speaker.close()


@engine
async def test_pieces_are_spoken_while_others_are_decoded(worker: ModuleType, gated: Any) -> None:
    _, gate, begin = gated
    first = begin(1)
    await until(lambda: gate.held == 1)
    second = begin(2)
    await until(lambda: second.over)
    gate.open.set()
    for row, seed in ((first, 1), (second, 2)):
        _, alone = await speak(worker, "hello", seed=seed)
        samples, reason = await row.hear()
        assert reason is not None
        assert alike(samples, np.concatenate(alone))


@engine
async def test_what_nobody_waits_for_is_not_decoded(gated: Any) -> None:
    _, gate, begin = gated
    first = begin(1)
    await until(lambda: gate.held == 1)
    second = begin(2)
    await until(lambda: second.over)
    second.stop()
    assert [sound.cancelled() for sound in second.sounds] == [True]
    gate.open.set()
    assert (await first.hear())[0].size
    assert (await begin_and_hear(begin, 3)).size
    assert gate.held == 2


async def begin_and_hear(begin: Callable[[int], Any], seed: int) -> Samples:
    samples: Samples = (await begin(seed).hear())[0]
    return samples


@engine
async def test_the_decoder_is_waited_for_when_much_is_to_be_decoded(
    worker: ModuleType, gated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for it is bounded; the engine goes on as soon as there is room."""
    _, gate, begin = gated
    waits = threading.Event()
    wait = worker.wait

    def waiting(*given: Any, **options: Any) -> None:
        waits.set()
        wait(*given, **options)

    monkeypatch.setattr(worker, "wait", waiting)
    monkeypatch.setattr(worker, "MAX_DECODING", 2)
    rows = [begin(seed) for seed in range(8)]
    await until(waits.is_set)
    assert sum(row.over for row in rows) == 2
    gate.open.set()
    heard = await asyncio.gather(*(row.hear() for row in rows))
    assert all(samples.size and reason for samples, reason in heard)


@engine
async def test_parts_come_in_order_whichever_is_decoded_first(worker: ModuleType, gated: Any) -> None:
    speaker, gate, _ = gated
    speaker._decoders = ThreadPoolExecutor(2)
    later = threading.Event()
    decode = gate.real

    def slow_at_first(frames: Any, embedding: Any, begin: int, end: int) -> Samples:
        if begin == 0:  # the beginning of the piece: nothing lies before it
            assert later.wait(120)
        samples: Samples = decode(frames, embedding, begin, end)
        if begin:
            later.set()
        return samples

    speaker._decode = slow_at_first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "STREAM_TOKENS", 8)
        tokens = worker.engine.tokenizer.encode("first", lang="en")
        voice = worker.engine.speakers[SPEAKERS[0]]
        row = speaker.begin(tokens, voice, worker.engine.sampling, seed=LONG, each=True)
        parts, reason = [], None
        while reason is None:
            samples, reason = await row.hear()
            parts.append(samples)
    assert len(parts) > 1
    _, alone = await speak(worker, "first", seed=LONG)
    assert alike(np.concatenate(parts), np.concatenate(alone))


@engine
async def test_what_nobody_waits_for_gives_its_place_up(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaker = worker.engine.speaker
    monkeypatch.setattr(speaker, "_step", gate := Gate(speaker._step))
    task = asyncio.create_task(say(worker, "One sentence. " * 40))
    await until(lambda: gate.held == 1)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    gate.open.set()
    await until(lambda: speaker._live is None and not speaker._waiting)
    assert gate.held == 1, "nobody gets another token"
    assert (await speak(worker, "next"))[0].over


@engine
async def test_a_piece_that_breaks_breaks_alone(worker: ModuleType) -> None:
    from dataclasses import replace

    import torch

    voice = worker.engine.speakers[SPEAKERS[0]]
    broken = replace(voice, latents=torch.zeros(1, 32, 7))
    results = await asyncio.gather(
        speak(worker, "good", seed=1),
        speak(worker, "bad", voice=broken),
        speak(worker, "also good", seed=2),
        return_exceptions=True,
    )
    assert isinstance(results[1], RuntimeError)
    for result, (text, seed) in zip(results[::2], [("good", 1), ("also good", 2)], strict=True):
        assert not isinstance(result, BaseException)
        _, alone = await speak(worker, text, seed=seed)
        assert alike(np.concatenate(result[1]), np.concatenate(alone))


@engine
@pytest.mark.usefixtures("small_parts")
async def test_out_of_memory_means_fewer_at_a_time(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three or more have told a part when the memory runs out; they begin anew and tell the rest."""
    speaker = worker.engine.speaker
    monkeypatch.setattr(speaker, "_max_rows", speaker._max_rows)  # as it was, afterwards
    alone = [await speak(worker, f"number {n}", seed=n) for n in range(7)]
    step, told = speaker._step, []

    def scarce(batch: Any) -> None:
        if len(batch.rows) > 2 and len(batch.rows[0].tokens) > 33:
            told.append(sum(bool(row.sounds) for row in batch.rows))
            raise MemoryError
        step(batch)

    monkeypatch.setattr(speaker, "_step", scarce)
    beside = await asyncio.gather(*(speak(worker, f"number {n}", seed=n, each=True) for n in range(7)))
    assert told == [3]
    assert speaker._max_rows <= 2
    for (_, samples), (_, parts) in zip(alone, beside, strict=True):
        assert alike(np.concatenate(parts), np.concatenate(samples)), "nothing is told twice"


@engine
async def test_an_error_of_the_gpu_reaches_all_who_wait(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it CUDA does nothing more in the process: the engine ends, and nobody waits for ever."""
    from dataclasses import replace

    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    model = worker.engine.speaker.model
    async with asyncio.timeout(120):
        speaker = worker.Speaker(model, max_rows=2)
        monkeypatch.setattr(speaker, "_step", broken)
        monkeypatch.setattr(worker, "engine", replace(worker.engine, speaker=speaker))
        results = await asyncio.gather(
            *(speak(worker, f"number {n}", seed=n) for n in range(4)), return_exceptions=True
        )
        assert [getattr(result, "code", result) for result in results] == [jobs.ENGINE_DIED] * 4

        speaker = worker.Speaker(model)
        with pytest.raises(RuntimeError, match="CUDA error"):
            await speaker.call(broken)
        with pytest.raises(JobError) as caught:
            await speaker.call(lambda: None)
        assert caught.value.code == jobs.ENGINE_DIED


@engine
async def test_a_piece_that_has_been_spoken_keeps_no_tensors(worker: ModuleType) -> None:
    row, _ = await speak(worker, "hello")
    assert len(row.tokens) > 1
    assert await worker.engine.speaker.call(lambda: (row.states, row.seen)) == ([], None)


@engine
async def test_numbers_that_are_none(worker: ModuleType) -> None:
    from dataclasses import replace

    voice = worker.engine.speakers[SPEAKERS[0]]
    for broken in (
        replace(voice, latents=voice.latents * float("nan")),
        replace(voice, embedding=voice.embedding * float("nan")),
    ):
        with pytest.raises(JobError) as caught:
            await speak(worker, "hello", voice=broken)
        assert caught.value.code == "not_finite"
    assert (await say(worker))["duration"] > 0


@engine
async def test_every_job_gets_a_turn(worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """One job with more pieces than run at a time does not keep a short one waiting, which comes later."""
    speaker, order = worker.engine.speaker, list[Any]()
    admit = speaker._admit

    def noted() -> list[Any]:
        rows: list[Any] = admit()
        order.extend(row.job.request.text for row in rows)
        return rows

    monkeypatch.setattr(speaker, "_admit", noted)
    monkeypatch.setattr(speaker, "_step", gate := Gate(speaker._step))
    long = asyncio.create_task(say(worker, "A sentence. " * 16, seed=3))
    await until(lambda: gate.held == 1)
    going = len(order)
    begin, begun = speaker.begin, list[Any]()
    monkeypatch.setattr(speaker, "begin", lambda *a, **k: begun.append(begin(*a, **k)) or begun[-1])
    short = asyncio.create_task(say(worker, "Hello.", seed=3))
    await until(lambda: bool(begun))
    gate.open.set()
    await asyncio.gather(short, long)
    assert order.index("Hello.") == going, "it has the first place that is free"
    assert len(order) == 17


# ---- texts, spoken -------------------------------------------------------------------------------------


@engine
@pytest.mark.parametrize("language", LANGUAGES)
async def test_languages(worker: ModuleType, language: str) -> None:
    """Each with its own script, a number and a symbol; the library's real cleaners read them out."""
    if language == "ja" and not find_spec("cutlet"):
        pytest.skip("cutlet needs mojimoji, which has no wheels for this Python")
    greeting = {
        "ar": "مرحبا", "zh-cn": "你好", "ko": "안녕하세요", "ja": "こんにちは", "hi": "नमस्ते", "ru": "Привет",
    }.get(language, "Bonjour")  # fmt: skip
    read = await worker.engine.read(f"{greeting} 25 %", language)
    assert len(read) == 1
    ids = read[0][0]
    assert ids[0] == worker.engine.tokenizer.tokenizer.token_to_id(f"[{language}]")
    assert len(ids) > len(greeting)
    said = worker.engine.tokenizer.decode(ids)
    assert language == "ja" or not any(digit in said for digit in "0123456789") or language in ("zh-cn",)


@engine
async def test_abbreviations_and_numbers_are_read_out(worker: ModuleType) -> None:
    (ids, end), *rest = await worker.engine.read("Dr. Who owes $20 & 3rd St. fees, 1,234.5 in all.", "en")
    assert not rest
    assert end == "paragraph"
    said = worker.engine.tokenizer.decode(ids).removeprefix("[en]")
    assert said.startswith("doctor who owes twenty dollars and third saint fees, one thousand, two hundred")


@engine
@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("x" * 500, 2),
        ("9" * 400, None),  # larger than any number with a name
        ("12345678901234567890 " * 12, None),  # much longer when read out
        ("Hello 👋 world!", 1),
        ("𝕳𝖊𝖑𝖑𝖔 ﬁ Å \u202e abc", 1),
    ],
    ids=["a word of 500 letters", "a number of 400 digits", "long numbers", "emoji", "odd letters"],
)
async def test_odd_texts(worker: ModuleType, text: str, pieces: int | None) -> None:
    read = await worker.engine.read(text, "en")
    assert pieces is None or len(read) == pieces
    assert all(0 < len(ids) <= worker.engine.speaker.max_text_tokens for ids, _ in read)


@engine
@pytest.mark.parametrize("text", ["", " \n\t", "👋🎉", "...!?", "— « »"])
async def test_texts_with_nothing_to_say(worker: ModuleType, text: str) -> None:
    problem = await error(worker, text=text)
    assert (problem["param"], problem["code"]) == ("text", "nothing_to_say")


@engine
async def test_pauses_lie_between_the_pieces(worker: ModuleType) -> None:
    """And are not the library's 10,000 samples after every sentence."""
    one = await say(worker, "Hello.", temperature=0)
    two = await say(worker, "Hello. Hello.", temperature=0)
    far = await say(worker, "Hello.\nHello.", temperature=0)
    fast = await say(worker, "Hello. Hello.", temperature=0, speed=2.0)
    pauses = worker.PAUSES
    assert two["duration"] == pytest.approx(2 * one["duration"] + pauses["sentence"], abs=2e-3)
    assert far["duration"] == pytest.approx(2 * one["duration"] + pauses["paragraph"], abs=2e-3)
    assert fast["duration"] < two["duration"] - pauses["sentence"] / 2 + 1e-3
    sound, samples = heard(one), heard(two)
    assert alike(samples[: len(sound)], sound)
    assert alike(samples[-len(sound) :], sound)
    assert not samples[len(sound) : -len(sound)].any()


# ---- voices --------------------------------------------------------------------------------------------


@engine
async def test_a_clone_is_the_librarys(
    worker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`get_conditioning_latents` of files, whose reader would need ffmpeg's libraries, by soundfile here."""
    import torch
    from TTS.tts.models import xtts as library

    def load(path: str, rate: int) -> Any:
        samples, found = soundfile.read(path, dtype="float32")
        assert found == rate
        return torch.from_numpy(samples)[None].clip(-1, 1)

    monkeypatch.setattr(library, "load_audio", load)
    speaker = worker.engine.speaker
    recordings = [recording(3.0), recording(14.0, pitch=250)]
    for number, samples in enumerate(recordings):
        soundfile.write(tmp_path / f"{number}.wav", samples, 22050, subtype="FLOAT")
    config = speaker.model.config
    latents, embedding = await speaker.call(
        lambda: speaker.model.get_conditioning_latents(
            [str(tmp_path / "0.wav"), str(tmp_path / "1.wav")], max_ref_length=config.max_ref_len,
            gpt_cond_len=config.gpt_cond_len, gpt_cond_chunk_len=config.gpt_cond_chunk_len,
        )
    )  # fmt: skip
    voice = await speaker.call(lambda: worker.clone(speaker.model, recordings))
    assert torch.allclose(voice.latents, latents, atol=1e-5)
    assert torch.allclose(voice.embedding, embedding, atol=1e-5)


def m4a(samples: Samples, rate: int) -> str:
    """As a telephone records it; its index is at the end, so that ffmpeg needs a file to write."""
    import imageio_ffmpeg

    with tempfile.NamedTemporaryFile(suffix=".m4a") as file:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", "pipe:0", file.name]
        subprocess.run(command, input=base64.b64decode(wav(samples, rate)), check=True)
        return base64.b64encode(Path(file.name).read_bytes()).decode()


@cache
def recordings() -> dict[str, str]:
    sound = recording(2.5, rate=44100)
    stereo = np.stack([sound, sound * 0.5], axis=1)
    return {
        "16 bit": wav(sound, 44100, subtype="PCM_16"),
        "24 bit stereo": wav(stereo, 44100, subtype="PCM_24"),
        "8 bit": wav(recording(2.5, rate=8000), 8000, subtype="PCM_U8"),
        "float": wav(sound, 44100, subtype="FLOAT"),
        "flac": wav(sound, 44100, format="FLAC"),
        "mp3": wav(sound, 44100, format="MP3"),
        "ogg": wav(sound, 44100, format="OGG"),
        "opus": wav(recording(2.5, rate=48000), 48000, format="OGG", subtype="OPUS"),
        "m4a": m4a(sound, 44100),
        "48 kHz": wav(recording(2.5, rate=48000), 48000),
        "long": wav(recording(40.0)),
        "with silence around": wav(np.pad(sound, (44100, 88200)), 44100),
    }  # fmt: skip


@engine
@pytest.mark.parametrize("name", recordings())
async def test_recordings_of_many_kinds(worker: ModuleType, name: str) -> None:
    data = base64.b64decode(recordings()[name])
    samples = await asyncio.to_thread(worker.read_reference, data, "speaker_wav")
    assert samples.dtype == np.float32
    assert len(samples) / worker.REFERENCE_RATE == pytest.approx(40 if name == "long" else 2.5, abs=0.1)
    assert np.abs(samples).max() <= 1


@engine
@pytest.mark.parametrize(
    ("reference", "code"),
    [
        (wav(recording(0.2)), "too_short"),
        (wav(np.concatenate([recording(0.5), np.zeros(22050 * 5, np.float32)])), "too_short"),
        (wav(np.zeros(22050 * 4, np.float32)), "silent"),
        (wav(np.full(22050 * 4, 5e-4, np.float32)), "silent"),
        (base64.b64encode(b"%PDF-1.7 named voice.wav").decode(), "bad_audio"),
        (wav(recording(3.0))[:40], "bad_audio"),
        ("no base64!", "bad_base64"),
        (" ", "empty"),
        ("http://127.0.0.1:9/voice.wav", "download_failed"),
        ("file:///etc/passwd", "bad_url"),
    ],
)
async def test_recordings_that_are_none(worker: ModuleType, reference: str, code: str) -> None:
    good, one, second = await asyncio.gather(
        say(worker, speaker_wav=wav(recording())),
        error(worker, text="Hello.", speaker_wav=reference),
        error(worker, text="Hello.", speaker_wav=[wav(recording()), reference]),
    )
    assert good["speaker"] is None
    assert (one["param"], one["code"]) == ("speaker_wav", code)
    assert (second["param"], second["code"]) == ("speaker_wav.1", code)
    assert "root:" not in str(one)


@engine
async def test_voices_are_told_and_unknown_ones_refused(worker: ModuleType) -> None:
    listed = await send(worker, voices=True)
    assert listed["voices"] == list(SPEAKERS)
    assert listed["default"] == "Ana Florence"
    assert listed["languages"] == [it for it in LANGUAGES if it != "ja" or find_spec("cutlet")]
    assert listed["formats"] == ["wav", "flac", "mp3", "opus", "pcm"]
    problem = await error(worker, text="Hello.", speaker="Nobody")
    assert (problem["param"], problem["code"]) == ("speaker", "unknown_voice")
    assert all(name in problem["message"] for name in SPEAKERS)
    assert (await error(worker, text="Hello.", speaker="../config"))["code"] == "unknown_voice"
    assert (await say(worker))["speaker"] == "Ana Florence"


@engine
async def test_voices_sound_each_like_itself(worker: ModuleType) -> None:
    given: list[dict[str, Any]] = [{}, *({"speaker": name} for name in SPEAKERS)]
    given += [{"speaker_wav": wav(recording(pitch=pitch))} for pitch in (120, 300)]
    sounds = [heard(await say(worker, temperature=0, **voice)) for voice in given]
    assert alike(sounds[0], sounds[1 + SPEAKERS.index("Ana Florence")])
    for one, other in itertools.combinations(sounds[1:], 2):
        assert not alike(one, other)


@engine
async def test_a_voice_is_made_once_and_forgotten_when_others_came(worker: ModuleType) -> None:
    engine = worker.engine
    made: list[int] = []
    real = worker.clone

    def counting(model: Any, found: Any) -> Any:
        made.append(len(found))
        return real(model, found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "clone", counting)
        engine.voices._kept.clear()
        voices = [wav(recording(1.5, pitch=100 + 20 * n)) for n in range(6)]
        request = [worker.XttsRequest(text="", speaker_wav=[it]) for it in voices]
        together = await asyncio.gather(*(engine.voice(request[0]) for _ in range(5)))
        assert len(made) == 1, "those who wait for the same one share it"
        assert all(voice is together[0] for voice in together)
        for number in (1, 2, 3):
            await engine.voice(request[number])
        assert await engine.voice(request[0]) is together[0], "used again: the newest"
        await engine.voice(request[4])
        assert len(made) == 5
        assert len(engine.voices._kept) == 4, "VOICE_CACHE_SIZE"
        assert await engine.voice(request[0]) is together[0]
        await engine.voice(request[1])
        assert len(made) == 6, "the least recently used was forgotten"
        pair = await engine.voice(worker.XttsRequest(text="", speaker_wav=voices[:2]))
        assert made[-1] == 2
        assert pair is not together[0]


@engine
async def test_who_leaves_does_not_take_the_voice_from_others(worker: ModuleType) -> None:
    engine = worker.engine
    request = worker.XttsRequest(text="", speaker_wav=[wav(recording(1.2, pitch=333))])
    leaves, stays = (asyncio.create_task(engine.voice(request)) for _ in range(2))
    await until(lambda: bool(engine.voices._coming))
    leaves.cancel()
    assert (await stays).latents.shape == (1, 32, 64)
    assert leaves.cancelled() or leaves.done()


@engine
async def test_a_failure_is_not_kept(worker: ModuleType) -> None:
    engine = worker.engine
    request = worker.XttsRequest(text="", speaker_wav=[wav(recording(1.4, pitch=77))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "clone", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await engine.voice(request)
    assert (await engine.voice(request)).embedding.shape == (1, 512, 1)


# ---- answers -------------------------------------------------------------------------------------------


def by_ffmpeg(answer: dict[str, Any]) -> Samples:
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-xerror"]
    if answer["format"] == "pcm":
        command += ["-f", "s16le", "-ar", str(answer["sample_rate"]), "-ac", "1"]
    command += ["-i", "pipe:0", "-f", "f32le", "-ac", "1", "-ar", str(answer["sample_rate"]), "pipe:1"]
    done = subprocess.run(command, input=base64.b64decode(answer["audio"]), capture_output=True, check=True)
    assert not done.stderr
    return np.frombuffer(done.stdout, "<f4")


@engine
@pytest.mark.parametrize("rate", [None, 8000, 48000])
@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "opus", "pcm"])
async def test_formats_and_rates(worker: ModuleType, kind: str, rate: int | None) -> None:
    """Read back by libsndfile and by ffmpeg, and compared with the samples as they were made."""
    options = {} if rate is None else {"sample_rate": rate}
    answer = await say(worker, "Hello world.", seed=4, response_format=kind, **options)
    assert answer["format"] == kind
    assert answer["sample_rate"] == (rate or RATE)
    plain = heard(await say(worker, "Hello world.", seed=4, response_format="pcm"))
    assert answer["duration"] == pytest.approx(len(plain) / RATE, abs=2e-3)
    for samples in (heard(answer), by_ffmpeg(answer)):
        assert np.isfinite(samples).all()
        # MP3 has a lead and whole frames, of 72 ms at 8 kHz.
        assert len(samples) / answer["sample_rate"] == pytest.approx(
            answer["duration"], abs=0.3 if kind == "mp3" else 0.03
        )
        assert 0.3 < np.sqrt(np.mean(samples**2)) / np.sqrt(np.mean(plain**2)) < 1.3
    if kind in ("wav", "flac") and rate is None:
        assert np.abs(heard(answer) - plain).max() < 1e-4


@engine
async def test_nothing_is_clipped(worker: ModuleType) -> None:
    """Resampling a full-scale square wave overshoots; the answer is then made a little softer."""
    loud = np.sign(np.sin(np.arange(24000) * 0.05)).astype(np.float32)
    speech = worker.Speech(worker.XttsRequest(text="", sample_rate=48000), worker.engine)
    audio, seconds = speech.encode([loud])
    whole = soxr.resample(loud, RATE, 48000)
    assert seconds == 1
    assert np.abs(whole).max() > 1.05
    samples = heard({"audio": audio, "format": "wav", "sample_rate": 48000})
    assert np.abs(samples - whole / np.abs(whole).max()).max() < 1e-3


@engine
async def test_an_answer_says_what_was_used(worker: ModuleType) -> None:
    answer = await say(worker, "Bonjour.", language="fr", speaker=SPEAKERS[1])
    assert set(answer) == {
        "audio", "format", "sample_rate", "duration", "seconds", "finish_reason", "language", "speaker",
        "model", "revision",
    }  # fmt: skip
    assert (answer["language"], answer["speaker"]) == ("fr", SPEAKERS[1])
    assert answer["model"] == "tiny-random/xtts"
    assert answer["seconds"] > 0
    reasons = {(await say(worker, seed=seed))["finish_reason"] for seed in range(8)}
    assert reasons == {"stop", "length"}


@engine
async def test_a_seed_gives_the_same_speech_whatever_runs_beside(worker: ModuleType) -> None:
    text = "One sentence. And another one, which is longer."
    alone = heard(await say(worker, text, seed=7))
    crowd = [asyncio.create_task(say(worker, text, seed=seed)) for seed in range(10)]
    beside = [heard(answer) for answer in await asyncio.gather(*crowd)]
    assert alike(beside[7], alone)
    free = [heard(await say(worker, text)) for _ in range(3)]
    for one, other in itertools.combinations([*beside, *free], 2):
        assert not alike(one, other)


@engine
async def test_sampling_is_the_requests_own(worker: ModuleType) -> None:
    steady = heard(await say(worker, temperature=0))
    for same in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}):
        assert alike(heard(await say(worker, **same)), steady)
    weak, strong = [
        [heard(await say(worker, seed=seed, repetition_penalty=penalty)) for seed in range(3)]
        for penalty in (1, 20)
    ]
    assert not all(map(alike, weak, strong))


@engine
async def test_speed(worker: ModuleType) -> None:
    normal, fast, slow = [(await say(worker, seed=1, speed=speed))["duration"] for speed in (1.0, 2.0, 0.5)]
    assert fast == pytest.approx(normal / 2, rel=0.1)
    assert slow == pytest.approx(normal * 2, rel=0.1)


@engine
async def test_an_answer_too_large_is_stopped_early(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_max_result_bytes", 25_000)
    text = "A sentence. " * 6
    for kind in ("wav", "flac"):
        problem = await error(worker, text=text, response_format=kind, seed=1)
        assert problem["code"] == "result_too_large"
        assert "mp3 or opus" in problem["message"]
    assert (await say(worker, text, response_format="opus", seed=1))["duration"] > 1
    monkeypatch.setattr(jobs, "_max_result_bytes", 1_000)
    for kind in ("mp3", "opus"):
        problem = await error(worker, text=text, response_format=kind, seed=1)
        assert problem["code"] == "result_too_large"
        assert "mp3" not in problem["message"], "it is as small as it gets"


@engine
async def test_openai_requests(worker: ModuleType) -> None:
    read = worker.read_speech

    def speech(**body: Any) -> Any:
        return read(
            jobs.validate(worker.SpeechRequest, {"input": "Hello.", "voice": "nova", **body}), worker.engine
        )

    request = speech()
    assert (request.text, request.speaker, request.response_format) == ("Hello.", "Daisy Studious", "mp3")
    assert speech(voice="onyx").speaker is None, "a voice that this model lacks is the default one"
    assert speech(voice={"id": SPEAKERS[0]}).speaker == SPEAKERS[0]
    assert speech(speed=1.5, instructions="Cheerfully.").speed == 1.5
    assert speech(speaker_wav="abc").speaker is None
    for body, param in [
        ({"response_format": "aac"}, "response_format"), ({"speed": 4.0}, "speed"),
        ({"stream_format": "sse"}, "stream_format"), ({"model": "tts-1"}, "model"), ({"input": 5}, "input"),
        ({"response_format": "opus", "sample_rate": 44100}, "sample_rate"),
    ]:  # fmt: skip
        with pytest.raises(JobError) as caught:
            speech(**body)
        assert caught.value.param == param
    problem = await send(
        worker, openai_route="/v1/audio/speech", openai_input={"input": "Hello.", "voice": "bob"}
    )
    assert json.loads(problem["error"])["code"] == "unknown_voice"
    models = await worker.answer(ModelsRequest(), worker.engine)
    assert [model.id for model in models.data] == ["tiny-random/xtts"]


# ---- model files ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the model, to be changed."""
    return Path(shutil.copytree(local_env("xtts")["MODEL_NAME"], tmp_path / "model"))


@engine
async def test_an_original_checkpoint_in_a_folder_that_cannot_be_written(
    worker: ModuleType, folder: Path
) -> None:
    """XTTS's own holds pickled settings by the names that their classes had then."""
    import torch
    from TTS.tts.configs import xtts_config as now
    from TTS.tts.models import xtts as then

    weights = torch.load(folder / "model.pth", weights_only=True)
    moved = [now.XttsArgs, now.XttsAudioConfig]
    for kind in moved:
        kind.__module__ = then.__name__
    try:
        torch.save({**weights, "config": now.XttsConfig()}, folder / "model.pth")
    finally:
        for kind in moved:
            kind.__module__ = now.__name__
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()}
    folder.chmod(0o555)
    try:
        loaded(worker, MODEL_NAME=str(folder)).speaker.close()
    finally:
        folder.chmod(0o755)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir()} == before


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (exec, (f"open({self.path!r}, 'w').close()",))


@engine
@pytest.mark.parametrize("name", ["model.pth", "speakers_xtts.pth"])
def test_no_code_of_a_checkpoint_is_run(worker: ModuleType, folder: Path, tmp_path: Path, name: str) -> None:
    import torch

    torch.save({"model": Evil(tmp_path / "ran")}, folder / name)
    with pytest.raises(pickle.UnpicklingError):
        loaded(worker, MODEL_NAME=str(folder))
    assert not (tmp_path / "ran").exists()


@engine
def test_folders_that_are_no_xtts(worker: ModuleType, folder: Path) -> None:
    with pytest.raises(StartError, match=r"DEFAULT_SPEAKER='Bob'.*Ana Florence"):
        loaded(worker, MODEL_NAME=str(folder), DEFAULT_SPEAKER="Bob")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model": "vits"}))
    with pytest.raises(StartError, match="is a vits model") as caught:
        loaded(worker, MODEL_NAME=str(folder))
    assert caught.value.code == "unsupported_architecture"
    (folder / "vocab.json").unlink()
    with pytest.raises(StartError, match=r"has no vocab\.json"):
        loaded(worker, MODEL_NAME=str(folder))


@engine
async def test_without_built_in_voices_and_in_bfloat16(worker: ModuleType, folder: Path) -> None:
    (folder / "speakers_xtts.pth").unlink()
    found = loaded(worker, MODEL_NAME=str(folder), DTYPE="bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "engine", found)
        assert (await error(worker, text="Hello."))["code"] == "unknown_voice"
        assert (await send(worker, voices=True))["default"] is None
        answer = await say(worker, speaker_wav=wav(recording()))
        assert heard(answer).any()
    found.speaker.close()
    with pytest.raises(RuntimeError, match="closed"):
        await found.speaker.call(lambda: None)


# ---- under the local platform --------------------------------------------------------------------------


def post(platform: Platform, value: dict[str, Any], **extra: Any) -> dict[str, Any]:
    answer = requests.post(
        f"{platform.endpoint_url}/runsync?wait=300000", json={"input": value, **extra},
        headers={"Authorization": "Bearer local"}, timeout=320,
    )  # fmt: skip
    answer.raise_for_status()
    return answer.json()  # type: ignore[no-any-return]


def output(answer: dict[str, Any]) -> Any:
    assert answer["status"] == "COMPLETED", answer.get("error")
    return answer["output"]


def problem_of(answer: dict[str, Any]) -> dict[str, Any]:
    assert answer["status"] == "FAILED", answer["status"]
    return json.loads(answer["error"])  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def plain() -> Iterator[Platform]:
    env = {**local_env("xtts"), "MAX_RESULT_MB": "0.1"}
    with running("xtts", env=env, ready_timeout=300) as platform:
        yield platform


@pytest.fixture(scope="module")
def streaming() -> Iterator[Platform]:
    env = {**local_env("xtts"), "STREAMING": "true", "PREWARM": "false"}
    with running("xtts", env=env, ready_timeout=300) as platform:
        yield platform


@engine
def test_the_example_runs(plain: Platform) -> None:
    example = json.loads(Path(load_handler("xtts").__file__).with_name("test_input.json").read_text())
    answer = output(post(plain, {**example["input"], "response_format": "mp3"}))
    assert len(heard(answer)) / RATE == pytest.approx(answer["duration"], abs=0.3)


@engine
def test_a_voice_is_never_anothers(plain: Platform) -> None:
    """Twelve jobs at once with four voices: each sounds as it does alone."""
    voices: list[dict[str, Any]] = [{"speaker_wav": wav(recording(pitch=pitch))} for pitch in (110, 220, 330)]
    voices.append({"speaker": SPEAKERS[0]})
    asked = [{"text": "Who am I?", "seed": 5, **voice} for voice in voices]
    with ThreadPoolExecutor(12) as threads:
        # At first nobody's voice is known; afterwards they are all there to be mixed up.
        answers = list(threads.map(lambda it: heard(output(post(plain, it))), asked * 3))
    alone = [heard(output(post(plain, it))) for it in asked]
    for one, other in itertools.combinations(alone, 2):
        assert not alike(one, other)
    for number, samples in enumerate(answers):
        assert alike(samples, alone[number % 4]), number


@engine
def test_bad_jobs_and_the_next_one(plain: Platform) -> None:
    for value, param in [
        ({"language": "en"}, "text"), ({"text": "👋"}, "text"), ({"text": "a", "stream": True}, "stream"),
        ({"text": "a", "speaker": "Bob"}, "speaker"),
        ({"text": "a", "speaker_wav": wav(recording(0.1))}, "speaker_wav"),
    ]:  # fmt: skip
        problem = problem_of(post(plain, value))
        assert problem["param"] == param
    assert "STREAMING=true" in problem_of(post(plain, {"text": "a", "stream": True}))["message"]
    assert output(post(plain, {"text": "Hello."}))["duration"] > 0


@engine
def test_a_large_answer_goes_to_the_bucket(plain: Platform) -> None:
    """moto's server speaks S3; the limit is lowered to 0.1 MB."""
    from moto.server import ThreadedMotoServer

    text = "A sentence. " * 12
    problem = problem_of(post(plain, {"text": text, "seed": 1}))
    assert problem["code"] == "result_too_large"
    assert "mp3 or opus" in problem["message"]
    assert "BUCKET_ENDPOINT_URL" in problem["message"]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        keys = {"aws_access_key_id": "id", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        bucket = boto3.client("s3", endpoint_url=address, **keys)
        bucket.create_bucket(Bucket="speech")
        where = {"endpointUrl": address, "accessId": "id", "accessSecret": "secret", "bucketName": "speech"}
        answer = output(post(plain, {"text": text, "seed": 1}, s3Config=where))
        assert set(answer) == {"url", "bytes"}
        (stored,) = bucket.list_objects_v2(Bucket="speech")["Contents"]
        assert stored["Size"] == answer["bytes"] > 100_000
        whole = json.loads(bucket.get_object(Bucket="speech", Key=stored["Key"])["Body"].read())
        assert requests.get(answer["url"], timeout=60).json() == whole
        small = output(post(plain, {"text": text, "seed": 1, "response_format": "opus"}))
    finally:
        server.stop()
    assert len(heard(whole)) / RATE == pytest.approx(whole["duration"], abs=1e-3)
    assert small["duration"] == whole["duration"]


@engine
def test_the_official_client(plain: Platform) -> None:
    with openai.OpenAI(base_url=plain.openai_url, api_key="local", max_retries=0) as client:
        assert [model.id for model in client.models.list().data] == ["tiny-random/xtts"]
        for kind in ("mp3", "wav"):
            reply = client.audio.speech.create(
                model="tiny-random/xtts", voice="alloy", input="Bonjour.", response_format=kind,  # type: ignore[arg-type]
                extra_body={"language": "fr", "seed": 3},
            )  # fmt: skip
            answer = json.loads(reply.content)
            assert (answer["format"], answer["language"]) == (kind, "fr")
            assert heard(answer).any()
        refused = client.audio.speech.create(model="tiny-random/xtts", voice="bob", input="Hello.")
        assert "unknown_voice" in refused.text


def streamed(platform: Platform, value: dict[str, Any]) -> list[Any]:
    headers = {"Authorization": "Bearer local"}
    job = requests.post(
        f"{platform.endpoint_url}/run", json={"input": value}, headers=headers, timeout=60
    ).json()
    parts: list[Any] = []
    while True:
        found = requests.get(
            f"{platform.endpoint_url}/stream/{job['id']}", headers=headers, timeout=120
        ).json()
        parts += [item["output"] for item in found["stream"]]
        if found["status"] in ("COMPLETED", "FAILED") and not found["stream"]:
            return parts


@engine
@pytest.mark.parametrize("kind", ["pcm", "wav", "mp3"])
def test_a_stream_is_the_same_speech_in_chunks(streaming: Platform, kind: str) -> None:
    value = {
        "text": "One sentence. And another one, which is longer!\nA third.",
        "seed": 11,
        "response_format": kind,
    }
    *chunks, end = streamed(streaming, {**value, "stream": True})
    assert [chunk["index"] for chunk in chunks] == list(range(len(chunks)))
    assert len(chunks) >= 3
    sounds = [heard(chunk) for chunk in chunks]  # each is a file of its own
    assert end["audio"] == ""
    assert end["duration"] > 0
    (whole,) = output(post(streaming, value))
    assert end["duration"] == whole["duration"]
    assert end["finish_reason"] == whole["finish_reason"]
    if kind != "mp3":
        assert alike(np.concatenate(sounds), heard(whole))


@engine
def test_a_stream_at_another_rate(streaming: Platform) -> None:
    value = {"text": "One sentence. And another.", "seed": 2, "response_format": "pcm", "sample_rate": 8000}
    *chunks, end = streamed(streaming, {**value, "stream": True})
    (whole,) = output(post(streaming, value))
    assert alike(np.concatenate([heard(chunk) for chunk in chunks]), heard(whole))
    assert end["duration"] == whole["duration"]


@engine
def test_what_a_streaming_worker_refuses(streaming: Platform) -> None:
    problem = problem_of(post(streaming, {"text": "", "stream": True}))
    assert problem["code"] == "nothing_to_say"
    (listed,) = output(post(streaming, {"voices": True}))
    assert listed["voices"] == list(SPEAKERS)


def test_encoding_is_shareds() -> None:
    """The prewarm request's own recording is one that the worker takes."""
    module = load_handler("xtts")
    noise = np.random.default_rng(0).normal(0, 0.1, 6 * module.REFERENCE_RATE).astype(np.float32)
    data = base64.b64decode(encode_audio(noise, module.REFERENCE_RATE))
    assert len(module.read_reference(data, "speaker_wav")) > 5 * module.REFERENCE_RATE
