"""The engine's command line and environment, from this process's environment."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from shared.errors import StartError
from shared.logs import log
from shared.volume import ModelPath

from .gpus import count_gpus, usable_gpus
from .schemas import Settings, engine_table
from .variables import FETCHING, OWN, REMOVED, ZERO_IS_UNSET, flags_by_variable

YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")

Flags = dict[str, list[str]]
"""Flag names without dashes, and the arguments that follow each: `{"enforce-eager": [], "seed": ["1"]}`."""


@dataclass
class Command:
    """The engine's command line: `engine_command`, flags, VLLM_EXTRA_ARGS.

    given: the names of the flags that the user has set, in whatever way.
    """

    head: list[str]
    flags: Flags
    extra: list[str]
    given: set[str]

    def default(self, flag: str, *arguments: str) -> bool:
        """Set `flag` unless the user has; whether it was set."""
        if flag in self.given:
            return False
        self.flags[flag] = list(arguments)
        return True

    def arguments(self) -> list[str]:
        flags = (word for flag, values in self.flags.items() for word in (f"--{flag}", *values))
        return [*flags, *self.extra]

    def number(self, flag: str) -> int | None:
        """The value of an integer flag; None where it is the engine's default."""
        text = " ".join(self.arguments()).replace("_", "-")
        values = re.findall(rf"--{flag}[ =](\d+)(?: |$)", text)
        return int(values[-1]) if values else None

    def __call__(self, port: int) -> list[str]:
        return [*self.head, *self.arguments(), "--host", "127.0.0.1", "--port", str(port)]


def build_command(settings: Settings, model: ModelPath, environ: Mapping[str, str]) -> Command:
    """Raises StartError for a value that a flag cannot have, and for flags that the worker sets."""
    flags = read_flags(settings, environ)
    try:
        extra = shlex.split(settings.vllm_extra_args)
    except ValueError as error:
        raise StartError(f"VLLM_EXTRA_ARGS: {error}.", code="bad_setting") from None
    named = {_full_name(word[2:].partition("=")[0]) for word in extra if word.startswith("--")}
    if own := named & (OWN | {"host", "port", "model", "config"}):
        hint = "Set VLLM_CONFIG_FILE" if "config" in own else "Leave it out"
        raise StartError(f"VLLM_EXTRA_ARGS: --{min(own)} is set by the worker. {hint}.", code="bad_setting")
    if settings.vllm_config_file:
        in_file = _config_flags(settings.vllm_config_file)
        if own := in_file & OWN:
            raise StartError(
                f"VLLM_CONFIG_FILE: {min(own)} is set by the worker. Leave it out.", code="bad_setting"
            )
        named |= in_file
    given = {name.removeprefix("no-") for name in named | flags.keys()}
    head = [word.replace("{model}", str(model.path)) for word in shlex.split(settings.engine_command)]
    command = Command(head, flags, extra, given)
    command.default("disable-uvicorn-access-log")
    available = _gpus_for_tensor_parallel(command, count_gpus(environ))
    if available and (gpus := usable_gpus(model.path, available)) > 1:
        command.default("tensor-parallel-size", str(gpus))
    return command


# ---- flags from variables ------------------------------------------------------------------------------


def read_flags(settings: Settings, environ: Mapping[str, str]) -> Flags:
    """The flags that the environment gives. Raises StartError for a value that a flag cannot have."""
    kinds = engine_table()["flags"]
    flags: Flags = {}
    for name, flag in flags_by_variable().items():
        value = environ.get(name, "").strip()
        if value and not (flag in ZERO_IS_UNSET and value == "0"):
            flags.update(_flag(name, value, flag, kinds[flag]))
    backend = settings.vllm_attention_backend
    if backend and backend.upper() == "XFORMERS":
        log.warning(
            "VLLM_ATTENTION_BACKEND=XFORMERS: vLLM does not have it any more, and selects another one"
        )
    elif backend:
        flags.setdefault("attention-backend", [backend])
    flags["served-model-name"] = settings.names
    flags["dtype"] = [settings.dtype]
    if settings.trust_remote_code:
        flags["trust-remote-code"] = []
    if settings.vllm_config_file:
        flags["config"] = [settings.vllm_config_file]
    if "lora-modules" in flags:
        flags.setdefault("enable-lora", [])
    return flags


