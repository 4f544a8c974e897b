"""The huggingface worker with tiny random models of several families and a tokenizer trained for them."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest
import requests

from local import Platform, running
from shared import generation, jobs
from shared.errors import JobError
from shared.generation import sample_next_tokens
from tools.models import local_env, tiny_causal
from tools.workers import load_handler

engine = pytest.mark.engine
TALK = [{"role": "user", "content": "Name three rivers."}]


# ---- requests, without a model -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def huggingface() -> ModuleType:
    return load_handler("huggingface")


def test_the_defaults_of_the_reference(huggingface: ModuleType) -> None:
    native = jobs.validate(huggingface.GenerateRequest, {"prompt": "a"})
    sampling = huggingface.sampling_of(native)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.95, 50)
    assert huggingface.DEFAULT_TOKENS == 512
    openai_default = jobs.validate(huggingface.ChatRequest, {"messages": TALK})
    sampling = huggingface.sampling_of(openai_default)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.logprobs) == (1, 1, 0, None)


def test_both_forms_of_a_request_mean_the_same(huggingface: ModuleType) -> None:
    settings = {
        "temperature": 0.0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 3,
        "stop": ["a", "b"], "num_beams": 3,
    }  # fmt: skip
    asked = [
        jobs.validate(huggingface.GenerateRequest, {"messages": TALK, "logprobs": 2, **settings}),
        jobs.validate(
            huggingface.ChatRequest, {"messages": TALK, "logprobs": True, "top_logprobs": 2, **settings}
        ),
        jobs.validate(huggingface.CompletionRequest, {"prompt": "a", "logprobs": 2, **settings}),
    ]
    first, *others = [huggingface.sampling_of(request) for request in asked]
    assert others == [first, first]
    assert (first.temperature, first.stop, first.logprobs) == (0, ("a", "b"), 2)


@pytest.mark.parametrize(
    ("payload", "param", "code"),
    [
        ({}, "prompt", "invalid_value"),
        ({"prompt": "a", "messages": TALK}, "prompt", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": "a", "tools": [{}]}, "tools", "invalid_value"),
        ({"prompt": "a", "chat_template_kwargs": {"b": 1}}, "chat_template_kwargs", "invalid_value"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"prompt": "a", "temperature": 2.1}, "temperature", "invalid_value"),
        ({"prompt": "a", "top_p": 0}, "top_p", "invalid_value"),
        ({"prompt": "a", "top_k": -1}, "top_k", "invalid_value"),
        ({"prompt": "a", "min_p": 2}, "min_p", "invalid_value"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"prompt": "a", "repetition_penalty": 1e-45}, "repetition_penalty", "invalid_value"),
        ({"prompt": "a", "num_beams": 0}, "num_beams", "invalid_value"),
        ({"prompt": "a", "num_beams": 17}, "num_beams", "invalid_value"),
        ({"prompt": "a", "n": 0}, "n", "invalid_value"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "invalid_value"),
        ({"prompt": "a", "stop": list("abcde")}, "stop", "invalid_value"),
        ({"prompt": "a", "max_new_tokens": 5}, "max_new_tokens", "unknown_field"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "cook", "content": "hi"}]}, "messages.0.role", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
            "invalid_value",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    huggingface: ModuleType, payload: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(JobError) as caught:
        jobs.validate(huggingface.GenerateRequest, payload)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert param in caught.value.message


@pytest.mark.parametrize("prompt", [5, [True], ["a", [1]], [None], {}, []])
def test_prompts_of_other_kinds_are_refused_by_name(huggingface: ModuleType, prompt: Any) -> None:
    with pytest.raises(JobError) as caught:
        jobs.validate(huggingface.CompletionRequest, {"prompt": prompt})
    assert (caught.value.param, caught.value.code) == ("prompt", "invalid_value")


def test_messages_reach_the_template_as_it_expects_them(huggingface: ModuleType) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    request = jobs.validate(huggingface.ChatRequest, {"messages": turns})
    assert [message.for_template() for message in request.messages] == [  # type: ignore[attr-defined]
        {"role": "user", "content": "one two"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**call, "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]


# ---- the worker in this process ------------------------------------------------------------------------


def prepared(**env: str) -> ModuleType:
    """The handler's module as `prepare()` leaves it."""
    module = load_handler("huggingface")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**local_env("huggingface"), **env}.items():
            patch.setenv(name, value)
        module.prepare()
    return module


