"""Requests as conversations, and conversations as the model's inputs."""

from __future__ import annotations

import asyncio
import base64
import gc
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from transformers import AutoProcessor

from serving.openai_chat import ChatCompletionRequest
from shared.errors import JobError
from shared.requests import validate
from tests.helpers import error, least_stall, send
from tests.workers.llava.in_process import (
    WHAT,
    answer_to,
    encoded,
    image_part,
    png,
    question,
    text_part,
)
from tools.models import local_env
from tools.workers import load_module

pytestmark = pytest.mark.engine
schemas = load_module("llava", "schemas")
prompts = load_module("llava", "prompts")


def native(**payload: Any) -> Any:
    return prompts.read_conversation(validate(schemas.LlavaRequest, payload))


def chat(*messages: dict[str, Any], **payload: Any) -> Any:
    return prompts.read_conversation(validate(ChatCompletionRequest, {"messages": list(messages), **payload}))


# ---- requests ------------------------------------------------------------------------------------------


def test_all_forms_of_a_request_give_the_same_conversation() -> None:
    (message,) = native(image="abc", prompt="Why?").messages
    assert message == ("user", [prompts.ImageSource("abc", "image"), "Why?"])
    full = native(images=["a", "b"], system="Be brief.")
    second = {"type": "image_url", "image_url": {"url": "b", "detail": "low"}}
    content = [{"type": "image_url", "image_url": "a"}, second, text_part(schemas.DEFAULT_PROMPT)]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": content}]
    same = chat(*messages, user="me", n=1, tools=[])
    assert native(messages=messages) == same
    assert (full.param, same.param) == ("prompt", "messages")
    assert [image.param for image in full.images] == ["images.0", "images.1"]
    params = [f"messages.1.content.{number}.image_url.url" for number in (0, 1)]
    assert [image.param for image in same.images] == params
    for (role, parts), (same_role, same_parts) in zip(full.messages, same.messages, strict=True):
        assert role == same_role
        assert [getattr(p, "source", p) for p in parts] == [getattr(p, "source", p) for p in same_parts]
    assert native(messages=[{"role": "user", "content": "hello"}]).messages == [("user", ["hello"])]


@pytest.mark.parametrize(
    ("payload", "param", "code"),
    [
        ({}, "image", "missing_field"),
        ({"image": "a", "images": ["b"]}, "images", "invalid_value"),
        ({"messages": [], "stream": True}, "messages", "invalid_value"),
        ({"messages": question("red"), "prompt": "Why?"}, "prompt", "invalid_value"),
        ({"messages": question("red"), "image": "a"}, "image", "invalid_value"),
        ({"image": "a", "max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"image": "a", "stop": [""]}, "stop.0", "invalid_value"),
        ({"image": 5}, "image", "invalid_value"),
        ({"image": "a", "max_token": 5}, "max_token", "unknown_field"),
        ({"images": ["a"] * 33}, "images", "invalid_value"),
        ({"messages": [{"role": "user", "content": [image_part("a")] * 33}]}, "messages", "too_many_images"),
        ({"messages": [{"role": "cook", "content": "hi"}]}, "messages.0.role", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0", "invalid_value",
        ),
        (
            {"messages": [{"role": "assistant", "content": [image_part("a")]}]},
            "messages.0.content.0", "invalid_value",
        ),
    ],
)  # fmt: skip
def test_invalid_fields_are_refused_by_name(payload: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(JobError) as caught:
        native(**payload)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert param in caught.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 2), ("logprobs", True), ("tools", [{"type": "function"}]), ("top_logprobs", 2),
     ("response_format", {"type": "json_object"}), ("guided_regex", "a+")],
)  # fmt: skip
def test_openai_fields_without_a_meaning_here_are_refused(field: str, value: Any) -> None:
    with pytest.raises(JobError) as caught:
        chat({"role": "user", "content": "hi"}, **{field: value})
    assert (caught.value.param, caught.value.code) == (field, "unsupported")


# ---- images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 3), (3000, 2000)])
async def test_images_of_odd_sizes(worker: ModuleType, size: tuple[int, int]) -> None:
    assert (await send(worker.handler, image=png("red", size)))["response"] == answer_to("red")


async def test_transparency_is_white(worker: ModuleType) -> None:
    """As `load_image` makes it: tests/serving/test_image.py has its other formats."""
    image = png((255, 0, 0, 0), mode="RGBA")
    assert (await send(worker.handler, image=image))["response"] == answer_to("white")


