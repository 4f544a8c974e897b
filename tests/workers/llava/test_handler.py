"""The llava worker with a tiny LLaVA of the real classes, which has learnt answers about four colours."""

from __future__ import annotations

import asyncio
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shared.startup import classify
from tests.helpers import error, openai, send, sse_events, stream, until
from tests.workers.llava.in_process import (
    DESCRIBE,
    WHAT,
    answer_to,
    data_uri,
    png,
    question,
    serving,
)
from tools.models import local_env
from tools.models.tiny_llava import ANSWERS, ENDLESS

pytestmark = pytest.mark.engine


async def test_the_request_of_the_reference(worker: ModuleType) -> None:
    answer = await send(worker.handler, image=png("red"), prompt=WHAT, max_tokens=64)
    assert answer == {
        "response": answer_to("red"), "finish_reason": "stop", "model": "tiny/llava", "revision": None,
        "usage": {"prompt_tokens": 23, "completion_tokens": 9, "total_tokens": 32},
    }  # fmt: skip
    assert json.loads(json.dumps(answer)) == answer
    for colour in ANSWERS:
        assert (await send(worker.handler, image=data_uri(colour)))["response"] == answer_to(colour)


@pytest.mark.parametrize("joins", [True, False], ids=["joining", "through generate"])
async def test_jobs_at_the_same_time_get_their_own_answers(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch, joins: bool
) -> None:
    """Mixed in colour, question, number of images, sampling, length and form; each as it is alone."""
    assert worker.engine.generator.joins
    monkeypatch.setattr(worker.engine.generator, "joins", joins)
    payloads: list[dict[str, Any]] = []
    for number in range(24):
        colour = list(ANSWERS)[number % 4]
        payloads.append(
            [
                {"image": png(colour), "prompt": WHAT},
                {"messages": question(colour, DESCRIBE), "stream": True},
                {"images": [png(colour), png("red")], "prompt": "Both? " * number, "max_tokens": 20},
                {"prompt": f"No image {number}", "max_tokens": 10 + number},
                {"image": png(colour), "temperature": 1.5, "seed": number, "max_tokens": 30},
                {"openai_route": "/v1/chat/completions", "openai_input": {"messages": question(colour)}},
            ][number % 6]
        )

    async def answer(payload: dict[str, Any]) -> Any:
        parts = await stream(worker.handler, **payload)
        for part in parts:
            part.pop("created", None), part.pop("id", None)
        return "".join(part.get("response", "") for part in parts), parts[-1]

    alone = [await answer(payload) for payload in payloads]
    assert await asyncio.gather(*map(answer, payloads)) == alone
    assert (alone[0][0], alone[1][0]) == (answer_to("red"), answer_to("blue"))


@pytest.mark.parametrize(
    ("stop", "cut"),
    [
        (["boat", "deep and"], " the sea, "),
        (" the", ""),
        ("no such text", answer_to("blue")),
    ],
)
async def test_stop_strings(worker: ModuleType, stop: Any, cut: str) -> None:
    answer = await send(worker.handler, image=png("blue"), prompt=WHAT, stop=stop)
    assert (answer["response"], answer["finish_reason"]) == (cut, "stop")
    *parts, end = await stream(worker.handler, image=png("blue"), prompt=WHAT, stop=stop, stream=True)
    assert "".join(part["response"] for part in parts) == cut
    assert end == {**answer, "response": ""}


async def test_fields_of_vllm(worker: ModuleType) -> None:
    """The same on both routes; the huggingface worker's tests have the meaning of each field."""
    bias = {str(worker.engine.generator.tokenizer.convert_tokens_to_ids("</s>")): 100.0}
    body = {"messages": question("red"), "logit_bias": bias, "max_tokens": 5}
    for fields, tokens in (({}, 1), ({"ignore_eos": True}, 5), ({"min_tokens": 3}, 4)):
        native = await send(worker.handler, **body, **fields)
        chat = await openai(worker.handler, "/v1/chat/completions", **body, **fields)
        assert native["usage"]["completion_tokens"] == chat["usage"]["completion_tokens"] == tokens
        assert native["response"] == chat["choices"][0]["message"]["content"]
    answer = await send(
        worker.handler, **{**body, "stop": "</s>", "ignore_eos": True, "skip_special_tokens": False}
    )
    assert (answer["response"], answer["finish_reason"]) == ("", "stop")


