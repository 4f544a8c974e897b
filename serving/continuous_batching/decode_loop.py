"""The scheduler of continuous batching: one thread that runs a model for the sequences of all jobs."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

from serving.continuous_batching.kv_cache import DecodeBatch
from serving.continuous_batching.sampling import NO_TOKEN, sample_next_tokens
from serving.continuous_batching.sequence import AnySequence
from shared.device import empty_cache, is_cuda_broken, is_out_of_memory
from shared.errors import engine_died, not_finite
from shared.logs import log

T = TypeVar("T")


class DecodeLoop(ABC, Generic[AnySequence]):
    """Decodes sequences together, one token of each in a step; sequences join and leave between steps.

    A subclass has the model: which waiting sequences are admitted, prefill, decode, and what a token means.
    It calls `start` at the end of its __init__. Its methods run on the loop's thread, in
    torch.inference_mode. Only that thread changes these:

    waiting: sequences that no prefill has read. admitted: those whose prefill is going on. running: the batch
    that is decoded. prefill_debt_s: seconds of decode steps that come before the next prefill.

    A sequence whose prefill fails fails alone: a failing group is prefilled again in halves. When a step runs
    out of memory, the limits shrink and its sequences wait for another prefill. After an error that leaves
    CUDA unusable, every sequence fails with `engine_died`.
    """

    not_finite_advice = "Try another DTYPE, such as bfloat16 or float32."
    pays_prefill_debt = True
    """Newcomers wait until the decode steps since the last prefill have taken as long as that prefill.

    Running sequences are slowed down by no more than half, and newcomers that arrive one by one are prefilled
    in few groups.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device  # of the model's token ids
        self.waiting: deque[AnySequence] = deque()
        self.admitted: list[AnySequence] = []
        self.running: DecodeBatch[AnySequence] | None = None
        self.prefill_debt_s = 0.0
        self._dead: Exception | None = None
        self._incoming: SimpleQueue[AnySequence | _Call | None] = SimpleQueue()

    # -- what a subclass has

    @abstractmethod
    def admit(self) -> list[AnySequence]:
        """Take the sequences of the next prefill out of `waiting`; none where the limits are reached."""

    @abstractmethod
    def prefill(self, sequences: list[AnySequence]) -> tuple[DecodeBatch[AnySequence], torch.Tensor]:
        """A batch with the prompts in its cache, and the logits of the first tokens, (batch, vocab)."""

    @abstractmethod
    def decode(self, batch: DecodeBatch[AnySequence]) -> torch.Tensor:
        """Put the newest tokens into the cache and the mask; the logits of the next, (batch, vocab)."""

    @abstractmethod
    def accept(self, sequence: AnySequence, token_id: int) -> None:
        """Append a token to a sequence, emit what is due, and set `finished` where this is its end."""

    @abstractmethod
    def shrink(self, batch: DecodeBatch[AnySequence], newcomer: AnySequence | None) -> None:
        """Lower the limits: memory ran out in a step of `batch`, or in a prefill of `newcomer` beside it."""

    def stopped(self) -> None:
        """Called when the loop has ended."""

    # -- for the event loop

    def start(self) -> None:
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def submit(self, sequence: AnySequence) -> None:
        """Let `sequence` wait for its prefill. On a loop that has ended it fails."""
        self._incoming.put(sequence)
        if self._dead is not None:
            sequence.fail(self._dead)

    async def call(self, work: Callable[[], T]) -> T:
        """The result of `work`, run on the loop's thread between two steps."""
        future: Future[T] = Future()
        self._incoming.put(_Call(work, future))
        if self._dead is not None:
            raise self._dead
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the thread after the step that runs. All sequences fail, as do those submitted later."""
        self._incoming.put(None)

    # -- on the loop's thread

    def _run(self) -> None:
        end: Exception = RuntimeError("the engine was closed")
        try:
            with torch.inference_mode():
                while self._receive():
                    self.step()
        except BaseException as error:
            log.critical("the engine stopped", exc_info=error)
            end = engine_died(error)
        # A sequence submitted later fails in `submit`: _dead is set before the queue is emptied.
        self._dead = end
        sequences = [*(self.running.sequences if self.running else ()), *self.admitted, *self.waiting]
        while not self._incoming.empty():
            item = self._incoming.get()
            if isinstance(item, _Call):
                item.fail(end)
            elif item is not None:
                sequences.append(item)
        for sequence in sequences:
            if not sequence.finished:
                sequence.fail(end)
        self.stopped()

    def _receive(self) -> bool:
        """Read what was submitted, and wait for it where there is nothing to decode. False after `close`."""
        while not self._incoming.empty() or not (self.waiting or self.running):
            item = self._incoming.get()
            if item is None:
                return False
            if isinstance(item, _Call):
                item.run()
            else:
                self.waiting.append(item)
        return True

    def step(self) -> None:
        """Prefill the sequences that are admitted, then decode one token for all that run."""
        begin = time.perf_counter()
        if self.running is None or self.prefill_debt_s <= 0:
            self.waiting = deque(sequence for sequence in self.waiting if not sequence.finished)
            self.admitted = self.admit()
            if self.admitted:
                self.prefill_or_split(self.admitted)
                self.admitted = []
                if self.pays_prefill_debt:
                    self.prefill_debt_s = time.perf_counter() - begin
        if self.running is None:
            return
        begin, batch = time.perf_counter(), self.running
        error = _error_of(lambda: self._decode_and_apply(batch))
        if error is None:
            self.prefill_debt_s -= time.perf_counter() - begin
        else:
            self._recover(batch, error)

    def _decode_and_apply(self, batch: DecodeBatch[AnySequence]) -> None:
        if not self.apply_tokens(batch, self.decode(batch)):
            self.running = None

    def _recover(self, batch: DecodeBatch[AnySequence], error: Exception) -> None:
        """After a failed step: some layers of the cache have a token more than others, so it is dropped."""
        no_memory = _check_memory(error)  # may raise: the sequences are still in `running`
        self.running = None
        sequences = [sequence for sequence in batch.sequences if not sequence.finished]
        if no_memory and len(batch.sequences) > 1:
            self.shrink(batch, None)
            for sequence in reversed(sequences):
                sequence.restart()
                self.waiting.appendleft(sequence)
        else:
            log.error("a decode step failed for %d sequences: %r", len(sequences), error)
            for sequence in sequences:
                sequence.fail(error)

    def prefill_or_split(self, sequences: list[AnySequence]) -> None:
        """Prefill `sequences`; where that fails for several, each half of them."""
        error = _error_of(lambda: self.prefill_and_join(sequences))
        if error is None:
            return
        no_memory = _check_memory(error)
        sequences = [sequence for sequence in sequences if not sequence.finished]
        for sequence in sequences:
            sequence.restart()
        if len(sequences) > 1:
            half = len(sequences) // 2
            self.prefill_or_split(sequences[:half])
            self.prefill_or_split(sequences[half:])
        elif sequences and no_memory and self.running:
            self.shrink(self.running, sequences[0])
            self.waiting.appendleft(sequences[0])
        elif sequences:
            sequences[0].fail(error)

    def prefill_and_join(self, sequences: list[AnySequence]) -> None:
        batch, logits = self.prefill(sequences)
        if self.apply_tokens(batch, logits):
            if self.running:
                self.running.join(batch)
            else:
                self.running = batch

    def apply_tokens(self, batch: DecodeBatch[AnySequence], logits: torch.Tensor) -> bool:
        """Sample a token for each sequence and drop those that end; False where none is left."""
        token_ids = self.sample(batch.sequences, logits)
        batch.token_ids = torch.tensor(token_ids, device=self.device)[:, None]  # (batch, 1)
        going = [i for i, sequence in enumerate(batch.sequences) if not sequence.finished]
        if 0 < len(going) < len(batch.sequences):
            batch.keep(going)
        return bool(going)

    def sample(self, sequences: list[AnySequence], logits: torch.Tensor) -> list[int]:
        """Give each unfinished sequence its next token. logits: (batch, vocab)."""
        token_ids = sample_next_tokens(logits, sequences)
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            if sequence.finished:
                continue
            if token_id == NO_TOKEN:
                sequence.fail(not_finite(self.not_finite_advice))
            else:
                self.accept(sequence, token_id)
        return token_ids


class _Call:
    """A function for the loop's thread, and the future of its result."""

    def __init__(self, work: Callable[[], Any], future: Future[Any]) -> None:
        self.work, self.future = work, future

    def run(self) -> None:
        """Raises only an error after which CUDA is unusable."""
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self.work())
            except Exception as error:
                self.future.set_exception(error)
                _check_memory(error)

    def fail(self, error: Exception) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


def _error_of(work: Callable[[], None]) -> Exception | None:
    """The exception that `work` raises. Its frames are cleared: they hold tensors."""
    try:
        work()
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        return error
    return None


def _check_memory(error: Exception) -> bool:
    """Whether `error` says that memory ran out. Raises an error after which CUDA is unusable."""
    if is_cuda_broken(error):
        raise error
    if is_out_of_memory(error):
        empty_cache()
        return True
    return False
