"""The log: one line an event, without secrets."""

from __future__ import annotations

import logging

import pytest

from shared.logs import log

TOKEN = "hf_" + "x" * 30


def test_secrets_are_redacted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "topsecretvalue")
    try:
        raise ValueError(f"{TOKEN} https://user:pass@host/path topsecretvalue")
    except ValueError:
        log.exception("failed")
    out = capsys.readouterr().out
    assert "ValueError" in out
    assert "https://***@host/path" in out
    for secret in (TOKEN, "user:pass", "topsecretvalue"):
        assert secret not in out


def test_lines_are_not_printed_twice(capsys: pytest.CaptureFixture[str]) -> None:
    """The SDK gives the root logger a handler of its own."""
    again = logging.StreamHandler()
    logging.getLogger().addHandler(again)
    try:
        log.info("only once")
    finally:
        logging.getLogger().removeHandler(again)
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("only once") == 1