async def test_an_answer_continues_the_last_message(worker: ModuleType) -> None:
    begin = answer_to("blue")[:9]
    messages = [*question("blue"), {"role": "assistant", "content": begin.strip()}]
    answer = await send(worker.handler, messages=messages, continue_final_message=True)
    assert answer["usage"]["prompt_tokens"] > 23
    assert begin + answer["response"] == answer_to("blue")


async def test_the_openai_routes(worker: ModuleType) -> None:
    models = await openai(worker.handler, "/v1/models")
    assert [model["id"] for model in models["data"]] == ["tiny/llava"]
    route = "/v1/chat/completions"
    complete = await openai(worker.handler, route, model="tiny/llava", messages=question("red"))
    assert complete["id"].startswith("chatcmpl-job-")
    assert complete["choices"][0]["message"] == {"role": "assistant", "content": answer_to("red")}
    body = {"messages": question("red"), "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = sse_events(await stream(worker.handler, openai_route=route, openai_input=body))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"]["role"] == "assistant"
    assert "".join(choice["delta"].get("content", "") for choice in choices) == answer_to("red")
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert (last["choices"], last["usage"]) == ([], complete["usage"])
    body = {"model": "gpt-4o", "messages": question("red")}
    problem = await error(worker.handler, openai_route=route, openai_input=body)
    assert problem["code"] == "model_not_found"


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_cancelled_job_leaves_the_batch(
    worker: ModuleType, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    """Each token takes 30 ms, so that an answer of 3000 takes a minute and a half on any machine."""
    generator = worker.engine.generator
    decode = generator.decode
    monkeypatch.setattr(generator, "decode", lambda batch: time.sleep(0.03) or decode(batch))
    payload = {"image": png("red"), "prompt": ENDLESS, "max_tokens": 3000, "stream": streamed}
    endless = asyncio.create_task(stream(worker.handler, **payload))
    await until(lambda: generator.running)
    (sequence,) = generator.running.sequences
    answer = await send(worker.handler, image=png("blue"), prompt=WHAT)
    assert answer["response"] == answer_to("blue")
    assert not endless.done(), "a later job does not wait for it"
    endless.cancel()
    with suppress(asyncio.CancelledError):
        await endless
    await until(lambda: generator.running is None, seconds=5)
    assert sequence.remaining > 1000


@pytest.mark.soak
async def test_a_thousand_jobs_leave_nothing_behind(worker: ModuleType) -> None:
    def resident_mb() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    async def jobs(number: int) -> None:
        payload = {"image": png("red", (400, 400)), "max_tokens": 2, "stop": "x"}
        for _ in range(number // 25):
            await asyncio.gather(*(send(worker.handler, **payload) for _ in range(25)))

    await jobs(200)
    before = resident_mb()
    await jobs(1000)
    # A leaked image would be 0.5 MB, its tensor 10 kB; what allocators keep back is less than this.
    assert resident_mb() - before < 25


# ---- the start -----------------------------------------------------------------------------------------


async def test_settings_reach_the_engine(worker: ModuleType) -> None:
    with serving(MAX_MODEL_LEN="60", MAX_BATCH_SIZE="1", MAX_BATCH_TOKENS="64", STREAMING="false") as module:
        answers = await asyncio.gather(*(send(module.handler, image=png("red")) for _ in range(3)))
        assert {answer["response"] for answer in answers} == {answer_to("red")}
        assert "60" in (await error(module.handler, image=png("red"), max_tokens=50))["message"]
        problem = await error(module.handler, image=png("red"), stream=True)
        assert (problem["param"], problem["code"]) == ("stream", "unsupported")


@pytest.mark.parametrize(
    ("change", "code"), [("no template", "no_chat_template"), ("text model", "unsupported_architecture")]
)
def test_models_that_cannot_serve_are_refused(change: str, code: str, tmp_path: Path) -> None:
    for file in Path(local_env("llava")["MODEL_NAME"]).iterdir():
        if change != "no template" or file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if change == "text model":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config["text_config"]))
    with pytest.raises(Exception) as caught, serving(MODEL_NAME=str(tmp_path)):  # noqa: PT011
        pass
    cause = classify(caught.value)
    assert cause is not None
    assert cause.code == code
