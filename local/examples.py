"""Examples in Python of a worker's OpenAI routes, to be pasted: what `python -m local serve` prints."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Collection
from pathlib import Path

_CLIENT = """
from openai import OpenAI

client = OpenAI(base_url="{url}", api_key="local")
model = client.models.list().data[0].id
"""
# The first that the worker has is shown. A queue carries JSON alone, so audio goes in and out as base64.
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
        print(client.post("/audio/transcriptions", body={{"model": model, "file": audio}}, cast_to=object))
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


_HTTP_EXAMPLES = _EXAMPLES | {
    "/v1/audio/transcriptions": """
        import base64, json
        audio = base64.b64decode(json.load(open("{test_input}"))["input"]["audio"])
        print(client.audio.transcriptions.create(model=model, file=("speech.flac", audio)).text)
        """,
    "/v1/audio/speech": """
        speech = client.audio.speech.with_streaming_response
        with speech.create(model=model, voice="nova", input="Good morning.") as reply:
            reply.stream_to_file("speech.mp3")
        """,
}


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
    route = next((route for route in examples if route in routes), None)
    if route is None:
        return None
    text = _CLIENT + textwrap.dedent(examples[route]).lstrip()
    return text.format(url=url, test_input=test_input).strip()
