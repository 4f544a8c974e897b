"""What `make run-<worker>` sends to a worker with a real model, and how its answer is shown."""

from __future__ import annotations

import base64
import itertools
import json
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from local.endpoint import Endpoint
from tools.models import real
from tools.models.cache import CACHE

QUESTION = "What is the capital of France, and what can I see there? Answer in three sentences."
QUERY = "Wie viel Wasser soll man am Tag trinken?"
PASSAGES = [
    "An adult needs about two litres of fluid a day, more in hot weather or when exercising.",
    "Der Eiffelturm ist ein 330 Meter hoher Eisenfachwerkturm in Paris.",
    "La photosynthèse permet aux plantes de produire du sucre à partir de la lumière.",
    "Los adultos deberían beber entre seis y ocho vasos de agua diarios.",
    "Water boils at a lower temperature on a mountain, because the pressure is lower.",
    "Das Trinkwasser in Berlin kommt aus Brunnen und enthält viel Kalk.",
    "日本の首都は東京で、人口は約千四百万人です。",
]


@dataclass(frozen=True)
class Utterance:
    """A line of an .stm file. start, end: seconds."""

    speaker: str
    start: float
    end: float
    text: str


def telephone_call() -> tuple[bytes, list[Utterance]]:
    """The recording, a WAV file, and its transcript. Raises real.Unavailable."""
    folder = real.folder("telephone-call")
    utterances = []
    for line in (folder / "sample.stm").read_text().splitlines():
        _, _, speaker, start, end, text = line.split(maxsplit=5)
        utterances.append(Utterance(speaker, float(start), float(end), text))
    return (folder / "sample.wav").read_bytes(), utterances


def side_by_side(words: list[dict[str, Any]], utterances: list[Utterance]) -> str:
    """The words recognised, each beside the utterance nearest to its middle."""
    lines: list[list[dict[str, Any]]] = [[] for _ in utterances]
    for word in words:
        middle = (word["start"] + word["end"]) / 2
        distances = [max(utterance.start - middle, middle - utterance.end) for utterance in utterances]
        lines[distances.index(min(distances))].append(word)
    text = [f"  {'recognised':<50}the sample's own transcript"]
    for utterance, line in zip(utterances, lines, strict=True):
        left = f"{line[0]['start']:5.2f} {line[-1]['end']:5.2f}  " if line else ""
        left += " ".join(word["word"] for word in line)
        right = textwrap.wrap(
            f"{utterance.start:5.2f} {utterance.end:5.2f}  {utterance.text}", 60, subsequent_indent=" " * 13
        )
        for a, b in itertools.zip_longest(textwrap.wrap(left, 48, subsequent_indent=" " * 13), right):
            text.append(f"  {a or '':<50}{b or ''}")
    return "\n".join(text)


def show_transcript(output: Any, endpoint: Endpoint) -> None:
    print(
        f"\n{output['model']}, language {output['language']}, {output['duration']:g} s of a telephone call\n"
    )
    print(side_by_side(output["words"], telephone_call()[1]), "\n")


def show_ranking(output: Any, endpoint: Endpoint) -> None:
    print(f"\n{output['model']} ranks {len(PASSAGES)} passages by: {QUERY}\n")
    for result in output["results"]:
        print(f"  {result['relevance_score']:.3f}  {PASSAGES[result['index']]}")
    print()


def show_chat(output: Any, endpoint: Endpoint) -> None:
    """One more question, streamed by OpenAI's client."""
    client = OpenAI(base_url=endpoint.openai_url, api_key="local", max_retries=0)
    model = client.models.list().data[0].id
    print(f"\n{model}, streamed to the openai client\n\nuser: {QUESTION}\nassistant: ", end="", flush=True)
    begin, first, parts = time.monotonic(), 0.0, 0
    for part in client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=128,
        temperature=0,
        stream=True,
    ):
        if part.choices and (text := part.choices[0].delta.content):
            first, parts = first or time.monotonic(), parts + 1
            print(text, end="", flush=True)
    print(f"\n\n{parts} parts: the first after {first - begin:.2f} s, the last after ", end="")
    print(f"{time.monotonic() - begin:.2f} s\n")


@dataclass(frozen=True)
class Demo:
    """job: the input to send; None for the worker's test_input.json. show: called with its output."""

    job: Callable[[], dict[str, Any]] | None
    show: Callable[[Any, Endpoint], None]


DEMOS = {
    "bge": Demo(lambda: {"query": QUERY, "documents": PASSAGES}, show_ranking),
    "huggingface": Demo(None, show_chat),
    "vllm": Demo(None, show_chat),
    "whisper": Demo(
        lambda: {"audio": base64.b64encode(telephone_call()[0]).decode(), "word_timestamps": True},
        show_transcript,
    ),
}


def job_file(worker: str) -> Path | None:
    """A file with the demo's job, as test_input.json has one; None where that one will do."""
    demo = DEMOS.get(worker)
    if demo is None or demo.job is None:
        return None
    path = CACHE / "jobs" / f"{worker}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"input": demo.job()}))
    return path