def _flag(name: str, value: str, flag: str, kind: str) -> Flags:
    """The flag for a variable's value. kind: see dump_flags.py."""
    if kind in ("pair", "switch"):
        if value.lower() in YES:
            return {flag: []}
        if value.lower() in NO:
            return {f"no-{flag}": []} if kind == "pair" else {}
        raise StartError(f"{name}={value[:80]!r}: must be true or false.", code="bad_setting")
    if kind in ("int", "float"):
        try:
            (int if kind == "int" else float)(value)
        except ValueError:
            expected = "an integer" if kind == "int" else "a number"
            raise StartError(f"{name}={value[:80]!r}: must be {expected}.", code="bad_setting") from None
    return {flag: _arguments(name, value) if kind == "list" else [value]}


def _arguments(name: str, value: str) -> list[str]:
    """The arguments of a flag that takes several: a JSON array, one JSON object, or a shell's form."""
    try:
        if value[0] not in "[{":
            return shlex.split(value)
        items = json.loads(value)
    except ValueError as error:
        raise StartError(f"{name}={value[:80]!r}: {error}.", code="bad_setting") from None
    items = items if isinstance(items, list) else [items]
    return [item if isinstance(item, str) else json.dumps(item) for item in items]


# ---- flags of VLLM_EXTRA_ARGS and VLLM_CONFIG_FILE -----------------------------------------------------


def _full_name(flag: str) -> str:
    """The flag that vLLM takes this one for: with underscores, or abbreviated."""
    flag, kinds = flag.replace("_", "-"), engine_table()["flags"]
    matches = [name for name in kinds if name.startswith(flag)]
    return matches[0] if flag not in kinds and len(matches) == 1 else flag


def _config_flags(file: str) -> set[str]:
    """The flags that vLLM's YAML file gives. Raises StartError for one that vLLM could not read."""
    try:
        content = yaml.safe_load(Path(file).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        cause = " ".join(str(error).split())
        raise StartError(f"VLLM_CONFIG_FILE: {cause}.", code="bad_setting") from None
    if not isinstance(content, dict):
        raise StartError("VLLM_CONFIG_FILE: the file has no flags, as in `seed: 1`.", code="bad_setting")
    return {_full_name(str(key)) for key in content}


# ---- GPUs ----------------------------------------------------------------------------------------------

_DIVIDING = {"pipeline-parallel-size", "data-parallel-size", "prefill-context-parallel-size"}
_PLACING = re.compile(r"pipeline-parallel|data-parallel|prefill-context|device-ids|nnodes")


def _gpus_for_tensor_parallel(command: Command, gpus: int) -> int | None:
    """The GPUs for each pipeline stage and data-parallel copy of the user's; None where that is unknown."""
    if any(re.match(r"-(pp|dp|pcp)", word) for word in command.extra):
        return None
    for flag in filter(_PLACING.match, command.given):
        if flag not in _DIVIDING or not (parts := command.number(flag)):
            return None
        gpus //= parts
    return gpus


# ---- the environment -----------------------------------------------------------------------------------


def engine_env(command: Command, *, online: bool) -> dict[str, str | None]:
    """What differs from this process's environment; None removes a variable.

    online: whether the user lets the engine ask the hub, for an adapter, a draft model or the model's code.
    """
    own = [name.upper() for name in Settings.model_fields if name.startswith("vllm_")]
    env: dict[str, str | None] = dict.fromkeys([*own, *(n for n in REMOVED if n.startswith("VLLM_"))])
    env["VLLM_API_KEY"] = None  # the engine listens on loopback only, and its worker has no key
    env["VLLM_NO_USAGE_STATS"] = os.environ.get("VLLM_NO_USAGE_STATS", "1")
    if "VLLM_CACHE_ROOT" in os.environ:  # on the volume: keep what this start measures for later ones
        env["VLLM_ENABLE_STARTUP_PLAN"] = os.environ.get("VLLM_ENABLE_STARTUP_PLAN", "1")
        env["FLASHINFER_WORKSPACE_BASE"] = os.environ.get(
            "FLASHINFER_WORKSPACE_BASE", str(Path(os.environ["VLLM_CACHE_ROOT"]).with_name("flashinfer"))
        )
    if online and command.given & (FETCHING | {"trust-remote-code"}):
        env |= {"HF_HUB_OFFLINE": None, "TRANSFORMERS_OFFLINE": None}
    return env
