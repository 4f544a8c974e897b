"""The vllm worker in HTTP mode, beside a small stand-in for the engine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.helpers import wait_until
from tests.shared.http.servers import Server, running
from tests.workers.vllm.test_handler import env_of

pytestmark = pytest.mark.engine
MODULE = "workers.vllm.handler"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(module=MODULE, **env_of()) as server:
        yield server


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60)


def stream(server: Server, prompt: str) -> Any:
    return client(server).completions.create(model="model", prompt=prompt, stream=True)


def count(server: Server, text: str) -> int:
    return "".join(server.log).count(text)


def test_answers_of_the_engine(server: Server) -> None:
    answer = client(server).completions.with_raw_response.create(model="model", prompt="hello")
    assert answer.parse().choices[0].text == "hello"
    assert answer.parse().id == f"cmpl-{answer.headers['x-request-id']}"
    assert [chunk.choices[0].text for chunk in stream(server, "hello")] == ["hello"]
    assert [model.id for model in client(server).models.list()] == ["model"]
    assert client(server).models.retrieve("model").id == "model"
    native = server.work(route="/v1/completions", body={"prompt": "hello"}).json()
    assert native["output"]["choices"][0]["text"] == "hello"
    assert server.work(prompt="hello", stream=True).text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("status", "error"),
    [(400, openai.BadRequestError), (404, openai.NotFoundError), (429, openai.RateLimitError),
     (501, openai.InternalServerError)],
)  # fmt: skip
def test_the_status_of_the_engines_error(
    server: Server, streamed: bool, status: int, error: type[openai.APIStatusError]
) -> None:
    with pytest.raises(error) as caught:
        client(server).completions.create(model="model", prompt=f"fail {status}", stream=streamed)
    body: Any = caught.value.body
    assert (caught.value.status_code, body["type"], body["param"]) == (status, "AsAskedError", "prompt")
    assert server.work(prompt=f"fail {status}", stream=streamed).status_code == status


def test_the_engines_metrics_follow_the_workers(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    assert re.search(r'^vllm:cache_config_info\{engine="0",', text, re.MULTILINE)
    assert text.index("# HELP") < text.index("vllm:")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_hangs_up_frees_the_engine(server: Server, streamed: bool) -> None:
    received, dropped = count(server, "received wait"), count(server, "dropped")
    if streamed:
        events = stream(server, "wait 600")
        assert next(events).choices[0].text == "wait 600"  # while the engine still works
        events.close()
    else:
        body = b'{"prompt": "wait 600"}'
        connection = server.send("/v1/completions", body, "content-type: application/json")
        wait_until(lambda: count(server, "received wait") > received)
        connection.close()
    wait_until(lambda: count(server, "dropped") > dropped, 5)


HEAD_SIZE = "ERROR 11-28 10:00:00 [core.py:9] ValueError: Head size 16 is not supported."


def test_an_engine_that_dies_of_its_first_request_is_started_once_more(tmp_path: Path) -> None:
    env = env_of(PREWARM="true", FAKE_DIES="1", FAKE_SAYS_ONCE=f"{tmp_path / 'died'}:{HEAD_SIZE}")
    with running(module=MODULE, **env) as server:
        assert server.work(prompt="hello").status_code == 200
        assert count(server, "vllm: process") == 2
