"""Examples of a worker's routes, with curl and in Python, which `python -m local serve` prints."""

from __future__ import annotations

import importlib
import json
import shlex
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import Any

_CLIENT = """
from openai import OpenAI

client = OpenAI(base_url="{url}", api_key="local")
model = client.models.list().data[0].id
"""
# The first that the worker has is shown. A queue carries JSON alone, so audio goes in and out as base64. What
# speaks in whisper's test_input.json is synthetic: voice activity detection takes it for noise.
_EXAMPLES = {
    "/v1/chat/completions": """
        messages = [{{"role": "user", "content": "Say hello in three languages."}}]
        for part in client.chat.completions.create(model=model, messages=messages, stream=True):
            print(part.choices[0].delta.content or "" if part.choices else "", end="", flush=True)
        """,
    "/v1/embeddings": """
        vectors = client.embeddings.create(model=model, input=["A cat sat on the mat.", "It rains."])
        print([len(item.embedding) for item in vectors.data])
        """,
    "/v1/audio/transcriptions": """
        import json
        audio = json.load(open("{test_input}"))["input"]["audio"]
        body = {{"model": model, "file": audio, "vad": False}}
        print(client.post("/audio/transcriptions", body=body, cast_to=object))
        """,
    "/v1/audio/speech": """
        import base64, json
        reply = client.audio.speech.create(model=model, voice="nova", input="Good morning.")
        print(open("speech.mp3", "wb").write(base64.b64decode(json.loads(reply.content)["audio"])))
        """,
    "/v1/models": """
        print(model)
        """,
}

# A load balancer carries files and audio as they are.
_HTTP_EXAMPLES = _EXAMPLES | {
    "/v1/audio/transcriptions": """
        import base64, json
        audio = base64.b64decode(json.load(open("{test_input}"))["input"]["audio"])
        file, options = ("speech.ogg", audio), {{"vad": False}}
        print(client.audio.transcriptions.create(model=model, file=file, extra_body=options).text)
        """,
    "/v1/audio/speech": """
        speech = client.audio.speech.with_streaming_response
        with speech.create(model=model, voice="nova", input="Good morning.") as reply:
            reply.stream_to_file("speech.mp3")
        print(open("speech.mp3", "rb").seek(0, 2))
        """,
}
_BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Name three rivers."}], "stream": True},
    "/v1/embeddings": {"input": ["A cat sat on the mat.", "It rains."]},
    "/v1/audio/speech": {"input": "Good morning.", "voice": "nova"},
    "/v1/rerank": {"query": "weather", "documents": ["A cat sat on the mat.", "It rains."]},
}
_WRITE_AUDIO = """\
python3 -c 'import base64, json
audio = json.load(open("{test_input}"))["input"]["audio"]
open("speech.ogg", "wb").write(base64.b64decode(audio))'
"""


def openai_routes(handler: Path) -> list[str]:
    """The OpenAI routes of a worker under workers/; none for a handler elsewhere, which is not imported."""
    root = Path(__file__).resolve().parents[1]
    if handler.parent.parent != root / "workers":
        return []
    module = importlib.import_module(f"workers.{handler.parent.name}.handler")
    return list(module.handler.routes)


def openai_example(routes: Collection[str], *, url: str, test_input: Path, mode: str = "queue") -> str | None:
    """A program that calls one of `routes` with OpenAI's client; None without a route of OpenAI's.

    url: the client's `base_url`. test_input: the worker's test_input.json, which has the audio. mode: the
    endpoint's type, queue or http.
    """
    examples = _HTTP_EXAMPLES if mode == "http" else _EXAMPLES
    route = _first(routes)
    if route is None:
        return None
    text = _CLIENT + textwrap.dedent(examples[route]).lstrip()
    return text.format(url=url, test_input=test_input).strip()


def native_command(*, url: str, test_input: Path) -> str:
    """A curl command that sends the worker's test_input.json to `/runsync` of the endpoint at `url`."""
    body = json.dumps(json.loads(test_input.read_text()), ensure_ascii=False)
    return _curl_json(f"{url}/runsync", body if len(body) < 500 else f"@{test_input}")


def http_commands(routes: Collection[str], *, url: str, test_input: Path, model: str) -> list[str]:
    """curl commands for OpenAI routes of the load balancer at `url`: that of `openai_example`, and rerank."""
    first = _first(routes)
    chosen = [first, "/v1/rerank"] if first == "/v1/embeddings" and "/v1/rerank" in routes else [first]
    commands = []
    for route in filter(None, chosen):
        address = f"{url}{route}"
        if route == "/v1/models":
            commands.append(_curl(address))
        elif route == "/v1/audio/transcriptions":
            form = _curl(address, "-F", f"model={model}", "-F", "vad=false", "-F", "file=@speech.ogg")
            commands.append(_WRITE_AUDIO.format(test_input=test_input) + form)
        else:
            options = {"/v1/audio/speech": ["-o", "speech.mp3"], "/v1/chat/completions": ["-N"]}.get(
                route, []
            )
            commands.append(_curl_json(address, json.dumps({"model": model, **_BODIES[route]}), *options))
    return commands


def _first(routes: Collection[str]) -> str | None:
    return next((route for route in _EXAMPLES if route in routes), None)


def _curl(url: str, *options: str) -> str:
    command = f"curl -s {url} -H 'Authorization: Bearer local'"
    return f"{command} \\\n  {shlex.join(options)}" if options else command


def _curl_json(url: str, body: str, *options: str) -> str:
    return _curl(url, *options, "-H", "Content-Type: application/json", "-d", body)
