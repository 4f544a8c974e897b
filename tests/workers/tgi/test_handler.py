"""The tgi worker in this process, with the stand-in for TGI's server; see test_stand_in.py."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers import error_of, least_stall, openai, send, sse_events, stream, until
from tests.workers.tgi.in_process import prepared, with_bos
from tools.models import local_env

pytestmark = pytest.mark.engine
TALK: Any = [{"role": "user", "content": "Name three rivers."}]
CHAT = "/v1/chat/completions"


async def error(handler: Any, **payload: Any) -> dict[str, Any]:
    """The error at the end of a job that fails."""
    return error_of((await stream(handler, **payload))[-1])


async def direct(worker: ModuleType, path: str, **body: Any) -> Any:
    """TGI's own answer."""
    return await worker.engine.client.request("POST", path, body)


def through(route: str, **body: Any) -> dict[str, Any]:
    """The input of a job that came through an OpenAI route."""
    return {"openai_route": route, "openai_input": body}


def running_in_tgi(worker: ModuleType) -> int:
    """Requests that TGI is working on."""
    match = re.search(r"^tgi_batch_current_size (\d+)$", worker.engine.client.get("/metrics")[1], re.M)
    assert match is not None
    return int(match[1])


async def test_an_answer_equals_tgis_own(worker: ModuleType) -> None:
    asked = {"prompt": "The river", "max_tokens": 30, "seed": 7}
    parameters = {"max_new_tokens": 30, "temperature": 0.7, "top_p": 0.95, "do_sample": True, "seed": 7}
    theirs = await direct(worker, "/generate", inputs="The river", parameters={**parameters, "details": True})
    answer = await send(worker.handler, **asked)
    assert answer["response"] == theirs["generated_text"].rstrip("\ufffd")
    assert (answer["model"], answer["revision"]) == ("stand-in/no-model", None)
    made = theirs["details"]["generated_tokens"]
    assert answer["details"].keys() == {"finish_reason", "generated_tokens", "seed"}
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": made, "total_tokens": 2 + made}
    greedy = [await send(worker.handler, **asked | {"temperature": 0}) for _ in range(2)]
    assert greedy[0] == greedy[1] != answer
    assert greedy[0]["details"]["seed"] is None


@pytest.mark.parametrize(
    "settings", [{}, {"details": True, "top_n_tokens": 2}, {"return_full_text": True}], ids=str
)
async def test_a_stream_equals_the_complete_answer(worker: ModuleType, settings: dict[str, Any]) -> None:
    for number in range(6):
        asked = {"prompt": f"river {number}", "max_tokens": 40, "seed": 4, **settings}
        plain = await send(worker.handler, **asked)
        *parts, end = await stream(worker.handler, **asked, stream=True)
        assert "".join(part["response"] for part in parts) == plain["response"]
        assert end == {**plain, "response": ""}
        if settings.get("details"):
            count = plain["usage"]["completion_tokens"]
            assert len(plain["details"]["tokens"]) == count
            assert [len(top) for top in plain["details"]["top_tokens"]] == [2] * count
        if settings.get("return_full_text"):
            assert plain["response"].startswith(f"river {number} ")


async def test_tokens_stream_while_they_are_generated(worker: ModuleType) -> None:
    asked = {"prompt": "[[slow 50]] go", "max_tokens": 2000, "temperature": 0, "stream": True}
    parts = worker.handler.stream({"id": "job-1", "input": asked})
    for _ in range(3):
        assert (await anext(parts))["response"]
        assert await asyncio.to_thread(running_in_tgi, worker) == 1
    await parts.aclose()
    await until(lambda: running_in_tgi(worker) == 0)


async def test_a_stream_that_stops_before_its_end_is_no_answer(worker: ModuleType) -> None:
    *parts, event, end = await stream(worker.handler, prompt="[[stop 3]]", stream=True)
    assert parts
    assert event["detail"]["code"] == json.loads(end["error"])["code"] == "engine_unreachable"


