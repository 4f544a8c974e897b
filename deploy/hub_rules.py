"""The files that RunPod's Hub reads, by the rules of its publishing guide.

https://docs.runpod.io/hub/publishing-guide. What the guide leaves open is refused here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

# The guide's list; handler.py may lie in the root or in .runpod.
FILES = ("handler.py", "Dockerfile", "README.md", ".runpod/hub.json", ".runpod/tests.json")
Cuda = Annotated[str, Field(pattern=r"^\d+\.\d+$")]
Value = str | float | bool


class Rules(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Option(Rules):
    label: str
    value: str


class Input(Rules):
    """A field of the form in which a user deploys."""

    name: str = Field(min_length=1)
    type: Literal["string", "number", "boolean", "huggingface"]
    description: str = ""
    default: Value | None = None
    required: bool = False
    advanced: bool = False
    options: list[Option] | None = None
    min: float | None = None
    max: float | None = None
    true_value: str | None = Field(None, alias="trueValue")
    false_value: str | None = Field(None, alias="falseValue")

    @model_validator(mode="after")
    def _default_is_allowed(self) -> Input:
        if self.default is None:
            return self
        kinds = {"number": (int, float), "boolean": (bool,)}
        if not isinstance(self.default, kinds.get(self.type, (str,))):
            raise ValueError(f"default {self.default!r} of {self.name} is no {self.type}")
        if self.options and self.default not in [option.value for option in self.options]:
            raise ValueError(f"default {self.default!r} of {self.name} is none of its options")
        if isinstance(self.default, int | float):
            low, high = self.min, self.max
            if (low is not None and self.default < low) or (high is not None and self.default > high):
                raise ValueError(f"default {self.default!r} of {self.name} is out of bounds")
        return self


class Variable(Rules):
    """A variable of the worker: a value, or a field of the form."""

    key: str = Field(pattern=r"^[A-Z_][A-Z0-9_]*$")
    value: str | None = None
    input: Input | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Variable:
        if (self.value is None) == (self.input is None):
            raise ValueError(f"{self.key} has either a value or an input")
        return self


class HubConfig(Rules):
    runs_on: Literal["GPU"] = Field(alias="runsOn")
    endpoint_type: Literal["LB"] | None = Field(None, alias="endpointType")
    disk: int = Field(alias="containerDiskInGb", ge=5)
    gpu_count: int = Field(alias="gpuCount", ge=1)
    # Pools, and types of GPU to leave out, each after a minus.
    gpus: str = Field(alias="gpuIds", pattern=r"^[A-Z0-9_]+(,[A-Z0-9_]+)*(,-[\w ]+)*$")
    cuda: list[Cuda] = Field(alias="allowedCudaVersions", min_length=1)
    env: list[Variable]

    @model_validator(mode="after")
    def _keys_differ(self) -> HubConfig:
        keys = [variable.key for variable in self.env]
        if len(keys) != len(set(keys)):
            raise ValueError("a variable is in env twice")
        return self


class HubJson(Rules):
    title: str = Field(min_length=1)
    # The Hub's database has 191 characters for it.
    description: str = Field(min_length=1, max_length=189)
    type: Literal["serverless"]
    category: Literal["audio", "embedding", "language", "video", "image"]
    config: HubConfig


class Test(Rules):
    """timeout: milliseconds."""

    name: str = Field(min_length=1)
    input: dict[str, Any] = Field(min_length=1)
    timeout: int = Field(ge=1000)


class StaticVariable(Rules):
    key: str
    value: str


class TestsConfig(Rules):
    gpu: str = Field(alias="gpuTypeId", min_length=1)
    gpu_count: int = Field(alias="gpuCount", ge=1)
    cuda: list[Cuda] = Field(alias="allowedCudaVersions", min_length=1)
    env: list[StaticVariable]


class TestsJson(Rules):
    tests: list[Test] = Field(min_length=1)
    config: TestsConfig


def problems(tree: Path) -> list[str]:
    """What keeps `tree` from being published, a line each."""
    found = [f"{name}: missing" for name in FILES if not (tree / name).is_file()]
    models: dict[str, type[BaseModel]] = {".runpod/hub.json": HubJson, ".runpod/tests.json": TestsJson}
    for name, model in models.items():
        if (tree / name).is_file():
            try:
                model.model_validate_json((tree / name).read_bytes())
            except ValidationError as error:
                for problem in error.errors(include_url=False):
                    found.append(f"{name}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}")
    return found
