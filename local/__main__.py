"""`python -m local serve <worker>`: an endpoint on this machine until Ctrl-C. `python -m local run <worker>`:
the worker's test_input.json, or the job of --input, through /runsync, once. With --image its image runs, not
its handler's file; with --mode http the endpoint is a load balancer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from aiohttp import ClientSession

from local import Endpoint, Rules, WorkerFailed, running
from local.containers import Container
from local.examples import http_commands, native_command, openai_example, openai_routes
from local.platform import find_handler

_READY_TIMEOUT = 3600.0
_KEY = {"Authorization": "Bearer local"}


def serve(arguments: argparse.Namespace, handler: Path) -> int:
    """Run an endpoint until it is interrupted."""
    with _start(arguments, handler) as endpoint:
        print(_guide(endpoint, handler, arguments.mode, _input(arguments, handler)), flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("\nStopping: the workers finish their jobs.", flush=True)
    return 0


def run(arguments: argparse.Namespace, handler: Path) -> int:
    """Send test_input.json through the worker and print the answer; 0 when the job is COMPLETED."""
    body = json.loads(_input(arguments, handler).read_text())
    with _start(arguments, handler, Rules(wait=600, wait_range=(1, 600))) as endpoint:
        begin = time.monotonic()
        answer = endpoint.call(_send("POST", f"{endpoint.endpoint_url}/runsync", body))
        milliseconds = 1000 * (time.monotonic() - begin)
        if arguments.show and "output" in answer:
            arguments.show(answer["output"], endpoint)
        else:
            print(json.dumps(_shorten(answer), indent=2, ensure_ascii=False))
        (worker,) = endpoint.workers
        ready = "/ping is 200" if arguments.mode == "http" else "first request for a job"
        for name, seconds in {**worker.phases, ready: worker.ready_after or 0}.items():
            print(f"{name:>24} {seconds:9.3f} s")
        print(f"{'request to answer':>24} {milliseconds:9.1f} ms")
    return 0 if answer.get("status") == "COMPLETED" else 1


def _start(
    arguments: argparse.Namespace, handler: Path, rules: Rules | None = None
) -> AbstractContextManager[Endpoint]:
    what = arguments.image or f"{handler.parent.name}/{handler.name}"
    print(f"Starting {what} ...", file=sys.stderr, flush=True)
    container = Container(arguments.image, arguments.docker) if arguments.image else None
    return running(
        handler,
        container=container,
        workers=arguments.workers,
        env=dict(arguments.env),
        rules=rules,
        port=arguments.port,
        mode=arguments.mode,
        ready_timeout=_READY_TIMEOUT,
        echo=arguments.verbose,
    )


def _guide(endpoint: Endpoint, handler: Path, mode: str, test_input: Path) -> str:
    """The addresses, and examples that work when they are pasted."""
    http, routes = mode == "http", openai_routes(handler)
    paths = "runsync, ping, health, metrics, docs" if http else "run, runsync, status, stream, cancel, health"
    commands = []
    if http and routes:
        (model, *_) = endpoint.call(_send("GET", f"{endpoint.openai_url}/models"))["data"]
        commands = http_commands(routes, url=endpoint.url, test_input=test_input, model=model["id"])
    if test_input.is_file():
        commands.append(native_command(url=endpoint.endpoint_url, test_input=test_input))
    example = openai_example(routes, url=endpoint.openai_url, test_input=test_input, mode=mode)
    return "\n".join(
        [
            f"RunPod's API      {endpoint.endpoint_url}   ({paths})",
            f"OpenAI's API      {endpoint.openai_url}",
            *(["\nWith curl:\n", "\n\n".join(commands)] if commands else []),
            *(["\nWith OpenAI's client, in Python:\n", example] if example else []),
            "\nCtrl-C stops it.",
        ]
    )


async def _send(method: str, url: str, body: Any = None) -> dict[str, Any]:
    async with (
        ClientSession() as session,
        session.request(method, url, json=body, headers=_KEY) as response,
    ):
        answer: dict[str, Any] = await response.json()
        return answer


def _shorten(value: Any) -> Any:
    """`value` for the eye: long texts and lists are cut."""
    if isinstance(value, str) and len(value) > 300:
        return f"{value[:300]}... ({len(value)} characters)"
    if isinstance(value, list):
        short = [_shorten(item) for item in value[:4]]
        return [*short, f"... ({len(value)} in all)"] if len(value) > 4 else short
    if isinstance(value, dict):
        return {key: _shorten(item) for key, item in value.items()}
    return value


def _input(arguments: argparse.Namespace, handler: Path) -> Path:
    path: Path = arguments.input or handler.parent / "test_input.json"
    return path


def assignment(text: str) -> tuple[str, str]:
    """The name and value of a variable: `NAME=VALUE`, or `NAME` for its value in this environment."""
    name, equals, value = text.partition("=")
    if not name or not (equals or name in os.environ):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, nor is it set here")
    return name, value if equals else os.environ[name]


def _number(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {low} to {high}")
        return int(text)

    return parse


def main(argv: list[str] | None = None, *, show: Callable[[Any, Endpoint], None] | None = None) -> int:
    """The exit status: 0 for success, 1 for a worker or a job that failed, 2 for wrong arguments.

    show: prints the output of the job that `run` has sent, in place of its JSON.
    """
    parser = argparse.ArgumentParser(prog="python -m local", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, command in (("serve", serve), ("run", run)):
        sub = commands.add_parser(name, help=command.__doc__)
        sub.set_defaults(command=command)
        sub.add_argument("worker", help="a folder under workers/, or a handler's .py file")
        sub.add_argument(
            *("--env", "-e"),
            metavar="NAME[=VALUE]",
            type=assignment,
            action="append",
            default=[],
            help="a variable for the worker; without a value, the one of this environment",
        )
        sub.add_argument(
            "--mode",
            choices=["queue", "http"],
            default="queue",
            help="the endpoint type; http: load balancer",
        )
        sub.add_argument(
            "--input", metavar="FILE", type=Path, help="the job, in place of the worker's test_input.json"
        )
        sub.add_argument("--image", help="run this image, not the handler's file; needs Docker")
        sub.add_argument(
            "--docker",
            metavar="OPTION",
            action="append",
            default=[],
            help="an option of docker run, as in --docker=--gpus=all",
        )
        sub.add_argument("--port", type=_number(0, 65535), default=8000 if name == "serve" else 0)
        if name == "serve":
            sub.add_argument("--workers", type=_number(1, 100), default=1)
            sub.set_defaults(verbose=True)
        else:
            sub.add_argument("--verbose", action="store_true", help="print the worker's log")
            sub.set_defaults(workers=1, show=show)
    arguments = parser.parse_args(argv)
    # Whoever ends this politely gets what Ctrl-C does; a shell's background jobs begin with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        status: int = arguments.command(arguments, find_handler(arguments.worker))
    except (FileNotFoundError, WorkerFailed, TimeoutError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
