"""The tgi worker in HTTP mode, with the stand-in for TGI's server and the official client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.helpers import wait_until
from tests.shared.http.servers import Server, running
from tools.models import local_env

pytestmark = pytest.mark.engine
TALK: Any = [{"role": "user", "content": "Name three rivers."}]
CHAT: Any = {"model": "tgi", "messages": TALK, "max_tokens": 20, "seed": 3}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(module="workers.tgi.handler", **local_env("tgi")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


def test_complete_and_streamed_answers(server: Server, client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == "stand-in/no-model"
    plain = client.chat.completions.create(**CHAT).choices[0].message.content or ""
    chunks = list(client.chat.completions.create(**CHAT, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain.rstrip("\ufffd")
    native = {"messages": TALK, "max_tokens": 20, "temperature": 0}
    answer = server.work(**native).json()["output"]
    events = server.work(**native, stream=True).text.split("\n\n")
    assert '"finish_reason"' in events[-2]
    assert len(events) > 3
    assert answer["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("wrong", "status", "param"),
    [
        ({"model": "gpt-4o"}, 404, "model"),
        ({"max_completion_tokens": 5000}, 400, "max_completion_tokens"),
        ({"n": 2}, 400, "n"),
        ({"messages": [{"role": "user", "content": "[[fail 0]]"}]}, 500, None),
    ],
)
def test_errors_have_their_status(
    client: openai.OpenAI, streamed: bool, wrong: dict[str, Any], status: int, param: str | None
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{**CHAT, **wrong}, stream=streamed)
    body: Any = caught.value.body
    assert (caught.value.status_code, body["param"]) == (status, param)


def test_a_client_that_hangs_up_frees_tgi(server: Server, client: openai.OpenAI) -> None:
    def running_in_tgi(count: int) -> bool:
        return f"tgi_batch_current_size {count}\n" in httpx.get(f"{server.url}/metrics").text

    talk: Any = [{"role": "user", "content": "[[slow 500]] on"}]
    events = client.chat.completions.create(model="tgi", messages=talk, max_tokens=1000, stream=True)
    next(iter(events))
    assert running_in_tgi(1)
    events.close()
    wait_until(lambda: running_in_tgi(0), 5)


def test_a_dead_tgi_ends_the_worker(server: Server, client: openai.OpenAI) -> None:
    """Last: the module's worker does not outlive it."""
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="tgi", prompt="[[die 1]]")
    assert (caught.value.status_code, caught.value.code) == (503, "engine_died")
    assert server.end() == 1
