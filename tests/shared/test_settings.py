"""Settings from environment variables."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field, SecretStr

from shared.errors import StartError
from shared.settings import HttpSettings, WorkerSettings, read_settings

TOKEN = "hf_" + "x" * 30


class Settings(WorkerSettings):
    model_name: str = "some/model"
    mode: Literal["fast", "small"] = "fast"
    pin: SecretStr | None = Field(None, max_length=4)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields:
        monkeypatch.delenv(field.upper(), raising=False)
    for name in ("RUNPOD_ENDPOINT_ID", "RUNPOD_LOG_LEVEL", "RUNPOD_DEBUG_LEVEL"):
        monkeypatch.delenv(name, raising=False)


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields:
        monkeypatch.setenv(field.upper(), "")
    assert read_settings(Settings) == Settings.model_construct(**Settings().model_dump())
    assert read_settings(Settings).model_name == "some/model"


def test_space_around_a_value_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"MODEL_NAME": "  ", "MODE": "small ", "PREWARM": " false", "HF_TOKEN": f"{TOKEN}\n"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = read_settings(Settings)
    assert (settings.model_name, settings.mode, settings.prewarm) == ("some/model", "small", False)
    assert settings.hf_token is not None
    assert settings.hf_token.get_secret_value() == TOKEN


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("MAX_CONCURRENCY", "many", "integer"),
        ("MAX_CONCURRENCY", "0", "greater than or equal to 1"),
        ("MODE", "slow", "'fast' or 'small'"),
        ("DTYPE", "int3", "'float16'"),
        ("PREWARM", "perhaps", "boolean"),
        ("DEVICE", "tpu", "auto|cpu|cuda"),
    ],
)
def test_an_invalid_setting(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, allowed: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(StartError) as caught:
        read_settings(Settings)
    assert caught.value.code == "bad_setting"
    assert caught.value.message.startswith(f"{variable}={value!r}: ")
    assert allowed in caught.value.message
    assert "\n" not in caught.value.message


def test_a_secret_that_runpod_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "{{ RUNPOD_SECRET_hf_token }}")
    with pytest.raises(
        StartError, match="HF_TOKEN has no value: there is no RunPod secret hf_token"
    ) as caught:
        read_settings(Settings)
    assert caught.value.code == "missing_secret"


def test_a_missing_value_is_named() -> None:
    with pytest.raises(StartError, match="MODEL_NAME is not set"):
        read_settings(WorkerSettings)


def test_a_secret_is_in_no_repr_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert TOKEN not in repr(read_settings(Settings))
    monkeypatch.setenv("PIN", "123456")
    with pytest.raises(StartError) as caught:
        read_settings(Settings)
    assert "123456" not in caught.value.message
    assert caught.value.message.startswith("PIN: ")


def test_clients_know_the_model_by_its_served_name() -> None:
    assert Settings().public_name == "some/model"
    assert Settings(served_model_name="mine").public_name == "mine"


def test_origins_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings(HttpSettings).origins == []
    monkeypatch.setenv("CORS_ORIGINS", " https://a.example ,https://b.example, ")
    assert read_settings(HttpSettings).origins == ["https://a.example", "https://b.example"]
