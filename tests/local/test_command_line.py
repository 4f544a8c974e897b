"""`python -m local`: its arguments, and the examples that it prints. Starts no worker."""

from pathlib import Path

import pytest

from local.__main__ import assignment, main
from local.examples import openai_example, openai_routes
from local.platform import find_handler
from tests.local.conftest import HANDLERS


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "bge", "--port", "99999"], "--port: '99999' is no number from 0 to 65535"),
        (["serve", "bge", "--port", "-1"], "--port: '-1' is no number from 0 to 65535"),
        (["serve", "bge", "--workers", "0"], "--workers: '0' is no number from 1 to 100"),
        (["serve", "bge", "--env", "NOT_SET_HERE"], "'NOT_SET_HERE' is not NAME=VALUE, nor is it set here"),
        (["run", "bge", "--workers", "2"], "unrecognized arguments: --workers 2"),
    ],
)
def test_invalid_arguments(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_an_unknown_worker(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert main(["serve", "nope"]) == 1
    assert "Workers: bge, " in capsys.readouterr().err


def test_a_variable_without_a_value_has_that_of_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "x=y")
    assert assignment("HERE") == ("HERE", "x=y")
    assert assignment("A=b=c") == ("A", "b=c")


def test_the_example_is_of_a_route_that_the_worker_has() -> None:
    routes = openai_routes(find_handler("sentence-transformers"))
    example = openai_example(routes, url="http://x/v1", test_input=Path("test_input.json"))
    assert example is not None
    assert "client.embeddings.create" in example
    assert openai_routes(HANDLERS / "tokens.py") == []
    assert openai_example([], url="http://x/v1", test_input=Path("test_input.json")) is None
