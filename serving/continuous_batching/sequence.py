"""One answer while it is decoded, and the queue from the engine's thread to the job's event loop."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from serving.continuous_batching.sampling import Logprob, SamplingParams


@dataclass(slots=True, eq=False, kw_only=True)
class ActiveSequence:
    """What the decode loop needs of a sequence; engines add their own fields.

    prompt_ids: (prompt,), the token ids that the repetition penalty counts as seen from the start.
    end_token_ids: those that end the answer. loop: the event loop of the job. updates: read there. finished:
    ended, failed, or not waited for any more. seen_tokens: (vocab,), bool, set by the first repetition
    penalty. output_counts: (vocab,), once a frequency or presence penalty has.
    """

    params: SamplingParams
    prompt_ids: torch.Tensor
    random: random.Random
    end_token_ids: frozenset[int] = frozenset()
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    updates: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    seen_tokens: torch.Tensor | None = None
    output_counts: torch.Tensor | None = None
    finished: bool = False

    @property
    def remaining(self) -> int:
        """Tokens that are still to come, unless the sequence ends before."""
        return self.params.max_tokens - len(self.token_ids)

    def emit(self, update: Any) -> None:
        """Put `update` into the queue of the event loop, from any thread."""
        try:
            self.loop.call_soon_threadsafe(self.updates.put_nowait, update)
        except RuntimeError:  # the event loop is closed
            self.finished = True

    def fail(self, error: Exception) -> None:
        self.finished = True
        self.emit(error)

    async def next_update(self) -> Any:
        """The next update. Raises the error that ended the sequence."""
        update = await self.updates.get()
        if isinstance(update, Exception):
            raise update
        return update

    def restart(self) -> None:
        """Prepare for another prefill, after a failure. By default a sequence goes on from its tokens."""


AnySequence = TypeVar("AnySequence", bound=ActiveSequence)
