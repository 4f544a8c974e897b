"""The llava worker with a tiny LLaVA of the real classes, which knows what to say about four colours."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest
import requests

from local import Platform, running
from shared import jobs
from shared.errors import JobError, StartError
from shared.openai_api import ChatCompletionRequest
from tools.models import local_env
from tools.models.tiny_llava import ANSWERS, ENDLESS, QUESTIONS
from tools.workers import load_handler

WHAT, DESCRIBE = QUESTIONS
engine = pytest.mark.engine


def png(colour: Any, size: tuple[int, int] = (64, 48), mode: str = "RGB", **save: Any) -> str:
    from PIL import Image

    return encoded(Image.new(mode, size, colour), **save)


def encoded(image: Any, **save: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **save})
    return base64.b64encode(buffer.getvalue()).decode()


def data_uri(colour: str) -> str:
    return f"data:image/png;base64,{png(colour)}"


def part(colour: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(colour)}}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def talk(colour: str, question: str = WHAT) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part(colour), text(question)]}]


def said(colour: str) -> str:
    """What the model says about a picture of one colour, as it says it."""
    return " " + ANSWERS[colour]


# ---- requests, without a model -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava() -> ModuleType:
    return load_handler("llava")


def native(llava: ModuleType, **payload: Any) -> Any:
    return llava.read_chat(jobs.validate(llava.LlavaRequest, payload))


def chat(llava: ModuleType, *messages: dict[str, Any], **payload: Any) -> Any:
    return llava.read_chat(jobs.validate(ChatCompletionRequest, {"messages": list(messages), **payload}))


def test_both_forms_of_a_request_mean_the_same(llava: ModuleType) -> None:
    picture = llava.Picture("abc", "image")
    reference = native(llava, image="abc", prompt="Why?", max_tokens=9)
    assert reference.turns == [("user", [picture, "Why?"])]
    assert (reference.max_tokens, reference.temperature, reference.top_p) == (9, 0, 1)
    full = native(
        llava, images=["a", "b"], system="Be brief.", temperature=1, top_p=0.5, seed=3, stop=".", max_tokens=7
    )
    same = chat(
        llava,
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "image_url", "image_url": "a"},
            {"type": "image_url", "image_url": {"url": "b", "detail": "low"}},
            text(llava.DEFAULT_PROMPT),
        ]},
        temperature=1, top_p=0.5, seed=3, stop=["."], max_completion_tokens=7, user="me", n=1, tools=[],
    )  # fmt: skip
    assert [picture.param for picture in full.pictures] == ["images.0", "images.1"]
    assert [picture.param for picture in same.pictures] == [
        "messages.1.content.0.image_url.url", "messages.1.content.1.image_url.url",
    ]  # fmt: skip
    for mine, theirs in zip(full.turns, same.turns, strict=True):
        assert mine[0] == theirs[0]
        assert [getattr(it, "source", it) for it in mine[1]] == [
            getattr(it, "source", it) for it in theirs[1]
        ]
    for name in ("max_tokens", "temperature", "top_p", "seed", "stop"):
        assert list(getattr(full, name) if name == "stop" else [getattr(full, name)]) == list(
            getattr(same, name) if name == "stop" else [getattr(same, name)]
        ), name
    within = native(llava, messages=[{"role": "user", "content": "hello"}])
    assert within.turns == [("user", ["hello"])]


@pytest.mark.parametrize(
    ("payload", "param", "code"),
    [
        ({}, "image", "missing_field"),
        ({"image": "a", "images": ["b"]}, "images", "invalid_value"),
        ({"messages": [], "stream": True}, "messages", "invalid_value"),
        ({"messages": talk("red"), "prompt": "Why?"}, "prompt", "invalid_value"),
        ({"messages": talk("red"), "image": "a"}, "image", "invalid_value"),
        ({"image": "a", "max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"image": "a", "temperature": 2.1}, "temperature", "invalid_value"),
        ({"image": "a", "top_p": 0}, "top_p", "invalid_value"),
        ({"image": "a", "stop": list("abcde")}, "stop", "invalid_value"),
        ({"image": "a", "stop": [""]}, "stop.0", "invalid_value"),
        ({"image": 5}, "image", "invalid_value"),
        ({"image": "a", "max_token": 5}, "max_token", "unknown_field"),
        ({"images": ["a"] * 33}, "images", "invalid_value"),
        ({"messages": [{"role": "user", "content": [part("red")] * 33}]}, "messages", "too_many_images"),
        ({"messages": [{"role": "cook", "content": "hi"}]}, "messages.0.role", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "assistant", "content": [part("red")]}]},
            "messages.0.content.0",
            "invalid_value",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    llava: ModuleType, payload: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(JobError) as caught:
        native(llava, **payload)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert param in caught.value.message


def test_what_openai_has_and_this_worker_has_not_is_refused(llava: ModuleType) -> None:
    message = {"role": "user", "content": "hi"}
    for name, value in {
        "n": 2, "logprobs": True, "tools": [{"type": "function"}], "response_format": {"type": "json_object"},
        "frequency_penalty": 0.5, "logit_bias": {"5": 1},
    }.items():  # fmt: skip
        with pytest.raises(JobError) as caught:
            chat(llava, message, **{name: value})
        assert (caught.value.param, caught.value.code) == (name, "unsupported")
    for name, value in {"n": 1, "logprobs": None, "tools": [], "metadata": {"a": "b"}, "store": True}.items():
        assert chat(llava, message, **{name: value}).turns


# ---- the worker in this process ------------------------------------------------------------------------


def prepared(**env: str) -> tuple[ModuleType, Any]:
    """The handler's module as `prepare()` leaves it, and the configuration for the SDK."""
    module = load_handler("llava")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**local_env("llava"), **env}.items():
            patch.setenv(name, value)
        return module, module.prepare()