@contextmanager
def beside(worker: ModuleType, model: Path) -> Iterator[ModuleType]:
    """Another model in the same module for a while."""
    mine = worker.engine
    try:
        yield prepared(MODEL_NAME=str(model), PREWARM="false")
    finally:
        worker.engine.generator.close()
        worker.engine = mine


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are much slower on two threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def worker(one_thread: None) -> Iterator[ModuleType]:
    module = prepared()
    yield module
    module.engine.generator.close()


@pytest.fixture(scope="module", params=tiny_causal.FAMILIES)
def family(
    one_thread: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ModuleType]:
    folder = tiny_causal.make(tmp_path_factory.mktemp("model"), request.param)
    module = prepared(MODEL_NAME=str(folder))
    yield module
    module.engine.generator.close()


async def parts(worker: ModuleType, **payload: Any) -> list[Any]:
    return [piece async for piece in worker.handler({"id": "job-1", "input": payload})]


async def send(worker: ModuleType, **payload: Any) -> Any:
    (answer,) = await parts(worker, **payload)
    assert "error" not in answer, answer
    return answer


async def error(worker: ModuleType, **payload: Any) -> Any:
    (answer,) = await parts(worker, **payload)
    return json.loads(answer["error"])


def generated(worker: ModuleType, ids: list[int], max_tokens: int, **settings: Any) -> tuple[str, int, str]:
    """What `model.generate` makes of a prompt: text, number of tokens, finish_reason."""
    import torch

    model, tokenizer = worker.engine.generator.model, worker.engine.tokenizer
    out = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
        max_new_tokens=max_tokens, pad_token_id=tokenizer.eos_token_id, **settings,
    )  # fmt: skip
    new = out[0, len(ids) :].tolist()
    ended = new[-1] == tokenizer.eos_token_id
    return tokenizer.decode(new, skip_special_tokens=True), len(new), "stop" if ended else "length"


def mixed(count: int) -> list[dict[str, Any]]:
    draw = random.Random(5)
    words = tiny_causal.TEXT.split()
    asked = []
    for number in range(count):
        prompt = " ".join(draw.choices(words, k=draw.randint(1, 30)))
        asked.append({"prompt": prompt, "max_tokens": draw.randint(1, 40), "temperature": 0.0})
        if number % 3 == 1:
            asked[-1]["repetition_penalty"] = draw.choice([1.1, 1.5])
    return asked


@engine
async def test_greedy_answers_are_those_of_generate_alone_and_together(family: ModuleType) -> None:
    asked = mixed(16)
    tokenizer = family.engine.tokenizer
    wanted = [
        generated(
            family,
            tokenizer(it["prompt"])["input_ids"],
            it["max_tokens"],
            repetition_penalty=it.get("repetition_penalty", 1.0),
        )
        for it in asked
    ]

    def seen(answer: Any) -> tuple[str, int, str]:
        return answer["response"], answer["usage"]["completion_tokens"], answer["finish_reason"]

    noise = [send(family, prompt="The sea", max_tokens=25, temperature=1.5, seed=i) for i in range(4)]
    together = await asyncio.gather(*(send(family, **it) for it in asked), *noise)
    assert [seen(answer) for answer in together[:16]] == wanted
    for it, expected in list(zip(asked, wanted, strict=True))[:4]:
        assert seen(await send(family, **it)) == expected
    crowd = await asyncio.gather(*noise_again(family))
    assert [answer["response"] for answer in crowd] == [answer["response"] for answer in together[16:]]


