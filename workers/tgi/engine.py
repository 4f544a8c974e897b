"""TGI's routes, with errors in this worker's terms."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from serving.engine_server.client import EngineClient
from shared.errors import JobError, invalid

from .schemas import GenerateRequest
from .translate import explain, is_overloaded, tokens_left, without_nulls

WAIT_S = 20.0  # how long a request waits while TGI is at its limit


@dataclass(frozen=True)
class Engine:
    """TGI and its model.

    served: the adapter that each name (in lower case) in a request means; None: the model itself.
    max_total_tokens: of a prompt and its answer. bos: the token id that TGI puts before every prompt.
    """

    client: EngineClient
    name: str
    revision: str | None
    served: dict[str, str | None]
    max_total_tokens: int
    bos: int | None
    wait_s: float = WAIT_S

    @property
    def names(self) -> list[str]:
        """The model's name and those of its adapters."""
        return [self.name, *filter(None, self.served.values())]

    async def call(
        self, path: str, body: Any, names: dict[str, str], *, shorten: bool = False
    ) -> tuple[Any, Mapping[str, str]]:
        """The answer to a POST, and its headers.

        names: see `translate.explain`. shorten: reduce max_new_tokens to what the prompt leaves.
        """
        started = time.monotonic()
        while True:
            try:
                return await self.client.call("POST", path, body)
            except JobError as error:
                body = await self._next_try(error, body, started, names, shorten)

    async def events(
        self, path: str, body: Any, names: dict[str, str], *, shorten: bool = False, in_posts: bool = True
    ) -> AsyncGenerator[list[dict[str, Any]]]:
        """The events of a stream, each time all that have arrived, without `[DONE]` and comments.

        in_posts: see `EngineClient.stream`.
        """
        started = time.monotonic()
        while True:
            try:
                async with aclosing(self.client.stream(path, body, in_posts=in_posts)) as parts:
                    async for part in parts:
                        lines = part.split("\n")  # not splitlines(): a text may contain U+2028
                        data = [line[5:].strip(" ") for line in lines if line.startswith("data:")]
                        if events := [json.loads(item) for item in data if item and item != "[DONE]"]:
                            started = float("-inf")  # the answer has begun: no second try
                            yield events
                return
            except JobError as error:
                body = await self._next_try(error, body, started, names, shorten)

    async def _next_try(
        self, error: JobError, body: Any, started: float, names: dict[str, str], shorten: bool
    ) -> Any:
        """The body to try again with. Raises JobError where that does not help.

        TGI refuses requests above its limit at once: wait for the end of another one, up to `wait_s`.
        """
        if is_overloaded(error) and time.monotonic() - started < self.wait_s:
            await asyncio.sleep(random.uniform(0.05, 0.15))  # noqa: S311
            return body
        if shorten and 0 < (left := tokens_left(error)) < body["parameters"]["max_new_tokens"]:
            return {**body, "parameters": {**body["parameters"], "max_new_tokens": left}}
        raise explain(error, names) from None

    async def prompt_text(self, request: GenerateRequest) -> str:
        """The prompt, or the messages in the model's chat template."""
        if request.messages is None:
            return request.prompt or ""
        body = {"messages": without_nulls(request.messages)}
        answer, _ = await self.call("/chat_tokenize", body, request.tgi_names)
        text: str = answer["templated_text"]
        first = next(iter(answer["tokenize_response"]), None)
        if first and first["id"] == self.bos:
            text = text.removeprefix(first["text"])  # the template has it, and TGI would add another one
        return text

    def adapter(self, name: str | None, param: str = "model") -> str | None:
        """The adapter of a name. Raises JobError for an unknown one, for which TGI would use the model."""
        if name is None:
            return None
        if name.casefold() not in self.served:
            names = ", ".join(dict.fromkeys(self.names))
            raise invalid(param, f"{name!r} is not served here. Use {names}.", "model_not_found")
        return self.served[name.casefold()]

    def check_length(self, max_tokens: int | None, names: dict[str, str]) -> None:
        """Raise JobError for more tokens than the context length.

        TGI checks only the first 1024 of them, and ends the answer at the context length.
        """
        if max_tokens is not None and max_tokens >= self.max_total_tokens:
            message = (
                f"a prompt and its answer have at most {self.max_total_tokens} tokens, got {max_tokens}."
            )
            raise invalid(names["max_new_tokens"], message, "too_long")


async def describe(client: EngineClient) -> tuple[dict[str, Any], int | None]:
    """TGI's /info, and the token id that it puts before every prompt."""
    info = await client.request("GET", "/info")
    tokens = await client.request("POST", "/tokenize", {"inputs": "a"})
    has_bos = tokens and tokens[0]["start"] == tokens[0]["stop"]  # a token without text
    return info, tokens[0]["id"] if has_bos else None