@pytest.fixture(scope="module")
def worker() -> Iterator[ModuleType]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are much slower on two
    module, config = prepared()
    assert config["handler"] is module.handler
    yield module
    module.engine.generator.close()
    torch.set_num_threads(threads)


async def parts(worker: ModuleType, **payload: Any) -> list[Any]:
    return [piece async for piece in worker.handler({"id": "job-1", "input": payload})]


async def send(worker: ModuleType, **payload: Any) -> Any:
    (answer,) = await parts(worker, **payload)
    return answer


async def error(worker: ModuleType, **payload: Any) -> Any:
    result = json.loads((await send(worker, **payload))["error"])
    after = await send(worker, image=png("white"), prompt=WHAT)
    assert after["response"] == said("white"), "the worker goes on"
    return result


def live(worker: ModuleType) -> int:
    """How many answers are being made."""
    batch = worker.engine.generator._live
    return len(batch.rows) if batch else 0


async def until(condition: Callable[[], bool]) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < 30
        await asyncio.sleep(0.005)


@pytest.fixture
def slow(worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token takes 30 ms, so that an answer of 3000 takes a minute and a half on any machine."""
    generator = worker.engine.generator
    step = generator._step
    monkeypatch.setattr(generator, "_step", lambda batch: (time.sleep(0.03), step(batch)))


@engine
async def test_the_request_of_the_reference(worker: ModuleType) -> None:
    answer = await send(worker, image=png("red"), prompt=WHAT, max_tokens=64)
    assert answer == {
        "response": said("red"), "finish_reason": "stop", "model": "tiny/llava", "revision": None,
        "usage": {"prompt_tokens": 23, "completion_tokens": 9, "total_tokens": 32},
    }  # fmt: skip
    assert json.loads(json.dumps(answer)) == answer
    for colour in ANSWERS:
        assert (await send(worker, image=data_uri(colour)))["response"] == said(colour)


@engine
async def test_the_answer_is_the_models_own(worker: ModuleType) -> None:
    """Token for token what generate gives the same prompt, written as the reference does."""
    from PIL import Image

    processor, model = worker.engine.processor, worker.engine.generator.model
    for colour, question in (("red", WHAT), ("navy", "Tell me a story"), ("lime", "x" * 300)):
        content = [{"type": "image"}, text(question)]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = processor(text=prompt, images=Image.new("RGB", (64, 48), colour), return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        wanted = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answer = await send(worker, image=png(colour), prompt=question, max_tokens=40)
        assert answer["response"] == wanted
        assert answer["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]


@engine
@pytest.mark.parametrize("joins", [True, False])
async def test_jobs_at_the_same_time_get_their_own_answers(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch, joins: bool
) -> None:
    """Mixed in colour, question, number of pictures, sampling, length and form; each as it is alone."""
    assert worker.engine.generator._joins
    monkeypatch.setattr(worker.engine.generator, "_joins", joins)
    asked: list[dict[str, Any]] = []
    for number in range(24):
        colour = list(ANSWERS)[number % 4]
        asked.append(
            [
                {"image": png(colour), "prompt": WHAT},
                {"messages": talk(colour, DESCRIBE), "stream": True},
                {"images": [png(colour), png("red")], "prompt": "Both? " * number, "max_tokens": 20},
                {"prompt": f"No picture {number}", "max_tokens": 10 + number},
                {"image": png(colour), "temperature": 1.5, "seed": number, "max_tokens": 30},
                {"openai_route": "/v1/chat/completions", "openai_input": {"messages": talk(colour)}},
            ][number % 6]
        )

    async def answer(payload: dict[str, Any]) -> Any:
        pieces = await parts(worker, **payload)
        for piece in pieces:
            piece.pop("created", None)
        whole = "".join(piece.get("response", "") for piece in pieces)
        return whole, pieces[-1]

    alone = [await answer(payload) for payload in asked]
    assert await asyncio.gather(*map(answer, asked)) == alone
    assert alone[0][0] == said("red")
    assert alone[1][0] == said("blue")


@engine
async def test_a_stream_is_the_plain_answer_in_pieces(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes while the first piece is on its way is joined; here all but four tokens wait for it."""
    generator, came = worker.engine.generator, threading.Event()
    step = generator._step

    def held(batch: Any) -> None:
        assert len(batch.rows[0].tokens) < 4 or came.wait(60)
        step(batch)

    for colour in ANSWERS:
        plain = await send(worker, image=png(colour), prompt=WHAT)
        came.clear()
        with monkeypatch.context() as patch:
            patch.setattr(generator, "_step", held)
            pieces = []
            job = {"id": "job-1", "input": {"image": png(colour), "prompt": WHAT, "stream": True}}
            async for piece in worker.handler(job):
                came.set()
                pieces.append(piece)
        end = pieces.pop()
        assert "".join(piece["response"] for piece in pieces) == plain["response"] == said(colour)
        assert all(set(piece) == {"response"} and piece["response"] for piece in pieces)
        assert end == {**plain, "response": ""}
        assert len(pieces) > 1
        assert "\ufffd" not in str(pieces), "no piece ends within a character"


@engine
async def test_stop_strings(worker: ModuleType) -> None:
    """`, ` comes three times in this answer: it is cut before the first, and no part of it goes out."""
    whole = said("blue")
    for stop, cut in (
        (",", " the sea"), (["boat", "deep and"], " the sea, "), ("with a b", " the sea, deep and blue, "),
        (" the", ""), ("no such text", whole), (["blue, with a boat!"], whole),
    ):  # fmt: skip
        answer = await send(worker, image=png("blue"), prompt=WHAT, stop=stop)
        assert (answer["response"], answer["finish_reason"]) == (cut, "stop")
        *pieces, end = await parts(worker, image=png("blue"), prompt=WHAT, stop=stop, stream=True)
        assert "".join(piece["response"] for piece in pieces) == cut
        assert end == {**answer, "response": ""}
    short = await send(worker, image=png("blue"), prompt=WHAT, max_tokens=5)
    assert short["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 5
    assert whole.startswith(short["response"])


@engine
async def test_seeds(worker: ModuleType) -> None:
    async def answer(**settings: Any) -> str:
        payload = {"image": png("red"), "prompt": WHAT, "temperature": 2.0, "max_tokens": 40, **settings}
        return str((await send(worker, **payload))["response"])

    crowd = [asyncio.create_task(answer(seed=number)) for number in range(10)]
    beside = await answer(seed=3)
    answers = await asyncio.gather(*crowd)
    assert await answer(seed=3) == beside == answers[3]
    assert len(set(answers)) > 5
    assert await answer(temperature=0.0) == said("red")
    assert await answer(top_p=0.01) == said("red")


# ---- pictures ------------------------------------------------------------------------------------------


def pictures() -> dict[str, str]:
    """Red pictures of many kinds."""
    from PIL import Image

    red = Image.new("RGB", (64, 48), "red")
    tagged = Image.new("RGB", (48, 64), "red")
    exif = tagged.getexif()
    exif[0x0112] = 6  # turned by a quarter
    frames = [red, Image.new("RGB", (64, 48), "blue")]
    return {
        "jpeg": encoded(red, format="JPEG", quality=95),
        "webp": encoded(red, format="WEBP", lossless=True),
        "bmp": encoded(red, format="BMP"),
        "opaque rgba": encoded(red.convert("RGBA")),
        "palette": encoded(red.convert("P", palette=Image.Palette.ADAPTIVE)),
        "cmyk": encoded(red.convert("CMYK"), format="TIFF"),
        "exif": encoded(tagged, format="JPEG", quality=95, exif=exif),
        "animated": encoded(frames[0], format="GIF", save_all=True, append_images=frames[1:]),
        "1 x 1": png("red", (1, 1)),
        "1 x 300": png("red", (1, 300)),
        "300 x 3": png("red", (300, 3)),
        "large": png("red", (3000, 2000)),
        "url-safe base64": png("red").replace("+", "-").replace("/", "_"),
    }


@engine
@pytest.mark.parametrize("name", pictures())
async def test_kinds_of_pictures(worker: ModuleType, name: str) -> None:
    assert (await send(worker, image=pictures()[name], prompt=WHAT))["response"] == said("red")


@engine
async def test_pictures_without_colours_or_opacity(worker: ModuleType) -> None:
    from PIL import Image

    white = {
        "transparent": png((255, 0, 0, 0), mode="RGBA"),
        "grey": png(255, mode="L"),
        "1 bit": png(1, mode="1"),
        "16 bit": encoded(Image.new("I;16", (64, 48), 65535)),
    }
    for name, image in white.items():
        assert (await send(worker, image=image, prompt=WHAT))["response"] == said("white"), name


@engine
@pytest.mark.parametrize(
    ("image", "code"),
    [
        ("", "empty"),
        ("no base64!", "bad_base64"),
        (base64.b64encode(b"%PDF-1.7 named picture.png").decode(), "bad_image"),
        (png("red", (500, 500))[:200], "bad_image"),
        ("data:image/png;base64", "bad_url"),
        ("file:///etc/passwd", "bad_url"),
        ("/etc/passwd", "bad_image"),
        ("http://127.0.0.1:9/picture.png", "download_failed"),
    ],
)
async def test_pictures_that_are_none(worker: ModuleType, image: str, code: str) -> None:
    """Alone, in a list and in a conversation; those that run beside them are answered."""
    good, *bad = await asyncio.gather(
        send(worker, image=png("red"), prompt=WHAT),
        error(worker, image=image),
        error(worker, images=[png("red"), image]),
        error(
            worker,
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}]}],
        ),
    )
    assert good["response"] == said("red")
    params = ["image", "images.1", "messages.0.content.0.image_url.url"]
    assert [(it["param"], it["code"]) for it in bad] == [(param, code) for param in params]
    assert "root:" not in str(bad)


