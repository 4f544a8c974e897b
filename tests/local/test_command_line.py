"""Wrong arguments of `python -m local`: one line that says what is allowed, and no worker is started."""

import pytest

from local.__main__ import main


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
def test_wrong_arguments_are_told(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


def test_an_unknown_worker_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert main(["serve", "nope"]) == 1
    assert "Workers: bge, " in capsys.readouterr().err
