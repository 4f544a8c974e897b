"""A worker without a model, for the tests of HTTP mode: `python -m tests.shared.http.toy`, or imported."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from pydantic import BaseModel, Field

from shared import prewarm, startup, telemetry
from shared.decoding import load_bytes
from shared.device import is_out_of_memory
from shared.errors import JobError, StartError, engine_died, invalid
from shared.jobs import EVENTS, JSON, Job, JobHandler, job_handler
from shared.openai import DONE, ModelList, ModelsRequest, OpenAIRequest, check_model, model_list, usage
from shared.requests import MediaSource, Request
from shared.results import Media
from shared.settings import WorkerSettings, read_settings

Fault = Literal["invalid", "crash", "dead", "memory"]


class Settings(WorkerSettings):
    model_name: str = "toy"
    max_concurrency: int = Field(8, ge=1)
    streaming: bool = True
    load_seconds: float = 0
    load_fails: Literal["no", "always", "once"] = "no"


class WorkRequest(Request):
    text: str = ""
    seconds: float = 0
    size: int = 0
    parts: int = 3
    fail: Fault | None = None
    fail_after: int = 0
    stream: bool = False


class WorkResponse(BaseModel):
    text: str
    modules: list[str] = []
    usage: dict[str, int] = {}


class WorkPart(BaseModel):
    text: str
    number: int


class ChatRequest(OpenAIRequest):
    messages: list[dict[str, Any]]
    model: str | None = None
    temperature: float = 1.0
    fail: Fault | None = None
    fail_after: int = 0
    seconds: float = 0
    stream: bool = False


class TranscribeRequest(OpenAIRequest):
    file: MediaSource
    model: str | None = None
    temperature: float = 0.0
    response_format: Literal["json", "text", "wav"] = "json"
    stream: bool = False


class SpeechRequest(OpenAIRequest):
    input: str
    model: str | None = None
    voice: str = "none"
    parts: int = 3
    size: int = 1000
    fail: Fault | None = None
    stream_over_http: bool = True


def check(fault: Fault | None) -> None:
    match fault:
        case "invalid":
            raise invalid("text", "not to the toy's liking.")
        case "crash":
            raise RuntimeError("secret details")
        case "dead":
            raise engine_died(RuntimeError())
        case "memory":
            error = MemoryError("CUDA out of memory")
            assert is_out_of_memory(error)
            raise error


def event(text: str, finish_reason: str | None) -> str:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "toy", "choices": [choice]}
    return f"data: {json.dumps(chunk)}\n\n"


def make_handler() -> JobHandler:
    """A handler of its own for each test: it counts."""

    @job_handler(
        WorkRequest,
        routes={
            "/v1/chat/completions": ChatRequest,
            "/v1/audio/transcriptions": TranscribeRequest,
            "/v1/audio/speech": SpeechRequest,
            "/v1/models": ModelsRequest,
        },
        answers={
            WorkRequest: {JSON: WorkResponse, EVENTS: WorkPart},
            ChatRequest: {JSON: dict[str, Any], EVENTS: dict[str, Any]},
            TranscribeRequest: {JSON: dict[str, Any], "text/plain": str, "audio/wav": bytes},
            SpeechRequest: {"audio/wav": bytes},
        },
    )
    async def handler(request: Any, job: Job) -> WorkResponse | ModelList | Media | str | dict[str, Any]:
        match request:
            case ModelsRequest():
                return model_list("toy", "org/toy")
            case TranscribeRequest():
                data = await load_bytes(request.file, param="file")
                if request.response_format == "text":
                    return f"{len(data)} bytes"
                if request.response_format == "wav":
                    return Media(data, "audio/wav")
                return {"text": f"{len(data)} bytes", "temperature": request.temperature}
            case ChatRequest():
                check_model(request.model, "toy")
                check(request.fail)
                await asyncio.sleep(request.seconds)
                message = {"role": "assistant", "content": "a b c"}
                choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
                counts = usage(2, 3).model_dump()
                return {"id": "c", "object": "chat.completion", "created": 1, "model": "toy",
                        "choices": choices, "usage": counts}  # fmt: skip
            case SpeechRequest():
                raise JobError("The toy's speech is streamed.", code="internal_error", type="server_error")
        check(request.fail)
        begin = time.perf_counter()
        await asyncio.sleep(request.seconds)
        telemetry.observe("model", time.perf_counter() - begin)
        modules = [name for name in ("runpod", "torch") if name in sys.modules]
        return WorkResponse(text=request.text or "x" * request.size, modules=modules)

    @handler.streamed
    async def stream(request: Any, job: Job) -> AsyncIterator[Any]:
        parts = getattr(request, "parts", 3)
        for number in range(parts):
            if number == getattr(request, "fail_after", parts - 1):
                check(getattr(request, "fail", None))
            match request:
                case SpeechRequest():
                    yield Media(b"\1" * request.size, "audio/wav")
                case WorkRequest():
                    yield {"text": request.text or "x" * request.size, "number": number}
                case _:
                    yield event("abc"[number], "stop" if number == parts - 1 else None)
            await asyncio.sleep(getattr(request, "seconds", 0))
        if isinstance(request, ChatRequest):
            yield DONE

    return handler


handler = make_handler()


def prepare() -> Settings:
    settings = read_settings(Settings)
    time.sleep(settings.load_seconds)
    if settings.load_fails == "always":
        raise StartError("The toy is broken. Buy another.", code="broken_toy")
    if settings.load_fails == "once":
        raise RuntimeError("the hub does not answer")
    with startup.phase("load"):
        prewarm.run(handler, [{"text": "warm"}])
    return settings


if __name__ == "__main__":
    startup.serve(handler, prepare, worker="toy")
