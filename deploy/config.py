"""workers/<name>/deploy.toml: the endpoint of a worker, typed. Standard library and pydantic only."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

ROOT = Path(__file__).resolve().parent.parent

Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Pool = Annotated[str, Field(pattern=r"^[A-Z0-9_]+$")]


class Config(BaseModel):
    """The keys of a deploy.toml. Without [env], the worker runs its default model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["queue", "http"] = Field(
        "queue", description="Type of a new endpoint: queue, or http for a load-balancing one"
    )
    pools: list[Pool] = Field(
        min_length=1, description="GPU pools, in order of preference; RunPod's console shows three at most"
    )
    excluded_types: list[str] = Field([], description="GPU types of those pools to leave out, by id")
    gpu_count: int = Field(1, ge=1, le=16, description="GPUs of one worker")
    cuda: str = Field(
        pattern=r"^\d+\.\d+$", description="Lowest CUDA version of a machine's driver: that of the image"
    )
    disk_gb: int = Field(
        20, ge=5, le=4000, description="Container disk in GB, for a model that is downloaded at the start"
    )
    workers_min: int = Field(0, ge=0, le=1000, description="Workers that always run, and are always billed")
    workers_max: int = Field(3, ge=1, le=1000, description="Most workers at a time")
    idle_timeout: int = Field(
        5, ge=1, le=3600, description="Seconds that a worker without work stays; not sent for request_count"
    )
    scaler: Literal["queue_delay", "request_count"] = Field(
        "queue_delay", description="What adds workers to a queue endpoint; an http one has request_count"
    )
    queue_delay: float = Field(
        4, ge=0.5, le=3600, description="Seconds that a job waits before a worker is added"
    )
    request_count: int = Field(
        16, ge=1, le=1024, description="Requests in flight per worker above which one is added"
    )
    execution_timeout: int = Field(600, ge=5, le=604_800, description="Longest run of a job, in seconds")
    flashboot: Literal["off", "on", "priority"] = Field(
        "on", description="FlashBoot: faster starts of a worker that ran before"
    )
    cached_model: bool = Field(
        False, description="Have RunPod keep the model on its machines; its download is then not billed"
    )
    data_centers: list[str] = Field([], description="Data centres to run in; empty: any")
    volumes: list[str] = Field([], description="Ids of network volumes; they fix the data centres")
    registry: str | None = Field(None, description="Id of the credentials for a private registry")
    required: list[Name] = Field(
        [], description="Variables that the worker does not start without, and that only you can set"
    )
    env: dict[Name, str] = Field({}, description="Variables of the worker; its README has them")
    secrets: dict[Name, Name] = Field(
        {}, description='Variables from RunPod secrets, by name: HF_TOKEN = "hf_token"'
    )

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.workers_min > self.workers_max:
            raise ValueError(f"workers_min, {self.workers_min}, is above workers_max, {self.workers_max}")
        if both := self.env.keys() & self.secrets.keys():
            raise ValueError(f"{min(both)} is both in [env] and in [secrets]")
        return self


class ConfigError(Exception):
    """A deploy.toml that cannot be used; the message is one line."""


def load_config(worker: str, path: Path | None = None) -> Config:
    """workers/<worker>/deploy.toml, or the file at `path`. Raises ConfigError, which names the key."""
    path = path or ROOT / "workers" / worker / "deploy.toml"
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    try:
        return Config.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"There is no {name}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: {error}.") from None
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(map(str, problem["loc"]))
        given = f" = {problem['input']!r}" if key and problem["type"] != "missing" else ""
        message = problem["msg"].removeprefix("Value error, ")
        raise ConfigError(": ".join(filter(None, [str(name), key + given, message])) + ".") from None