async def test_messages_equal_tgis_own_chat_route(worker: ModuleType) -> None:
    """With all of TGI's parameters beside, which its chat route does not have."""
    body = {"messages": TALK, "max_tokens": 20, "temperature": 0}
    theirs = await direct(worker, "/v1/chat/completions", **body)
    nulls = [{**message, "name": None, "tool_calls": None} for message in TALK]  # are left out
    answer = await send(worker.handler, **{**body, "messages": nulls})
    assert answer["response"] == theirs["choices"][0]["message"]["content"].rstrip("\ufffd")
    assert answer["usage"] == theirs["usage"]
    assert (await send(worker.handler, **body, repetition_penalty=1.3))["response"] != answer["response"]


async def test_the_bos_token_is_added_once(tmp_path: Path) -> None:
    """The template has the token, and TGI would add another one."""
    source = Path(local_env("tgi")["MODEL_NAME"])
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    with prepared(MODEL_NAME=str(with_bos(source, tmp_path))) as module:
        body = {"messages": TALK, "max_tokens": 20, "temperature": 0}
        theirs = await direct(module, "/v1/chat/completions", **body)
        answer = await send(module.handler, **body)
        assert answer["usage"] == theirs["usage"]
        assert answer["response"] == theirs["choices"][0]["message"]["content"].rstrip("\ufffd")
        tokens = await direct(module, "/tokenize", inputs="river")
        answer = await send(module.handler, prompt="river", max_tokens=2)
        assert answer["usage"]["prompt_tokens"] == len(tokens)


async def test_an_answer_ends_before_its_stop_text(worker: ModuleType) -> None:
    """On every route, though TGI includes the stop text."""
    asked = {"max_tokens": 60, "temperature": 0}
    completed = (await send(worker.handler, prompt="The sea", **asked))["response"]
    chatted = (await send(worker.handler, messages=TALK, **asked))["response"]
    for text, field, route in (
        (completed, {"prompt": "The sea"}, "/v1/completions"),
        (chatted, {"messages": TALK}, "/v1/chat/completions"),
    ):
        stop = text.split()[3]
        cut = text[: text.index(stop)]
        answer = await send(worker.handler, **field, **asked, stop=[stop, "unused"])
        assert (answer["response"], answer["finish_reason"]) == (cut, "stop")
        *parts, end = await stream(worker.handler, **field, **asked, stop=stop, stream=True)
        assert "".join(part["response"] for part in parts) == cut
        assert end == {**answer, "response": ""}
        plain = (await openai(worker.handler, route, **field, **asked, stop=stop))["choices"][0]
        assert plain["finish_reason"] == "stop"
        assert (plain.get("text") or plain["message"]["content"]) == cut
        job = through(route, **field, **asked, stop=stop, stream=True)
        streamed = [event["choices"][0] for event in sse_events(await stream(worker.handler, **job))]
        assert "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in streamed) == cut
        assert [choice["finish_reason"] for choice in streamed] == [None] * (len(streamed) - 1) + ["stop"]


async def test_the_end_token_is_no_text(worker: ModuleType) -> None:
    """TGI's stream of completions has its text."""
    for number in range(30):
        body: dict[str, Any] = {"prompt": f"number {number}", "max_tokens": 500, "temperature": 0}
        plain = (await openai(worker.handler, "/v1/completions", **body))["choices"][0]
        if plain["finish_reason"] == "stop":
            break
    job = through("/v1/completions", **body, stream=True)
    streamed = sse_events(await stream(worker.handler, **job))
    assert "".join(event["choices"][0]["text"] for event in streamed) == plain["text"]
    assert streamed[-1]["choices"][0]["finish_reason"] == "stop"


async def test_the_default_length_is_what_a_long_prompt_leaves(worker: ModuleType) -> None:
    """512 tokens are the worker's own choice; a number that the client gives is the client's."""
    prompt = " river" * 1900
    *_, end = await stream(worker.handler, prompt=prompt, temperature=0, stream=True)
    answer = await send(worker.handler, prompt=prompt, temperature=0)
    assert answer["usage"] == end["usage"]
    assert answer["usage"]["total_tokens"] <= 2048
    problem = await error(worker.handler, prompt=prompt, max_tokens=512)
    assert (problem["param"], problem["code"]) == ("max_tokens", "too_long")
    assert "2048" in problem["message"]
    assert "1900" in problem["message"]


