"""schemathesis against each worker: no 500, and each answer is one that /openapi.json states."""

from __future__ import annotations

import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from tests.shared.http.servers import running
from tests.workers.vllm.test_handler import env_of
from tools.models import local_env
from tools.workers import load_handler, worker_names

pytestmark = pytest.mark.engine
EXAMPLES = int(os.environ.get("OPENAPI_EXAMPLES", "2"))  # of each operation, right ones and wrong ones
CHECKS = [
    not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_headers_conformance, checks.response_schema_conformance,
]  # fmt: skip
NOISE = load_handler("whisper").noise_file(0.5)
PNG = "iVBORw0KGgoAAAANSUhEUgAAAEAAAAAwCAIAAAAuKetIAAAAQElEQVR42u3PQQ0AAAgEoNP+nbWCXzdoQE1+6wgICAgICAgICAgI"
PNG += "CAgICAgICAgICAgICAgICAgICAgICAgIHC36dwFfYw5C7wAAAABJRU5ErkJggg=="
CHAT = {"messages": [{"role": "user", "content": "Name one river."}], "max_tokens": 4}
TEXT = {"prompt": "One river:", "max_tokens": 4}
STREAM = {"stream": True}
KINDS = ("json", "verbose_json", "text", "srt", "vtt")
RANK = {"query": "a", "documents": ["a", "b"]}
CHATS = [CHAT, CHAT | STREAM | {"stream_options": {"include_usage": True}}]
# Bodies that are answered with 200. /runsync takes them within `input`.
GOOD: dict[str, dict[str, list[dict[str, Any]]]] = {
    "bge": {
        "/runsync": [{"text": "a"}, RANK | {"return_documents": True}],
        "/v1/embeddings": [{"input": ["a", "b"]}],
        "/v1/rerank": [RANK],
        "/v2/rerank": [RANK],
    },
    "florence2": {"/runsync": [{"image": PNG, "task": "OD"}, {"images": [PNG], "task": "OCR"}]},
    "huggingface": {
        "/runsync": [TEXT | {"logprobs": 2, "n": 2}, TEXT | STREAM],
        "/v1/chat/completions": [*CHATS, CHAT | {"logprobs": True, "top_logprobs": 2}],
        "/v1/completions": [TEXT | {"prompt": [[5, 6], [7]]}, TEXT | STREAM],
    },
    "llava": {
        "/runsync": [{"image": PNG, "max_tokens": 4}, {"image": PNG, "max_tokens": 4} | STREAM],
        "/v1/chat/completions": CHATS,
    },
    "sentence-transformers": {
        "/runsync": [{"texts": ["a"], "encoding_format": "base64"}],
        "/v1/embeddings": [{"input": "a"}, {"input": "a", "encoding_format": "base64"}],
    },
    "tgi": {
        "/runsync": [TEXT, TEXT | STREAM],
        "/v1/chat/completions": CHATS,
        "/v1/completions": [TEXT, TEXT | STREAM],
    },
    "vllm": {"/runsync": [TEXT, TEXT | STREAM], "/v1/completions": [TEXT, TEXT | STREAM]},
    "whisper": {
        "/runsync": [{"audio": NOISE, "word_timestamps": True}, {"audio": NOISE} | STREAM],
        "/v1/audio/transcriptions": [
            {"file": NOISE} | STREAM,
            *({"file": NOISE, "response_format": kind} for kind in KINDS),
        ],
    },
    "xtts": {
        "/runsync": [{"text": "Hi."}, {"voices": True}, {"text": "Hi."} | STREAM],
        "/v1/audio/speech": [{"input": "Hi.", "voice": "alloy"}],
    },
}  # fmt: skip


def short(body: Any) -> Any:
    """The body with a few tokens at most, where it asks for text."""
    if not isinstance(body, dict):
        return body
    body = {name: short(part) if name in ("input", "openai_input") else part for name, part in body.items()}
    long = [name for name in ("max_tokens", "max_completion_tokens") if type(body.get(name)) is int]
    unset = ["max_tokens"] if {"messages", "prompt"} & body.keys() and "max_tokens" not in body else []
    return body | {name: min(body.get(name, 8), 8) for name in long or unset}


@pytest.mark.parametrize("worker", worker_names())
def test_answers_are_those_of_the_openapi_document(worker: str) -> None:
    env = env_of() if worker == "vllm" else local_env(worker)
    env = {**env, "OMP_NUM_THREADS": "1", "PREWARM": "false"}
    with running(module=f"workers.{worker}.handler", **env) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = {result.ok().path: result.ok() for result in schema.get_all_operations()}
        for path, bodies in GOOD[worker].items():
            for good in bodies:
                body = {"input": good} if path == "/runsync" else good
                case = operations[path].Case(body=body, media_type="application/json")
                response = case.call(timeout=60)
                assert response.status_code == 200, response.text
                case.validate_response(response, checks=CHECKS)
        for operation in operations.values():
            for mode in GenerationMode:

                @given(operation.as_strategy(generation_mode=mode))
                @settings(
                    max_examples=EXAMPLES,
                    deadline=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                def call(case: Any) -> None:
                    case.body = short(case.body)
                    case.validate_response(case.call(timeout=60), checks=CHECKS)

                if mode.is_positive or operation.method == "post":
                    call()