@engine
async def test_many_pictures_and_none(worker: ModuleType) -> None:
    one = await send(worker, image=png("red"), max_tokens=1)
    twenty = await send(worker, images=[png("red")] * 20, max_tokens=1)
    # A picture is nine tokens here, and its line feed one.
    assert twenty["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"] + 19 * 10
    none = await send(worker, prompt=WHAT, max_tokens=3)
    assert none["usage"]["completion_tokens"] == 3
    turns = [
        {"role": "system", "content": "Be brief."},
        *talk("red"),
        {"role": "assistant", "content": "a red car"},
        *talk("blue"),
    ]
    later = await send(worker, messages=turns, max_tokens=40)
    assert later["usage"]["prompt_tokens"] > 2 * one["usage"]["prompt_tokens"]
    swapped = await send(worker, messages=[turns[0], *talk("blue"), turns[2], *talk("red")], max_tokens=40)
    assert swapped["response"] != later["response"], "each picture has its own place"


@engine
async def test_the_mark_of_a_picture_in_a_text(worker: ModuleType) -> None:
    for payload in (
        {"image": png("red"), "prompt": "What is <image>?"},
        {"prompt": "<image>"},
        {"image": png("red"), "system": "<image>"},
        {"messages": [{"role": "assistant", "content": "<image>"}, *talk("red")]},
    ):
        problem = await error(worker, **payload)
        assert problem["code"] == "reserved_text"
        assert "'<image>'" in problem["message"]
    assert (await send(worker, image=png("red"), prompt="</image> < image > <img>", max_tokens=1))["usage"]