async def test_null_means_unset(worker: ModuleType) -> None:
    """Clients that dump their models send null for every field."""
    for route, body in ((CHAT, {"messages": TALK}), ("/v1/completions", {"prompt": "a"})):
        others = ("n", "logit_bias", "presence_penalty", "user", "functions")
        asked = {**body, "max_tokens": 2, "seed": 3}
        nulls = dict.fromkeys([*worker.ROUTES[route].model_fields, *others])
        expected = await openai(worker.handler, route, **asked)
        answer = await openai(worker.handler, route, **{**nulls, **asked})
        assert answer["choices"] == expected["choices"]


@pytest.mark.parametrize(
    ("payload", "param", "code"),
    [
        ({"prompt": " river" * 2100}, "prompt", "too_long"),
        ({"messages": [{"role": "user", "content": " river" * 2100}]}, "messages", "too_long"),
        ({"prompt": "a", "max_tokens": 2048}, "max_tokens", "too_long"),
        ({"prompt": "a", "best_of": 3}, "best_of", "invalid_value"),
        ({"prompt": "a", "best_of": 2, "temperature": 0}, "best_of", "invalid_value"),
        ({"prompt": "a", "top_n_tokens": 9}, "top_n_tokens", "invalid_value"),
        ({"prompt": "a", "truncate": 5000}, "truncate", "invalid_value"),
        ({"prompt": "a", "stop": list("abcde")}, "stop", "invalid_value"),
        ({"prompt": "a", "grammar": {"type": "json", "value": {}}}, "grammar", "invalid_value"),
        ({"prompt": "a", "adapter_id": "x"}, "adapter_id", "model_not_found"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "invalid_value"),
        ({"prompt": "[[fail 3]]"}, None, "generation_failed"),
        (through("/v1/chat/completions", messages=TALK, model="x"), "model", "model_not_found"),
        (through(CHAT, messages=TALK, max_completion_tokens=5000), "max_completion_tokens", "too_long"),
        (through(CHAT, messages=TALK * 200, max_completion_tokens=2000), "max_completion_tokens", "too_long"),
        (through(CHAT, messages=TALK, logprobs=True, top_logprobs=9), "top_logprobs", "invalid_value"),
        (through("/v1/completions", prompt=list("abcde")), "prompt", "invalid_value"),
        (through("/v1/completions", prompt="[[fail 2]]"), None, "generation_failed"),
        (through("/v1/embeddings", input="a"), "openai_route", "unknown_route"),
        (through("/generate", inputs="a"), "openai_route", "unknown_route"),
        (through("/v1/../generate", inputs="a"), "openai_route", "unknown_route"),
    ],
)  # fmt: skip
async def test_a_job_that_fails_names_the_field_and_the_worker_goes_on(
    worker: ModuleType, payload: dict[str, Any], param: str | None, code: str
) -> None:
    body = payload.get("openai_input")
    streamed = {**payload, "openai_input": {**body, "stream": True}} if body else {**payload, "stream": True}
    for asked in (payload, streamed) if payload.get("best_of") is None else (payload,):
        problem = await error(worker.handler, **asked)
        assert (problem["param"], problem["code"]) == (param, code), problem
    assert (await send(worker.handler, prompt="a", max_tokens=1))["finish_reason"] == "length"
    assert running_in_tgi(worker) == 0


async def test_an_error_within_a_stream_comes_after_its_text(worker: ModuleType) -> None:
    body = {"prompt": "[[slow 30]] [[fail 9]]", "stream": True}
    *parts, event, end = await stream(worker.handler, **body, max_tokens=20)
    assert [set(part) for part in parts] == [{"response"}] * len(parts)
    assert parts
    assert event["event"] == "error"
    assert event["detail"]["code"] == json.loads(end["error"])["code"] == "generation_failed"
    *chunks, end = await stream(worker.handler, **through("/v1/completions", **body))
    *made, last = sse_events(chunks)
    assert made
    assert last["error"]["code"] == json.loads(end["error"])["code"] == "generation_failed"