def noise_again(worker: ModuleType) -> list[Any]:
    return [send(worker, prompt="The sea", max_tokens=25, temperature=1.5, seed=i) for i in range(4)]


@engine
async def test_beams_are_those_of_generate(family: ModuleType) -> None:
    """Alone, and together with answers of other widths and such as are drawn."""
    prompts = ["The river", "the old stone house and", "Name", "into the sea. Name three rivers"]
    tokenizer = family.engine.tokenizer
    asked = [{"prompt": it, "max_tokens": 20, "num_beams": 2 + i % 2} for i, it in enumerate(prompts)]
    wanted = [
        generated(family, tokenizer(it["prompt"])["input_ids"], 20, num_beams=it["num_beams"])[0]
        for it in asked
    ]
    assert [(await send(family, **it))["response"] for it in asked] == wanted
    drawn = [send(family, prompt=it, max_tokens=20, temperature=1.0, seed=1) for it in prompts]
    together = await asyncio.gather(*(send(family, **it) for it in asked), *drawn)
    assert [answer["response"] for answer in together[:4]] == wanted
    whole = next(it for it in wanted if len(it) > 4)
    cut = await send(family, **asked[wanted.index(whole)], stop=whole[2:4])
    assert (cut["response"], cut["finish_reason"]) == (whole[: whole.index(whole[2:4])], "stop")


@engine
async def test_beams_have_one_answer(worker: ModuleType) -> None:
    *pieces, end = await parts(worker, prompt="The river", max_tokens=9, num_beams=2, stream=True)
    plain = await send(worker, prompt="The river", max_tokens=9, num_beams=2)
    # One piece or several: the answer comes all at once, but token by token from the engine's thread.
    text = "".join(piece["response"] for piece in pieces)
    assert (text, end["usage"]) == (plain["response"], plain["usage"])
    for name, value in (("n", 2), ("logprobs", 0)):
        problem = await error(worker, prompt="The river", num_beams=2, **{name: value})
        assert (problem["param"], problem["code"]) == (name, "invalid_value")
        assert "num_beams" in problem["message"]


