"""What the installed vLLM takes, as JSON: `python dump_flags.py` prints the table, with FILE it compares.

Run by vLLM's own Python: while the image is built, by the tests and by `make lock`. engine.json is its output
for the version that the Dockerfile names; the worker reads that file and needs no code for a new flag.

flags: each flag of `vllm serve` without its dashes, and what follows it:
    pair (nothing; has a --no- form), switch (nothing), int, float, text, list (several arguments), repeat
environment: the variables that vLLM reads itself.
fields: what the bodies of its chat and completion routes take.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any


def kind(action: argparse.Action) -> str:
    if isinstance(action, argparse.BooleanOptionalAction):
        return "pair"
    if action.nargs == 0:
        return "switch"
    if action.nargs == "+":
        return "list"
    if type(action).__name__ == "_AppendAction":
        return "repeat"
    return {int: "int", float: "float"}.get(action.type, "text")  # type: ignore[call-overload,no-any-return]


def dump() -> dict[str, Any]:
    logging.disable(logging.CRITICAL)
    import vllm
    import vllm.engine.arg_utils  # first: the others import each other in a circle
    from vllm import envs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    flags = {}
    for action in make_arg_parser(FlexibleArgumentParser())._actions:
        for option in action.option_strings:
            if option.startswith("--") and not option.startswith("--no-") and option != "--help":
                flags[option[2:]] = kind(action)
    return {
        "vllm": vllm.__version__.partition("+")[0],
        "flags": dict(sorted(flags.items())),
        "environment": sorted(envs.environment_variables),
        "fields": {
            "chat": sorted(ChatCompletionRequest.model_fields),
            "completion": sorted(CompletionRequest.model_fields),
        },
    }


def differences(kept: Any, installed: Any, path: str = "") -> list[str]:
    """What differs, a line each: `flags.some-flag: missing`."""
    if isinstance(kept, list):
        kept, installed = dict.fromkeys(kept, "there"), dict.fromkeys(installed, "there")
    if not isinstance(kept, dict):
        return [] if kept == installed else [f"{path}: kept {kept}, is {installed}"]
    lines = []
    for key in sorted(kept.keys() | installed.keys()):
        where = f"{path}.{key}" if path else key
        if key in kept and key in installed:
            lines += differences(kept[key], installed[key], where)
        else:
            lines.append(f"{where}: {'new' if key in installed else 'gone'}")
    return lines


if __name__ == "__main__":
    table = dump()
    if len(sys.argv) < 2:
        print(json.dumps(table, indent=1))
    elif lines := differences(json.loads(Path(sys.argv[1]).read_text()), table):
        sys.exit("\n".join([f"{sys.argv[1]} is not what this vLLM takes:", *lines]))