@engine
async def test_a_template_that_refuses(worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ raise_exception('Roles must alternate.') }}"
    monkeypatch.setattr(worker.engine.processor, "chat_template", template)
    result = json.loads((await send(worker, prompt="hi"))["error"])
    assert (result["param"], result["code"]) == ("prompt", "bad_prompt")
    assert "Roles must alternate." in result["message"]


@engine
async def test_a_template_that_takes_lists_from_users_only(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Pixtral's does; LLaVA's own takes nothing but lists."""
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else '[' + part['text'] + ']' }}{% endfor %}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + '</s>' }}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    processor = worker.engine.processor
    assert worker.engine.lists
    assert worker.takes_lists(processor)
    chat = native(worker, messages=[
        {"role": "system", "content": "Be brief."}, *talk("red", "What?"),
        {"role": "assistant", "content": [text("A "), text("car.")]}, {"role": "user", "content": "Why?"},
    ])  # fmt: skip
    own = await worker.engine.read(chat)
    assert "Be brief. USER: <image>" in processor.decode(own["input_ids"][0])
    monkeypatch.setattr(processor, "chat_template", template)
    assert not worker.takes_lists(processor)
    other = await replace(worker.engine, lists=False).read(chat)
    marks = "<image>" * 9
    assert processor.decode(other["input_ids"][0]) == f"<s>Be brief.{marks}[What?]A car.</s>[Why?]"


@engine
async def test_too_many_tokens(worker: ModuleType) -> None:
    """The tiny model takes 4096; a letter is a token here."""
    long = await error(worker, image=png("red"), prompt="\u00e9" * 3000)
    assert (long["param"], long["code"]) == ("prompt", "too_long")
    assert "6016 tokens" in long["message"]
    assert "4096" in long["message"]
    asked = await error(worker, image=png("red"), prompt=WHAT, max_tokens=4074)
    assert (asked["param"], asked["code"]) == ("max_tokens", "too_long")
    for number in ("23", "4097", "4096", "4073"):
        assert number in asked["message"]


# ---- the life of a job ---------------------------------------------------------------------------------


@engine
@pytest.mark.parametrize("stream", [True, False])
async def test_a_cancelled_job_frees_its_place(worker: ModuleType, slow: None, stream: bool) -> None:
    endless = asyncio.create_task(
        parts(worker, image=png("red"), prompt=ENDLESS, max_tokens=3000, stream=stream)
    )
    await until(lambda: live(worker) == 1)
    (row,) = worker.engine.generator._live.rows
    assert (await send(worker, image=png("blue"), prompt=WHAT))["response"] == said("blue")
    assert not endless.done(), "who comes later does not wait for it"
    endless.cancel()
    with suppress(asyncio.CancelledError):
        await endless
    await until(lambda: live(worker) == 0)
    assert row.left > 1000, "it was left in the first minute"


@engine
async def test_pictures_are_read_beside_the_model(
    worker: ModuleType, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one is being decoded, the model's answers go on."""
    decoding, go_on = threading.Event(), threading.Event()
    whole = worker.load_image

    def held(data: bytes, *, param: str) -> Any:
        decoding.set()
        assert go_on.wait(30)
        return whole(data, param=param)

    stream: AsyncIterator[Any] = worker.handler(
        {"id": "1", "input": {"image": png("red"), "prompt": ENDLESS, "max_tokens": 3000, "stream": True}}
    )
    await anext(stream)
    monkeypatch.setattr(worker, "load_image", held)
    waiting = asyncio.create_task(send(worker, image=png("blue"), prompt=WHAT))
    await until(decoding.is_set)
    for _ in range(5):
        assert (await anext(stream))["response"]
    assert not waiting.done()
    go_on.set()
    assert (await waiting)["response"] == said("blue")
    await stream.aclose()  # type: ignore[attr-defined]
    await until(lambda: live(worker) == 0)


@engine
async def test_a_thousand_jobs_leave_nothing_behind(worker: ModuleType) -> None:
    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    async def jobs(number: int) -> None:
        for _ in range(number // 25):
            await asyncio.gather(
                *(send(worker, image=png("red", (400, 400)), max_tokens=2, stop="x") for _ in range(25))
            )

    await jobs(200)
    before = resident()
    await jobs(1000)
    # A picture that stayed would be 0.5 MB, its tensor 10 kB; what allocators keep back is less than this.
    assert resident() - before < 25


@engine
async def test_the_openai_routes(worker: ModuleType) -> None:
    async def post(**body: Any) -> list[Any]:
        return await parts(worker, openai_route="/v1/chat/completions", openai_input=body)

    models = await send(worker, openai_route="/v1/models", openai_input=None)
    assert [model["id"] for model in models["data"]] == ["tiny/llava"]
    (plain,) = await post(model="tiny/llava", messages=talk("red"))
    assert plain["id"] == "chatcmpl-job-1"
    assert plain["choices"][0]["message"] == {"role": "assistant", "content": said("red")}
    events = "".join(await post(messages=talk("red"), stream=True, stream_options={"include_usage": True}))
    lines = events.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    *chunks, counted = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    deltas = [chunk["choices"][0] for chunk in chunks]
    assert deltas[0]["delta"]["role"] == "assistant"
    assert "".join(delta["delta"]["content"] or "" for delta in deltas) == said("red")
    assert [delta["finish_reason"] for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    assert counted["choices"] == []
    assert counted["usage"] == plain["usage"]
    (wrong,) = await post(model="gpt-4o", messages=talk("red"))
    assert json.loads(wrong["error"])["code"] == "model_not_found"


# ---- the start -----------------------------------------------------------------------------------------


@engine
async def test_without_streaming_the_answer_is_the_object_itself(worker: ModuleType) -> None:
    job = {"id": "1", "input": {"image": png("red"), "prompt": WHAT}}
    assert (await worker.plain_handler(job))["response"] == said("red")
    job["input"] = {**job["input"], "stream": True}  # type: ignore[dict-item]
    refused = json.loads((await worker.plain_handler(job))["error"])
    assert (refused["param"], refused["code"]) == ("stream", "unsupported")


@engine
async def test_settings_reach_the_engine(worker: ModuleType) -> None:
    before = worker.engine
    try:
        _, config = prepared(
            MAX_MODEL_LEN="60", MAX_BATCH_SIZE="1", MAX_BATCH_TOKENS="64", STREAMING="false", PREWARM="false"
        )
        assert config["handler"] is worker.plain_handler
        answers = await asyncio.gather(*(send(worker, image=png("red"), prompt=WHAT) for _ in range(3)))
        assert {answer["response"] for answer in answers} == {said("red")}
        problem = json.loads((await send(worker, image=png("red"), max_tokens=50))["error"])
        assert "60" in problem["message"]
    finally:
        worker.engine.generator.close()
        worker.engine = before


@engine
@pytest.mark.parametrize(
    ("change", "code"), [("no template", "no_chat_template"), ("text model", "unsupported_architecture")]
)
def test_models_that_cannot_serve_are_refused(
    change: str, code: str, tmp_path: Path, worker: ModuleType
) -> None:
    from shared.startup import classify

    folder = tmp_path / "model"
    source = Path(local_env("llava")["MODEL_NAME"])
    folder.mkdir()
    for file in source.iterdir():
        if change == "no template" and file.name == "chat_template.jinja":
            continue
        (folder / file.name).write_bytes(file.read_bytes())
    if change == "text model":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config["text_config"]))
    before = worker.engine
    try:
        with pytest.raises((StartError, ValueError)) as caught:
            prepared(MODEL_NAME=str(folder))
    finally:
        worker.engine = before
    cause = classify(caught.value)
    assert cause is not None
    assert cause.code == code


# ---- under the local platform, with the unmodified SDK -------------------------------------------------


# An answer of 4050 tokens takes two minutes, so that it is far from its end on any machine.
SLOW = """
import os, sys, time
sys.argv = ["handler.py"]
import shared.generation as generation
step = generation.Generator._step
def slow(self, batch):
    time.sleep(0.03 if any(row.sampling.max_tokens == 4050 for row in batch.rows) else 0)
    step(self, batch)
generation.Generator._step = slow
exec(compile(open(os.environ["REAL_HANDLER"]).read(), "handler.py", "exec"))
"""


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    script = tmp_path_factory.mktemp("slow") / "handler.py"
    script.write_text(SLOW)
    real = Path(__file__).parents[3] / "workers" / "llava" / "handler.py"
    # One thread, since tensors this small are much slower on two.
    env = {**local_env("llava"), "OMP_NUM_THREADS": "1", "MAX_BATCH_TOKENS": "4200"}
    with running(script, env={**env, "REAL_HANDLER": str(real)}) as platform:
        yield platform


def post(platform: Platform, path: str, **payload: Any) -> Any:
    headers = {"Authorization": "Bearer any"}
    return requests.post(f"{platform.endpoint_url}/{path}", json=payload, headers=headers, timeout=120).json()


def get(platform: Platform, path: str) -> Any:
    headers = {"Authorization": "Bearer any"}
    return requests.get(f"{platform.endpoint_url}/{path}", headers=headers, timeout=120).json()


@engine
def test_the_official_client_is_served(platform: Platform) -> None:
    with openai.OpenAI(base_url=platform.openai_url, api_key="any", max_retries=0) as client:
        name = client.models.list().data[0].id
        whole = client.chat.completions.create(model=name, messages=talk("lime"))  # type: ignore[arg-type]
        assert whole.choices[0].message.content == said("lime")
        assert whole.choices[0].finish_reason == "stop"
        pieces = client.chat.completions.create(
            model=name, messages=talk("lime"), stream=True, stream_options={"include_usage": True},  # type: ignore[arg-type]
        )  # fmt: skip
        text, usage = "", None
        for chunk in pieces:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
        assert text == said("lime")
        assert usage == whole.usage


@engine
def test_jobs_of_many_clients(platform: Platform) -> None:
    colours = [list(ANSWERS)[number % 4] for number in range(32)]
    names = [
        post(platform, "run", input={"image": png(colour), "prompt": WHAT, "stream": number % 2 == 1})["id"]
        for number, colour in enumerate(colours)
    ]
    for name, colour in zip(names, colours, strict=True):
        deadline = time.monotonic() + 60
        while (job := get(platform, f"status/{name}"))["status"] not in ("COMPLETED", "FAILED"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert "".join(piece["response"] for piece in job["output"]) == said(colour)
    failed = post(platform, "runsync", input={"image": "AAAA", "prompt": WHAT})
    assert failed["status"] == "FAILED"
    assert json.loads(failed["error"])["code"] == "bad_image"


@engine
def test_cancelling_a_job_frees_the_worker(platform: Platform) -> None:
    """The endless answer has the whole cache to itself, and would take two minutes."""
    endless = {"image": png("red"), "prompt": ENDLESS, "max_tokens": 4050, "stream": True}
    name = post(platform, "run", input=endless)["id"]
    begun = time.monotonic()
    while not get(platform, f"stream/{name}")["stream"]:
        assert time.monotonic() - begun < 60
    post(platform, f"cancel/{name}")
    begun = time.monotonic()
    answer = post(platform, "runsync", input={"image": png("red"), "prompt": WHAT, "max_tokens": 200})
    assert answer["output"][0]["response"] == said("red")
    assert time.monotonic() - begun < 40
    assert get(platform, f"status/{name}")["status"] == "CANCELLED"