@engine
async def test_a_stream_is_the_plain_answer_in_pieces(
    family: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes while the first piece is on its way is joined; here the last ten tokens wait for it."""
    asked = {"messages": TALK, "max_tokens": 40, "temperature": 1.0, "seed": 4}
    plain = await send(family, **asked)
    came = threading.Event()

    def held(logits: Any, rows: Any) -> list[int]:
        assert len(rows[0].tokens) < 30 or came.wait(60)
        return sample_next_tokens(logits, rows)

    monkeypatch.setattr(generation, "sample_next_tokens", held)
    pieces = []
    async for piece in family.handler({"id": "job-1", "input": {**asked, "stream": True}}):
        came.set()
        pieces.append(piece)
    end = pieces.pop()
    assert "".join(piece["response"] for piece in pieces) == plain["response"]
    assert end == {**plain, "response": ""}
    assert len(pieces) > 1
    assert plain["usage"] == {"prompt_tokens": 20, "completion_tokens": 40, "total_tokens": 60}


@engine
async def test_the_answer_has_what_the_reference_says(worker: ModuleType) -> None:
    answer = await send(worker, messages=TALK, max_tokens=5)
    assert set(answer) == {"response", "finish_reason", "usage", "model", "revision"}
    assert (answer["model"], answer["finish_reason"]) == ("tiny-random/llama", "length")
    assert not answer["response"].startswith("Name three rivers")


@engine
async def test_stop_strings(worker: ModuleType) -> None:
    asked = {"prompt": "The river", "max_tokens": 60, "temperature": 0.0}
    whole = (await send(worker, **asked))["response"]
    for at in (5, 17, 30):
        stop = whole[at : at + 3]
        cut = whole[: whole.index(stop)]
        answer = await send(worker, **asked, stop=[stop, "never said"])
        assert (answer["response"], answer["finish_reason"]) == (cut, "stop")
        *pieces, end = await parts(worker, **asked, stop=stop, stream=True)
        assert "".join(piece["response"] for piece in pieces) == cut
        assert end["finish_reason"] == "stop"


@engine
async def test_ends_come_from_the_generation_config(worker: ModuleType, tmp_path: Path) -> None:
    """Several of them, and the one that ended the answer is counted and not shown."""
    tiny_causal.make(tmp_path)
    ids = worker.engine.tokenizer("The river")["input_ids"]
    config = json.loads((tmp_path / "generation_config.json").read_text())
    import torch

    out = worker.engine.generator.model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)
    new = out[0, len(ids) :].tolist()
    place = next(i for i in range(3, 9) if new[i] not in new[:i])
    (tmp_path / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [1, new[place]]}))
    wanted = worker.engine.tokenizer.decode(new[:place], skip_special_tokens=True)
    with beside(worker, tmp_path) as ending:
        answer = await send(ending, prompt="The river", temperature=0.0)
    assert (answer["finish_reason"], answer["usage"]["completion_tokens"]) == ("stop", place + 1)
    assert answer["response"] == wanted


@engine
async def test_n_answers(worker: ModuleType) -> None:
    asked = {"prompt": "The river", "max_tokens": 12, "temperature": 1.0}
    alone = [await send(worker, **asked, seed=7 + i) for i in range(3)]
    answer = await send(worker, **asked, seed=7, n=3)
    assert [it["response"] for it in answer["choices"]] == [it["response"] for it in alone]
    assert answer["response"] == alone[0]["response"]
    made = [it["usage"]["completion_tokens"] for it in alone]
    assert answer["usage"]["completion_tokens"] == sum(made)
    assert answer["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]
    *pieces, end = await parts(worker, **asked, seed=7, n=3, stream=True)
    texts = ["".join(it["response"] for it in pieces if it["index"] == i) for i in range(3)]
    assert texts == [it["response"] for it in alone]
    assert end["usage"] == answer["usage"]


@engine
async def test_templates_get_tools_and_variables(worker: ModuleType) -> None:
    async def prompt_tokens(**settings: Any) -> int:
        answer = await send(worker, messages=TALK, max_tokens=1, **settings)
        return int(answer["usage"]["prompt_tokens"])

    plain = await prompt_tokens()
    assert await prompt_tokens(chat_template_kwargs={"shout": True}) > plain
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    assert await prompt_tokens(tools=[tool]) > plain + 10
    for name in ("tokenize", "messages"):
        problem = await error(worker, messages=TALK, chat_template_kwargs={name: []})
        assert (problem["param"], problem["code"]) == ("chat_template_kwargs", "invalid_value")

    async def chat(**settings: Any) -> Any:
        body = {"messages": TALK, "max_tokens": 1, "tools": [tool], **settings}
        return (await parts(worker, openai_route="/v1/chat/completions", openai_input=body))[0]

    assert (await chat(tool_choice="auto"))["usage"]["prompt_tokens"] > plain + 10
    assert (await chat(tool_choice="none"))["usage"]["prompt_tokens"] == plain
    for forced in ("required", {"type": "function", "function": {"name": "add"}}):
        problem = json.loads((await chat(tool_choice=forced))["error"])
        assert (problem["param"], problem["code"]) == ("tool_choice", "invalid_value")


@engine
async def test_a_tokenizer_without_a_template_says_so(worker: ModuleType, tmp_path: Path) -> None:
    with beside(worker, tiny_causal.make(tmp_path, chat=False)) as bare:
        problem = await error(bare, messages=TALK)
        assert (problem["param"], problem["code"]) == ("messages", "no_chat_template")
        assert "prompt" in problem["message"]
        assert (await send(bare, prompt="The river", max_tokens=3))["finish_reason"] == "length"


@engine
async def test_what_is_too_long_is_told_in_numbers(worker: ModuleType) -> None:
    problem = await error(worker, prompt="a b " * 3000)
    assert problem["code"] == "too_long"
    assert "2048" in problem["message"]
    problem = await error(worker, prompt="a", max_tokens=2048)
    assert (problem["param"], problem["code"]) == ("max_tokens", "too_long")
    assert "2049" in problem["message"]
    assert "2048" in problem["message"]
    assert "2047" in problem["message"]
    problem = await error(
        worker, openai_route="/v1/completions", openai_input={"prompt": [5, 600], "max_tokens": 3}
    )
    assert problem["code"] == "invalid_value"
    assert "599" in problem["message"]


def live(worker: ModuleType) -> int:
    batch = worker.engine.generator._live
    return len(batch.rows) if batch else 0


async def until(condition: Callable[[], bool]) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < 30
        await asyncio.sleep(0.005)


@engine
@pytest.mark.parametrize("settings", [{"stream": True}, {}, {"n": 3, "stream": True}, {"n": 3}], ids=str)
async def test_a_cancelled_job_gives_its_place_up(
    worker: ModuleType, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token takes 30 ms, so that the whole answer would take a minute on any machine."""
    generator = worker.engine.generator
    step = generator._step
    monkeypatch.setattr(generator, "_step", lambda batch: (time.sleep(0.03), step(batch)))
    monkeypatch.setattr(generator, "_ends", frozenset())
    job = asyncio.create_task(parts(worker, prompt="The river", max_tokens=2000, temperature=0.0, **settings))
    await until(lambda: live(worker) == settings.get("n", 1))
    rows = list(generator._live.rows)
    job.cancel()
    with suppress(asyncio.CancelledError):
        await job
    await until(lambda: live(worker) == 0)
    assert all(row.left > 1000 for row in rows)


# ---- under the local platform, with the unmodified SDK and the official client ---------------------------


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with running("huggingface", env=local_env("huggingface")) as platform:
        yield platform


@pytest.fixture(scope="module")
def client(platform: Platform) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{platform.endpoint_url}/openai/v1", api_key="local", max_retries=0
    ) as client:
        yield client