@pytest.mark.parametrize(
    ("image", "code"),
    [
        ("no base64!", "bad_base64"),
        (base64.b64encode(b"%PDF-1.7 named picture.png").decode(), "bad_image"),
        ("file:///etc/passwd", "bad_url"),
    ],
)
async def test_unreadable_images_fail_their_own_job(worker: ModuleType, image: str, code: str) -> None:
    """Alone, in a list and in a conversation, beside a job that is answered."""
    good, *problems = await asyncio.gather(
        send(worker.handler, image=png("red"), prompt=WHAT),
        error(worker.handler, image=image),
        error(worker.handler, images=[png("red"), image]),
        error(worker.handler, messages=[{"role": "user", "content": [image_part(image)]}]),
    )
    assert good["response"] == answer_to("red")
    params = ["image", "images.1", "messages.0.content.0.image_url.url"]
    assert [(problem["param"], problem["code"]) for problem in problems] == [
        (param, code) for param in params
    ]
    assert "root:" not in str(problems)


async def test_any_number_of_images(worker: ModuleType) -> None:
    async def prompt_tokens(**payload: Any) -> int:
        return int((await send(worker.handler, max_tokens=1, **payload))["usage"]["prompt_tokens"])

    one = await prompt_tokens(image=png("red"))
    # An image is nine tokens here, and its line feed one.
    assert await prompt_tokens(images=[png("red")] * 20) == one + 19 * 10
    assert await prompt_tokens(prompt=WHAT) < one
    system, reply = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "a red car"}
    messages = [system, *question("red"), reply, *question("blue")]
    swapped = [system, *question("blue"), reply, *question("red")]
    assert await prompt_tokens(messages=messages) > 2 * one
    answers = [
        (await send(worker.handler, messages=order, max_tokens=40))["response"]
        for order in (messages, swapped)
    ]
    assert answers[0] != answers[1], "each image stays in its message"


async def test_a_large_image_leaves_the_event_loop_free(worker: ModuleType) -> None:
    """8 MB of base64."""
    gc.freeze()  # as a worker does when it is ready
    image = encoded(Image.effect_noise((2500, 2500), 90))

    async def ask() -> None:
        answer = await send(worker.handler, image=image, max_tokens=2)
        assert answer["usage"]["completion_tokens"] == 2

    assert await least_stall(ask) < 0.1


# ---- texts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        {"image": png("red"), "prompt": "What is <image>?"},
        {"prompt": "<image>"},
        {"image": png("red"), "system": "<image>"},
        {"messages": [{"role": "assistant", "content": "<image>"}, *question("red")]},
    ],
    ids=["prompt", "alone", "system", "messages"],
)
async def test_the_image_token_is_reserved(worker: ModuleType, payload: dict[str, Any]) -> None:
    problem = await error(worker.handler, **payload)
    assert problem["code"] == "reserved_text"
    assert "'<image>'" in problem["message"]
    prompt = "</image> < image > <img>"
    assert (await send(worker.handler, image=png("red"), prompt=prompt, max_tokens=1))["usage"]


@pytest.fixture
def processor() -> Any:
    return AutoProcessor.from_pretrained(local_env("llava")["MODEL_NAME"])


async def encode(worker: ModuleType, processor: Any, **payload: Any) -> str:
    """The prompt as the model gets it."""
    reader = prompts.PromptReader(worker.engine.generator, processor)
    inputs, _ = await reader.read(validate(schemas.LlavaRequest, payload))
    return str(processor.decode(inputs["input_ids"][0]))


async def test_a_template_that_refuses(worker: ModuleType, processor: Any) -> None:
    processor.chat_template = "{{ raise_exception('Roles must alternate.') }}"
    with pytest.raises(JobError) as caught:
        await encode(worker, processor, prompt="hi")
    assert (caught.value.param, caught.value.code) == ("prompt", "bad_prompt")
    assert "Roles must alternate." in caught.value.message


async def test_a_template_that_takes_parts_from_users_only(worker: ModuleType, processor: Any) -> None:
    """As Pixtral's does; LLaVA's own takes nothing but parts."""
    messages = [
        {"role": "system", "content": "Be brief."},
        *question("red", "What?"),
        {"role": "assistant", "content": [text_part("A "), text_part("car.")]},
        {"role": "user", "content": "Why?"},
    ]
    assert prompts.template_takes_parts(processor)
    assert "Be brief. USER: <image>" in await encode(worker, processor, messages=messages)
    processor.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else '[' + part['text'] + ']' }}{% endfor %}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + '</s>' }}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    assert not prompts.template_takes_parts(processor)
    text = await encode(worker, processor, messages=messages)
    assert text == f"<s>Be brief.{'<image>' * 9}[What?]A car.</s>[Why?]"


@pytest.mark.parametrize(
    ("payload", "param", "numbers"),
    [
        ({"prompt": "\u00e9" * 3000}, "prompt", ["6016 tokens", "4096"]),
        ({"prompt": WHAT, "max_tokens": 4074}, "max_tokens", ["23", "4097", "4096", "4073"]),
    ],
)
async def test_prompts_that_are_too_long(
    worker: ModuleType, payload: dict[str, Any], param: str, numbers: list[str]
) -> None:
    """The tiny model takes 4096 tokens; a letter is one."""
    problem = await error(worker.handler, image=png("red"), **payload)
    assert (problem["param"], problem["code"]) == (param, "too_long")
    assert all(number in problem["message"] for number in numbers)