@pytest.mark.parametrize(
    "payload",
    [
        {"prompt": "[[slow 3600000]]"},
        {"prompt": "[[slow 500]]", "stream": True, "max_tokens": 2000},
        {"prompt": "[[slow 3600000]]", "best_of": 2},
        through("/v1/completions", prompt=["[[slow 3600000]]"] * 2),
        through("/v1/completions", prompt="[[slow 3600000]]", stream=True),
    ],
    ids=str,
)  # fmt: skip
async def test_a_cancelled_job_frees_its_requests(worker: ModuleType, payload: dict[str, Any]) -> None:
    several = payload.get("best_of") or isinstance(payload.get("openai_input", {}).get("prompt"), list)
    job = asyncio.create_task(stream(worker.handler, **payload))
    await until(lambda: running_in_tgi(worker) == (2 if several else 1))
    job.cancel()
    with suppress(asyncio.CancelledError):
        await job
    await until(lambda: running_in_tgi(worker) == 0)  # by itself it would take far longer


async def test_jobs_wait_while_tgi_is_at_its_limit() -> None:
    with prepared(MAX_CONCURRENT_REQUESTS="2", MAX_CONCURRENCY="8") as module:
        asked = [{"prompt": f"[[slow 5]] {n}", "max_tokens": 9, "stream": n % 2 == 1} for n in range(8)]
        answers = await asyncio.gather(*(stream(module.handler, **fields) for fields in asked))
        assert [answer[-1]["finish_reason"] in ("length", "stop") for answer in answers] == [True] * 8
        module.__dict__["engine"] = replace(module.engine, wait_s=0.3)
        slow = [asyncio.create_task(stream(module.handler, prompt="[[slow 3600000]]")) for _ in range(2)]
        await until(lambda: running_in_tgi(module) == 2)
        for streamed in (True, False):
            problem = await error(module.handler, prompt="a", stream=streamed)
            assert (problem["code"], problem["type"]) == ("overloaded", "server_error")
            assert "MAX_CONCURRENT_REQUESTS" in problem["message"]
        for task in slow:
            task.cancel()
        await asyncio.wait(slow)


async def test_a_request_over_the_payload_limit() -> None:
    with prepared(PAYLOAD_LIMIT="3000") as module:
        problem = await error(module.handler, prompt="a" * 3000)
        assert (problem["param"], problem["code"]) == ("prompt", "too_large")
        assert "PAYLOAD_LIMIT" in problem["message"]


async def test_adapters_are_served_by_name(tmp_path: Path) -> None:
    with prepared(LORA_ADAPTERS=f"my/Adapter={tmp_path}") as module:
        listed = await openai(module.handler, "/v1/models")
        assert [model["id"] for model in listed["data"]] == ["stand-in/no-model", "my/Adapter"]
        body = {"messages": TALK, "max_tokens": 2}
        assert (await openai(module.handler, CHAT, model="MY/adapter", **body))["model"] == "my/Adapter"
        for name in ("stand-in/no-model", "tgi", None):
            assert (await openai(module.handler, CHAT, model=name, **body))["model"] == "stand-in/no-model"
        assert (await send(module.handler, prompt="a", adapter_id="my/Adapter"))["finish_reason"]


async def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    for file in Path(local_env("tgi")["MODEL_NAME"]).iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    with prepared(MODEL_NAME=str(tmp_path)) as module:
        for payload in ({"messages": TALK}, through(CHAT, messages=TALK, stream=True)):
            problem = await error(module.handler, **payload)
            assert (problem["param"], problem["code"]) == ("messages", "no_chat_template")
        assert (await send(module.handler, prompt="The river", max_tokens=1))["finish_reason"] == "length"


async def test_a_large_request_and_answer_do_not_stall_the_loop(worker: ModuleType) -> None:
    prompt = "caf\u00e9 river " * 300_000
    fields = {"prompt": prompt, "truncate": 9, "return_full_text": True, "max_tokens": 3}

    async def ask() -> None:
        answer = await send(worker.handler, **fields)
        assert answer.get("response", "").startswith(prompt), str(answer)[:500]

    assert await least_stall(ask) < 0.1