def runsync(platform: Platform, payload: dict[str, Any]) -> Any:
    return requests.post(
        f"{platform.endpoint_url}/runsync",
        json={"input": payload},
        headers={"Authorization": "Bearer local"},
        timeout=120,
    ).json()


@engine
def test_openai_client(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny-random/llama"
    talk: Any = TALK
    asked: dict[str, Any] = {"model": model.id, "messages": talk, "max_tokens": 20, "seed": 3}
    plain = client.chat.completions.create(**asked, extra_body={"top_k": 20})
    (choice,) = plain.choices
    assert choice.finish_reason == "length"
    assert plain.usage is not None
    assert plain.usage.completion_tokens == 20
    chunks = list(
        client.chat.completions.create(
            **asked, extra_body={"top_k": 20}, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage == plain.usage
    said = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(it.delta.content or "" for it in said) == choice.message.content
    assert said[0].delta.role == "assistant"
    assert [it.finish_reason for it in said[-2:]] == [None, "length"]


@engine
def test_openai_completions_with_several_prompts_and_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny-random/llama", "prompt": ["The river", "the sea"], "n": 2, "max_tokens": 9,
        "temperature": 0, "logprobs": 2,
    }  # fmt: skip
    plain = client.completions.create(**asked)
    texts = [it.text for it in plain.choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    for choice in plain.choices:
        told = choice.logprobs
        assert told is not None
        assert told.token_logprobs is not None
        assert len(told.token_logprobs) == 9
        assert max(told.token_logprobs) <= 0
    streamed = [""] * 4
    logprobs: list[list[float]] = [[], [], [], []]
    for chunk in client.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.text
        if choice.logprobs is not None:
            logprobs[choice.index] += choice.logprobs.token_logprobs or []
    assert streamed == texts
    for number, choice in enumerate(plain.choices):
        assert choice.logprobs is not None
        assert logprobs[number] == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)


@engine
def test_chat_logprobs(client: openai.OpenAI) -> None:
    talk: Any = TALK
    asked: dict[str, Any] = {
        "model": "tiny-random/llama", "messages": talk, "max_tokens": 6, "temperature": 0,
        "logprobs": True, "top_logprobs": 3,
    }  # fmt: skip
    told = client.chat.completions.create(**asked).choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert [len(it.top_logprobs) for it in told.content] == [3] * 6
    assert all(it.logprob == it.top_logprobs[0].logprob for it in told.content)


@engine
def test_openai_client_sees_errors(client: openai.OpenAI) -> None:
    talk: Any = TALK
    asked: dict[str, Any] = {"model": "tiny-random/llama", "messages": talk}
    for wrong, code in (
        ({"model": "gpt-4o"}, "model_not_found"),
        ({"frequency_penalty": 1.0}, "unsupported"),
        ({"max_tokens": 5000}, "too_long"),
    ):
        answer = client.chat.completions.with_raw_response.create(**{**asked, **wrong})
        assert code in answer.text


@engine
def test_many_clients_at_once(platform: Platform) -> None:
    """Each gets what it would get alone, and all of them take little longer than a few."""

    def ask(number: int) -> Any:
        payload = {"prompt": "The river", "max_tokens": 30, "seed": number % 8, "temperature": 1.0}
        body = runsync(platform, payload)
        assert body["status"] == "COMPLETED", body
        return body["output"][0]["response"]

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(48)))
    assert answers == answers[:8] * 6
    assert len(set(answers)) > 4


