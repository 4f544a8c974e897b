"""`python -m deploy <command> <worker>`: what the make targets plan-, deploy-, rollback-, status-, logs- and
destroy-<worker> run. RUNPOD_API_KEY is read from the environment. The commands size and hub-export, which
need no account, have options of their own: `python -m deploy size --help`.

Exit status: 0 done, or nothing to do; 1 the endpoint did not get ready, and the earlier release is back;
2 wrong arguments, variables or deploy.toml; 3 RunPod refused, or cannot be reached; 4 two endpoints of one
name, or another deploy at the same time; 5 a question answered with no; 6 no such endpoint, or no earlier
release; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import TextIO

from deploy import commands, hub, size
from deploy.api import Api, ApiError, LogLine
from deploy.commands import Declined, Failed, Missing, Result, Session
from deploy.config import ConfigError
from deploy.plans import TYPES, Conflict, Order
from deploy.rollout import Pace
from tools.workers import worker_names

COMMANDS = {
    "plan": commands.plan,
    "deploy": commands.deploy,
    "rollback": commands.rollback,
    "status": commands.status,
    "destroy": commands.destroy,
}
OFFLINE = {"size": size.main, "hub-export": hub.main}
_STATUS: dict[type[Exception], int] = {
    Failed: 1,
    ConfigError: 2,
    ApiError: 3,
    Conflict: 4,
    Declined: 5,
    Missing: 6,
}


def main(argv: list[str] | None = None, pace: Pace | None = None) -> int:
    """Run one command and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in OFFLINE:
        try:
            return OFFLINE[argv[0]](argv[1:])
        except (ConfigError, ApiError) as error:
            print(error, file=sys.stderr)
            return _STATUS[ApiError if isinstance(error, ApiError) else ConfigError]
    parser = argparse.ArgumentParser(
        prog="python -m deploy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=[*COMMANDS, "logs"])
    parser.add_argument("worker", choices=worker_names())
    parser.add_argument("--name", help="of the endpoint; default: the worker's")
    parser.add_argument(
        "--type", choices=list(TYPES), help="default: the endpoint's, else that of deploy.toml"
    )
    parser.add_argument("--model", default=os.environ.get("MODEL_NAME"), help="MODEL_NAME; default: as it is")
    parser.add_argument("--tag", default=os.environ.get("TAG"), help="of the image; default: as it is")
    parser.add_argument("--config", type=Path, help="in place of workers/<worker>/deploy.toml")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.add_argument("--yes", action="store_true", help="answer every question with yes")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(options, pace or Pace())
    except tuple(_STATUS) as error:
        status = next(number for kind, number in _STATUS.items() if isinstance(error, kind))
        print(error, file=sys.stderr)
        if options.json:
            result = error.result if isinstance(error, Failed) else {}
            print(json.dumps({**result, "error": str(error), "exit": status}))
        return status
    except KeyboardInterrupt:
        if options.command in ("deploy", "rollback"):
            how = f"make deploy-{options.worker} goes on from here, make rollback-{options.worker} goes back"
            print(f"\nInterrupted: {how}.", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, pace: Pace) -> int:
    key = os.environ.get("RUNPOD_API_KEY", "").strip()
    if not key:
        raise ConfigError(
            "RUNPOD_API_KEY is not set: the key of your account, from RunPod's console, Settings."
        )
    name = options.name or options.worker
    order = Order(
        options.worker, name, type=options.type, model=options.model, tag=options.tag, config=options.config
    )
    api = Api(key, back_off=pace.back_off)
    session = Session(api, order, pace, _Progress(sys.stderr if options.json else sys.stdout), options.yes)
    if options.command == "logs":
        commands.logs(session, _print_json_line if options.json else _print_line)
    result: Result = COMMANDS[options.command](session)
    if options.json:
        print(json.dumps({**result, "exit": 0}))
    return 0


class _Progress:
    """Prints lines. Those of a wait, `12 s  ...`: on a terminal in one place, else when the state changes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._state, self._open = stream, "", False

    def __call__(self, text: str) -> None:
        look = re.match(r" *\d+ s  ", text)
        if look and self._stream.isatty():
            self._stream.write(f"\r\033[K{text}")
            self._stream.flush()
            self._open = True
        elif not look or text[look.end() :] != self._state:
            print("\n" * self._open + text, file=self._stream, flush=True)
            self._open = False
        self._state = text[look.end() :] if look else ""


def _print_line(worker: str, line: LogLine) -> None:
    print(f"{worker} {line.source} {line.line}", flush=True)


def _print_json_line(worker: str, line: LogLine) -> None:
    print(json.dumps({"worker": worker, **line.model_dump()}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
