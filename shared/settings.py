"""A worker's settings: environment variables, typed and bounded; a wrong one is a one-line error."""

from __future__ import annotations

import os
import re
from typing import Any, Literal, TypeVar

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import StartError

_SECRET = re.compile(r"\{\{\s*RUNPOD_SECRET_(\w+)\s*\}\}")
DType = Literal["auto", "bfloat16", "float16", "float32"]


class EnvironmentSettings(BaseSettings):
    """Settings read from the environment: the field `max_concurrency` is the variable `MAX_CONCURRENCY`.

    White space around a value is removed, and an empty variable counts as unset.
    """

    model_config = SettingsConfigDict(
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _strip(cls, values: dict[str, Any]) -> dict[str, Any]:
        stripped = {
            name: value.strip() if isinstance(value, str) else value for name, value in values.items()
        }
        return {name: value for name, value in stripped.items() if value != ""}


class WorkerSettings(EnvironmentSettings):
    """The settings of all workers. A worker gives `model_name` its default and adds its own fields."""

    model_name: str = Field(description="Model id on the Hugging Face Hub, or a folder")
    model_revision: str | None = Field(None, description="Branch, tag or commit of the model")
    served_model_name: str | None = Field(
        None, description="Name of the model in requests and answers; MODEL_NAME when unset"
    )
    hf_token: SecretStr | None = Field(None, description="Hugging Face token, for gated and private models")
    dtype: DType = Field("auto", description="bfloat16 where the GPU has it, float16 else, float32 on CPU")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:<index>"
    )
    trust_remote_code: bool = Field(False, description="Run Python code that the model's repository ships")
    max_concurrency: int = Field(
        64, ge=1, le=1024, description="Jobs that one worker takes at a time; constant while it lives"
    )
    serve_mode: Literal["queue", "http"] = Field(
        "queue", description="queue: a queue endpoint; http: a load-balancing endpoint, a Pod or a laptop"
    )
    prewarm: bool = Field(True, description="Run a few small requests before the first job")
    max_result_mb: float = Field(
        10, gt=0, le=20, description="Largest result in MB: RunPod takes 10 after /run and 20 after /runsync"
    )

    @property
    def public_name(self) -> str:
        """The model's name in requests and answers."""
        return self.served_model_name or self.model_name


class HttpSettings(EnvironmentSettings):
    """The settings of HTTP mode, SERVE_MODE=http."""

    port: int = Field(8000, ge=1, le=65535, description="Port of the HTTP server")
    port_health: int | None = Field(None, ge=1, le=65535, description="Port of the health check; unset: PORT")
    health_check_path: str = Field("/ping", pattern=r"^/[\w./-]*$", description="Path of the health check")
    host: str = Field("0.0.0.0", description="Address to listen on")  # noqa: S104 (a container's own)
    api_key: SecretStr | None = Field(
        None,
        description="Key that clients must send, for Pods and laptops; on RunPod the edge checks its own",
    )
    cors_origins: str | None = Field(
        None, description="Origins of browsers that may call, with commas between, or *; unset: none"
    )
    max_waiting: int | None = Field(
        None, ge=0, le=100_000, description="Requests that wait for a slot; unset: MAX_CONCURRENCY"
    )

    @property
    def origins(self) -> list[str]:
        """CORS_ORIGINS as a list."""
        return [origin.strip() for origin in (self.cors_origins or "").split(",") if origin.strip()]


S = TypeVar("S", bound=EnvironmentSettings)


def read_settings(settings: type[S]) -> S:
    """The settings from the environment.

    Raises StartError: one line with the variable, its value unless it is a secret, and what is allowed, with
    code="bad_setting"; code="missing_secret" for a RunPod secret that the account does not have.
    """
    for name, value in os.environ.items():
        if match := _SECRET.search(value):  # RunPod leaves the text of an unknown secret as it is
            message = (
                f"{name} has no value: there is no RunPod secret {match[1]}. Create it, or correct its name."
            )
            raise StartError(message, code="missing_secret")
    try:
        return settings()
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = str(problem["loc"][0])
        annotation = str(settings.model_fields[field].annotation) if field in settings.model_fields else ""
        value = "" if "SecretStr" in annotation else f"={str(problem['input'])[:80]!r}"
        message = f"{field.upper()}{value}: {problem['msg']}."
        if problem["type"] == "missing":
            message = f"{field.upper()} is not set, and this worker has no default for it."
        raise StartError(message, code="bad_setting") from None