@engine
def test_a_plain_worker_gives_the_object_itself() -> None:
    with running("huggingface", env={**local_env("huggingface"), "STREAMING": "false"}) as platform:

        def ask(**payload: Any) -> Any:
            return runsync(platform, payload)

        assert ask(prompt="The river", max_tokens=3)["output"]["finish_reason"] == "length"
        assert "STREAMING=false" in ask(prompt="The river", stream=True)["error"]


# The engine dies at the first step that both jobs are in. While one of them waits for the other, its steps
# take so long, and its answer is so far from an end, that it cannot be over before.
DIES = """
import os, sys, time
sys.argv = ["handler.py"]
import shared.generation as generation
step = generation.Generator._step
def fails(self, batch):
    asked = {row.sampling.max_tokens for row in batch.rows}
    if {77, 1500} <= asked:
        raise RuntimeError("CUDA error: device-side assert triggered")
    if asked & {77, 1500}:
        self._ends = frozenset()
        time.sleep(1)
    step(self, batch)
generation.Generator._step = fails
exec(compile(open(os.environ["REAL_HANDLER"]).read(), "handler.py", "exec"))
"""


@engine
def test_a_worker_whose_engine_dies_is_replaced(tmp_path: Path) -> None:
    """The jobs that it had are told so, and the next job is answered by another process."""
    script = tmp_path / "handler.py"
    script.write_text(DIES)
    real = Path(__file__).parents[3] / "workers" / "huggingface" / "handler.py"
    env = {**local_env("huggingface"), "REAL_HANDLER": str(real)}
    with running(script, env=env) as platform:

        def ask(**payload: Any) -> Any:
            return runsync(platform, {"prompt": "The river", **payload})

        first = platform.workers[0]
        with ThreadPoolExecutor(2) as pool:
            for answer in pool.map(lambda most: ask(max_tokens=most), (1500, 77)):
                assert answer["status"] == "FAILED", answer
                assert json.loads(answer["error"])["code"] == "engine_died"
        good = ask(max_tokens=5)
        assert good["status"] == "COMPLETED", good
        assert first not in platform.workers
