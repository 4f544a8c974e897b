"""Generated text as responses: the worker's own, and those of OpenAI's routes, complete and streamed.

A writer belongs to one request. Either `complete` takes one delta for each sequence with all of its text, or
`parts` takes the deltas as they come, each with the index of its sequence, and `end` follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from serving.openai_chat import (
    ChatChunks,
    ChatCompletion,
    ResponseHead,
    TokenLogprob,
    TopLogprob,
    chat_choice,
    chat_completion,
)
from shared.openai import DONE, Usage, sse
from shared.results import PlainList

from .schemas import (
    ChatRequest,
    Choice,
    Completion,
    CompletionChoice,
    GenerateRequest,
    GenerateResponse,
    GenerationRequest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from serving.continuous_batching.generator import TextDelta
    from serving.continuous_batching.sampling import Logprob

LOWEST_LOGPROB = -9999.0  # OpenAI's number in place of minus infinity, which JSON does not have


class LogprobReader:
    """Log probabilities with the text of their tokens, in OpenAI's form."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        @lru_cache(maxsize=100_000)
        def decode(token_id: int) -> tuple[str, list[int] | None]:
            """The text of a token and its UTF-8 bytes, None for a part of a character."""
            text = str(tokenizer.decode([token_id]))
            return text, None if "\ufffd" in text else list(text.encode())

        self._decode = decode

    def read(self, logprobs: Sequence[Logprob]) -> list[TokenLogprob]:
        return PlainList(
            {
                **self._read_token(entry.token_id, entry.logprob),
                "top_logprobs": [self._read_token(*top) for top in entry.top],
            }
            for entry in logprobs
        )

    def _read_token(self, token_id: int, logprob: float) -> TopLogprob:
        text, utf8 = self._decode(token_id)
        return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": utf8}


class NativeWriter:
    """The worker's own response. logprobs: None where the request asks for none."""

    def __init__(
        self, model: str, revision: str | None, adapter: str | None, n: int, logprobs: LogprobReader | None
    ) -> None:
        self._model, self._revision, self._adapter = model, revision, adapter
        self._n, self._logprobs = n, logprobs
        self._finish_reasons: dict[int, str] = {}  # by sequence, as the next
        self._streamed: dict[int, list[Logprob]] = {}

    def complete(self, deltas: Sequence[TextDelta], usage: Usage) -> GenerateResponse:
        return self._response(
            [(delta.text, delta.finish_reason or "stop", delta.logprobs) for delta in deltas], usage
        )

    def parts(self, deltas: Sequence[tuple[int, TextDelta]]) -> list[dict[str, Any]]:
        """The new text of each sequence, with its `index` where there are several."""
        texts: dict[int, str] = {}
        for index, delta in deltas:
            texts[index] = texts.get(index, "") + delta.text
            self._streamed.setdefault(index, []).extend(delta.logprobs)
            if delta.finish_reason:
                self._finish_reasons[index] = delta.finish_reason
        return [
            {"response": text} if self._n == 1 else {"index": index, "response": text}
            for index, text in texts.items()
            if text
        ]

    def end(self, usage: Usage) -> GenerateResponse:
        """The complete response without its texts."""
        ends = sorted(self._finish_reasons.items())
        return self._response([("", reason, self._streamed[index]) for index, reason in ends], usage)

    def _response(
        self, sequences: Sequence[tuple[str, str, Sequence[Logprob]]], usage: Usage
    ) -> GenerateResponse:
        choices = [
            Choice(
                response=text,
                finish_reason=finish_reason,
                logprobs=None if self._logprobs is None else self._logprobs.read(logprobs),
            )
            for text, finish_reason, logprobs in sequences
        ]
        return GenerateResponse(
            **vars(choices[0]),
            usage=usage,
            model=self._model,
            revision=self._revision,
            lora=self._adapter,
            choices=choices if self._n > 1 else None,
        )


class ChatWriter:
    """The response of /v1/chat/completions. include_usage: whether a stream ends with the usage."""

    def __init__(self, head: ResponseHead, logprobs: LogprobReader | None, *, include_usage: bool) -> None:
        self._head, self._logprobs, self._include_usage = head, logprobs, include_usage
        self._chunks = ChatChunks(head)

    def complete(self, deltas: Sequence[TextDelta], usage: Usage) -> ChatCompletion:
        choices = [
            chat_choice(index, delta.text, delta.finish_reason or "stop", self._token_logprobs(delta))
            for index, delta in enumerate(deltas)
        ]
        return chat_completion(self._head, choices, usage)

    def parts(self, deltas: Sequence[tuple[int, TextDelta]]) -> list[str]:
        events = ""
        for index, delta in deltas:
            events += self._chunks.delta(index, delta.text, self._token_logprobs(delta))
            if delta.finish_reason:
                events += self._chunks.finish(index, delta.finish_reason)
        return [events]

    def end(self, usage: Usage) -> str:
        return self._chunks.end(usage if self._include_usage else None)

    def _token_logprobs(self, delta: TextDelta) -> list[TokenLogprob] | None:
        return None if self._logprobs is None else self._logprobs.read(delta.logprobs)


class CompletionWriter:
    """The response of /v1/completions. include_usage: whether a stream ends with the usage."""

    def __init__(self, head: ResponseHead, *, include_usage: bool) -> None:
        self._head, self._include_usage = vars(head), include_usage

    def complete(self, deltas: Sequence[TextDelta], usage: Usage) -> Completion:
        choices = [
            CompletionChoice(index=index, text=delta.text, finish_reason=delta.finish_reason)
            for index, delta in enumerate(deltas)
        ]
        return Completion(**self._head, choices=choices, usage=usage)

    def parts(self, deltas: Sequence[tuple[int, TextDelta]]) -> list[str]:
        events = ""
        for index, delta in deltas:
            if delta.text:
                events += self._chunk(index, delta.text)
            if delta.finish_reason:
                events += self._chunk(index, "", delta.finish_reason)
        return [events]

    def end(self, usage: Usage) -> str:
        if not self._include_usage:
            return DONE
        return sse(Completion(**self._head, choices=[], usage=usage)) + DONE

    def _chunk(self, index: int, text: str, finish_reason: str | None = None) -> str:
        choice = CompletionChoice(index=index, text=text, finish_reason=finish_reason)
        return sse(Completion(**self._head, choices=[choice]))


Writer = NativeWriter | ChatWriter | CompletionWriter


def writer_for(
    request: GenerationRequest,
    *,
    job_id: str,
    model: str,
    revision: str | None,
    adapter: str | None,
    n: int,
    logprobs: LogprobReader,
) -> Writer:
    """The writer of the request's route. n: number of sequences."""
    if isinstance(request, GenerateRequest):
        wanted = logprobs if request.logprobs is not None else None
        return NativeWriter(model, revision, adapter, n, wanted)
    if isinstance(request, ChatRequest):
        head = ResponseHead.of("chatcmpl", job_id, adapter or model)
        wanted = logprobs if request.logprobs else None
        return ChatWriter(head, wanted, include_usage=request.wants_usage)
    head = ResponseHead.of("cmpl", job_id, adapter or model)
    return CompletionWriter(head, include_usage=request.wants_usage)
