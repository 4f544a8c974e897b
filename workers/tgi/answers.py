"""Answers: TGI's as this worker's, and as OpenAI's clients expect them; complete and streamed."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from pydantic_core import to_json

from serving.continuous_batching.detokenizer import StopStrings
from serving.streaming import STREAM_LIMIT, relay
from shared.openai import DONE, Usage, usage

from .engine import Engine
from .schemas import ChatRequest, GenerateRequest, GenerateResponse, OpenAICall
from .translate import broken_off, openai_body, parameters

DEFAULT_TOKENS = 512

# ---- the worker's own input ----------------------------------------------------------------------------


async def generate(request: GenerateRequest, engine: Engine) -> GenerateResponse:
    prompt = await engine.prompt_text(request)
    answer, headers = await engine.call(
        "/generate",
        _generate_body(request, prompt, engine),
        request.tgi_names,
        shorten=not request.max_tokens,
    )
    details = answer["details"]
    text, stopped = _end_at_stop(answer["generated_text"], request.stop)
    count = sum(sequence["generated_tokens"] for sequence in [details, *details.get("best_of_sequences", ())])
    tokens = usage(int(headers["x-prompt-tokens"]), count)
    before = prompt if request.return_full_text else ""
    return _response(request, engine, before + (text or ""), details, tokens, stopped=stopped)


async def stream_generate(
    request: GenerateRequest, engine: Engine, *, in_posts: bool
) -> AsyncIterator[GenerateResponse | dict[str, Any]]:
    """Parts `{"response": text}`, then the response without its text. in_posts: see `EngineClient.stream`."""
    prompt = await engine.prompt_text(request)
    body = _generate_body(request, prompt, engine)
    answer = _StreamedAnswer(request)

    async def texts() -> AsyncIterator[str]:
        before = prompt if request.return_full_text else ""
        stream = engine.events(
            "/generate_stream", body, request.tgi_names, shorten=not request.max_tokens, in_posts=in_posts
        )
        async with aclosing(stream) as parts:
            async for events in parts:
                yield before + "".join(map(answer.add, events))
                before = ""

    async for text in relay(texts(), max_bytes=STREAM_LIMIT - len('{"response": }')):
        yield {"response": text}
    details = answer.details
    if "finish_reason" not in details:
        raise broken_off()
    tokens = usage(details.pop("input_length"), details["generated_tokens"])
    yield _response(request, engine, "", details, tokens, stopped=answer.stopped)


class _StreamedAnswer:
    """Text and details of a streamed answer."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.stopped = False  # at a stop text
        self.details: dict[str, Any] = {"prefill": [], "tokens": []}
        self._stop_strings = StopStrings(request.stop)

    def add(self, event: dict[str, Any]) -> str:
        """The text that `event` adds."""
        token = event["token"]
        if self.request.wants_tokens:
            self.details["tokens"].append(token)
            if self.request.top_n_tokens:
                self.details.setdefault("top_tokens", []).append(event.get("top_tokens", []))
        self.details.update(event["details"] or {})
        if self.stopped:
            return ""
        text, self.stopped = self._stop_strings.feed("" if token["special"] else token["text"])
        return text + self._stop_strings.rest() if event["details"] and not self.stopped else text


def _generate_body(request: GenerateRequest, prompt: str, engine: Engine) -> dict[str, Any]:
    engine.adapter(request.adapter_id, "adapter_id")
    engine.check_length(request.max_tokens, request.tgi_names)
    return {"inputs": prompt, "parameters": parameters(request, request.max_tokens or DEFAULT_TOKENS)}


def _response(
    request: GenerateRequest,
    engine: Engine,
    text: str,
    details: dict[str, Any],
    tokens: Usage,
    *,
    stopped: bool,
) -> GenerateResponse:
    at_length = details["finish_reason"] == "length" and not stopped
    if not request.wants_tokens:
        details = {name: details[name] for name in ("finish_reason", "generated_tokens", "seed")}
    return GenerateResponse(
        response=text,
        finish_reason="length" if at_length else "stop",
        details=details,
        usage=tokens,
        model=engine.name,
        revision=engine.revision,
    )


def _end_at_stop(text: str | None, stops: list[str]) -> tuple[str | None, bool]:
    """The text before the first stop text, which TGI includes, and whether there was one.

    An incomplete last character, left by `max_tokens`, is removed: a stream does not have it either.
    """
    if text is None:
        return None, False
    before, stopped = StopStrings(stops).feed(text)
    return (before, True) if stopped else (text.rstrip("\ufffd"), False)


