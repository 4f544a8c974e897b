"""Streams and the OpenAI routes, spoken by the official clients."""

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import runpod

from local import running
from local.examples import openai_example
from tests.helpers import wait_until
from tests.local.conftest import HANDLERS, RULES, Client

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def tokens(notes: Path) -> Iterator[Client]:
    env = {"NOTES": str(notes), "RUNPOD_LOG_LEVEL": "INFO"}
    with running(HANDLERS / "tokens.py", env=env, rules=RULES) as platform:
        yield Client(platform)


@pytest.fixture
def client(tokens: Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=tokens.platform.openai_url, api_key="any", max_retries=0) as client:
        yield client


def test_the_official_client_streams(tokens: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runpod, "endpoint_url_base", tokens.platform.base_url)
    job = runpod.Endpoint("local", api_key="any").run({"count": 4})
    assert list(job.stream()) == [f"token {n}" for n in range(4)]
    assert job.output() == [f"token {n}" for n in range(4)]


def test_a_chunk_of_a_stream_comes_when_it_is_there(tokens: Client, tmp_path: Path) -> None:
    """The worker makes each token when the one before has arrived here."""
    gate = tmp_path / "gate"
    name = tokens.run(count=3, gate=str(gate))
    arrived: list[str] = []

    def read() -> bool:
        part = tokens.get(f"stream/{name}")
        new = [item["output"] for item in part["stream"]]
        arrived.extend(new)
        if new:
            gate.write_text("x" * len(arrived))
        return part["status"] == "COMPLETED" and not part["stream"]

    wait_until(read)
    assert arrived == ["token 0", "token 1", "token 2"]


def test_a_large_chunk_is_split(tokens: Client) -> None:
    name = tokens.run(count=1, text="naïve 🙂", times=150_000)
    whole = tokens.wait(name)["output"][0]
    pieces = [item["output"] for item in tokens.get(f"stream/{name}")["stream"]]
    assert [len(piece.encode()) <= 2**20 for piece in pieces] == [True, True]
    assert "".join(pieces) == whole


def test_a_streamed_chat_arrives_as_it_is_made(client: openai.OpenAI, tmp_path: Path) -> None:
    """The worker makes each word when the one before has arrived here."""
    gate = tmp_path / "gate"
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "naïve 🙂 漢字"}],
        stream=True,
        extra_body={"gate": str(gate)},
    )
    arrived = []
    for part in stream:
        arrived.append(part.choices[0].delta.content)
        gate.write_text("x" * len(arrived))
    assert arrived == ["naïve", "🙂", "漢字"]


@pytest.mark.parametrize(
    ("routes", "printed"),
    [
        (["/v1/models"], "tiny"),
        (["/v1/models", "/v1/embeddings"], "[2, 2]"),
        # The handler splits at spaces.
        (["/v1/embeddings", "/v1/chat/completions"], "Sayhellointhreelanguages."),
        (["/v1/audio/transcriptions"], "{'text': 'transcribed abc'}"),
        (["/v1/audio/speech"], "13"),
    ],
)
def test_the_examples_that_serve_prints_work(
    tokens: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    routes: list[str],
    printed: str,
) -> None:
    test_input = tmp_path / "test_input.json"
    test_input.write_text('{"input": {"audio": "abc"}}')
    example = openai_example(routes, url=tokens.platform.openai_url, test_input=test_input)
    assert example is not None
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert capsys.readouterr().out.strip() == printed


def test_an_error_is_answered_with_200_and_its_object(tokens: Client, client: openai.OpenAI) -> None:
    body = {"model": "bad", "messages": [{"role": "user", "content": "x"}]}
    answer = tokens("POST", "openai/v1/chat/completions", body)
    assert answer.status_code == 200
    assert answer.json() == {"error": {"type": "invalid_request_error", "message": "no such model"}}
    with pytest.raises(openai.APIError, match="no such model"):
        list(client.chat.completions.create(**body, stream=True))  # type: ignore[call-overload]
    with pytest.raises(openai.APIError, match="it broke"):
        list(client.chat.completions.create(**body | {"model": "breaks"}, stream=True))  # type: ignore[call-overload]


def test_an_exception_is_answered_with_its_text(tokens: Client) -> None:
    answer = tokens("POST", "openai/v1/chat/completions", {"messages": []})
    assert answer.status_code == 200
    assert answer.json()["error"].startswith("handler: 'model'")


def test_bodies_that_are_no_json_are_refused(tokens: Client) -> None:
    for data in (b"--boundary\r\nfile", b""):
        assert tokens("POST", "openai/v1/audio/transcriptions", data=data).status_code == 400


def test_a_reader_that_hangs_up_stops_the_job(tokens: Client, notes: Path) -> None:
    body = {"model": "tiny", "stream": True, "user": "60", "messages": [{"role": "user", "content": "a b"}]}
    with tokens("POST", "openai/v1/chat/completions", body, stream=True) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        lines = response.iter_lines()
        event = next(lines)
        assert json.loads(event.removeprefix(b"data: "))["choices"][0]["delta"]["content"] == "a"
        assert "cancelled" not in notes.read_text()
    wait_until(lambda: "cancelled" in notes.read_text())
    wait_until(lambda: tokens.get("health")["jobs"]["inProgress"] == 0)
