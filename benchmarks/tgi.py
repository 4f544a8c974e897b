"""workers/tgi beside the naive handler and beside its own server, asked without it: what the hop costs.

TGI itself needs a GPU and its image: in its place runs tools/stand_ins/tgi.py, which speaks its API and gives
random words, a token each 10 ms however many requests there are. So the worker is measured, and TGI is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from benchmarks import servers
from benchmarks.harness import machine, table, write
from benchmarks.servers import TOKENS
from serving.engine_server.process import EngineServer
from tools.models import local_env

STEP_MS = 10


def asked(prompt: str, tokens: int, stream: bool) -> dict[str, Any]:
    return {"prompt": paced(prompt), "max_tokens": tokens, "temperature": 0.0, "stream": stream}


def paced(prompt: str) -> str:
    """The stand-in takes STEP_MS for each token then, and goes on to max_tokens."""
    return f"{prompt} [[slow {STEP_MS}]]"


def direct(prompt: str, tokens: int, stream: bool) -> tuple[str, dict[str, Any]]:
    body = {"inputs": paced(prompt), "parameters": {"max_new_tokens": tokens, "details": True}}
    return ("/generate_stream" if stream else "/generate"), body


TGI = servers.Kind("tgi", job=asked, direct=direct, event=b"data:{", token=re.compile(r'"response": "[^"]'))


@contextmanager
def alone(env: Mapping[str, str]) -> Iterator[str]:
    """The address of a server that runs by itself, for the naive handler."""
    command = ["text-generation-launcher", "--model-id", env["MODEL_NAME"], "--hostname", "127.0.0.1"]
    server = EngineServer("tgi", lambda port: [*command, "--port", str(port)], env=env)
    server.start()
    try:
        yield server.url
    finally:
        server.stop()


def measure() -> dict[str, Any]:
    env, prompts = local_env("tgi"), servers.prompts()
    crowd = [asked(prompt, TOKENS, False) for prompt in prompts]
    print("  this worker", flush=True)
    found = servers.measure(TGI, env, prompts)
    print("  naive", flush=True)
    with alone(env) as url:
        found["naive burst"] = servers.measure_naive("tgi.py", {"TGI_URL": url}, crowd)
    print("  no-op handler", flush=True)
    found["no-op burst"] = servers.measure_noop(crowd)
    return found


def report(found: dict[str, Any], where: dict[str, str]) -> tuple[str, dict[str, Any]]:
    aims = servers.goals(found)
    text = f"""# tgi

**Not TGI itself**, which needs a GPU, but the project's stand-in for its server (tools/stand_ins/tgi.py): it
speaks TGI's API and gives random words, a token each {STEP_MS} ms however many requests there are. What is
measured is the worker in front of it.

{servers.HOW}
{servers.noop_line(found["no-op burst"])}
Written by `python -m benchmarks tgi`.

{servers.goal_table(aims)}

{servers.time_table(found)}

{table(["machine", ""], list(where.items()))}

Not measured: TGI, and a GPU, for want of one.
"""
    return text, {"machine": where, **found, "goals": aims}


def main() -> None:
    where = machine("runpod", "aiohttp")
    write("tgi", *report(measure(), where))


if __name__ == "__main__":
    main()