# ---- OpenAI --------------------------------------------------------------------------------------------


async def complete(request: OpenAICall, engine: Engine, job_id: str) -> dict[str, Any]:
    path, body, head = _prepare(request, engine, job_id)
    answer: dict[str, Any]
    answer, _ = await engine.call(path, body, request.tgi_names)
    for choice in answer["choices"]:
        holder, key = _text_of(choice)
        holder[key], stopped = _end_at_stop(holder.get(key), request.stop)
        _set_finish_reason(choice, stopped=stopped, calls_tool="tool_calls" in holder)
    return {**answer, **head}


async def stream_complete(
    request: OpenAICall, engine: Engine, job_id: str, *, in_posts: bool
) -> AsyncGenerator[str]:
    """Server-sent events. in_posts: see `EngineClient.stream`."""
    path, body, head = _prepare(request, engine, job_id)
    chunks = _Chunks(request, head)
    async with aclosing(engine.events(path, body, request.tgi_names, in_posts=in_posts)) as parts:
        async for events in parts:
            if text := "".join(map(chunks.translate, events)):
                yield text
    if request.wants_usage and chunks.usages:
        total = {name: sum(used[name] for used in chunks.usages) for name in chunks.usages[0]}
        yield _sse({**chunks.last, **head, "choices": [], "usage": total})
    yield DONE


class _Chunks:
    """TGI's chunks as OpenAI's. usages: one for each choice, at its end. last: the last chunk of TGI's."""

    def __init__(self, request: OpenAICall, head: dict[str, Any]) -> None:
        self.usages: list[dict[str, int]] = []
        self.last: dict[str, Any] = {}
        self._request, self._head = request, head
        self._stop_strings: dict[int, StopStrings] = {}
        self._stopped: set[int] = set()  # choices that have ended at a stop text
        self._calls_tool = False

    def translate(self, event: dict[str, Any]) -> str:
        """The event as OpenAI's clients know it; "" if nothing of it is left."""
        if used := event.pop("usage", None):
            self.usages.append(used)
        self.last = event
        return "".join(
            _sse({**event, **self._head, "choices": [choice]})
            for choice in event["choices"]
            if self._translate_choice(choice)
        )

    def _translate_choice(self, choice: dict[str, Any]) -> bool:
        """Change `choice` in place; whether anything of it is left."""
        holder, key = _text_of(choice)
        self._calls_tool = self._calls_tool or "tool_calls" in holder
        text = self._text(choice, holder.get(key) or "")
        if key in holder:
            holder[key] = text
        stopped = choice["index"] in self._stopped
        _set_finish_reason(choice, stopped=stopped, calls_tool=self._calls_tool)
        return bool(text or choice["finish_reason"] or choice["logprobs"] or "tool_calls" in holder)

    def _text(self, choice: dict[str, Any], text: str) -> str:
        index, reason = choice["index"], choice["finish_reason"]
        if reason == "eos_token":
            text = ""  # of the end token, which TGI includes in completions
        if index in self._stopped:
            return ""
        if not self._request.stop:
            return text
        stop_strings = self._stop_strings.setdefault(index, StopStrings(self._request.stop))
        text, stopped = stop_strings.feed(text)
        if stopped:
            self._stopped.add(index)
        elif reason:
            text += stop_strings.rest()
        return text


def _prepare(request: OpenAICall, engine: Engine, job_id: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """TGI's route, its body, and the fields of the answer that TGI does not know."""
    adapter = engine.adapter(request.model)
    body = openai_body(request, adapter)
    engine.check_length(body.get("max_tokens"), request.tgi_names)
    is_chat = isinstance(request, ChatRequest)
    head = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{job_id}",
        "created": int(time.time()),
        "model": adapter or engine.name,
    }
    return "/v1/chat/completions" if is_chat else "/v1/completions", body, head


def _text_of(choice: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The object that holds a choice's text, and the text's name in it."""
    holder = choice.get("message") or choice.get("delta")
    return (choice, "text") if holder is None else (holder, "content")


def _set_finish_reason(choice: dict[str, Any], *, stopped: bool, calls_tool: bool) -> None:
    """The finish_reason as OpenAI has it: TGI also has eos_token, stop_sequence and ""."""
    reason = choice["finish_reason"] or None
    if reason in ("eos_token", "stop_sequence") or (reason and stopped):
        reason = "stop"
    choice["finish_reason"] = "tool_calls" if calls_tool and reason == "stop" else reason


def _sse(event: dict[str, Any]) -> str:
    return f"data: {to_json(event).decode()}\n\n"
