"""Text generation across jobs, for the workers whose models transformers runs in this process.

    engine = Generator(model, tokenizer)
    inputs = tokenizer("...", return_tensors="pt")            # or what a processor makes of texts and images
    async with aclosing(engine.stream(inputs, SamplingParams(max_tokens=64))) as pieces:
        async for piece in pieces: ...

One thread runs the model, one token for all rows at a time; a row is one job's answer. Rows come and go at
every token: a newcomer's prompt is read while the others wait, and its part of the cache is put beside
theirs, so that it does not wait for their ends. That is exact where rows share nothing but the batch, which
`supports_joining_batches` finds out; with any other model those that wait run together through `generate`,
from start to end.

Each row has its own sampling, random numbers, end and stop strings, whatever runs beside it. In float32 it
gets the tokens that it would get alone; in bfloat16 and float16 a batch may round otherwise than a lone row.
A row that asks for beams is searched for by `generate`, which is stopped at every token for the others' next.

A row that makes the model fail fails alone: a group that fails is run again in halves. When memory runs out,
the budget is lowered and the rows go on later from the tokens that they have.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import random
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any, Literal

import torch
from torch.nn.functional import pad
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from serving.continuous_batching.detokenizer import Detokenizer, StopStrings
from serving.continuous_batching.kv_cache import (
    DecodeBatch,
    cache_budget,
    input_device,
    preallocated_cache,
    supports_joining_batches,
)
from serving.continuous_batching.sampling import Logprob, SamplingParams, sample_next_tokens
from shared.device import empty_cache, is_cuda_broken, is_out_of_memory
from shared.errors import JobError, engine_died, not_finite
from shared.logs import log

FinishReason = Literal["stop", "length"]
PREFILL_TOKENS = 8192  # of prompts read at once: rows that stream wait meanwhile
# What has a column for each token of a prompt. Everything else is joined along its first dimension.
_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What has come since the last piece; the one with a finish_reason is the last.

    tokens: how many the model has made for this answer so far, the one that ended it included.
    chances: of the new tokens, where `SamplingParams.logprobs` asks for them.
    """

    text: str
    tokens: int
    finish_reason: FinishReason | None = None
    chances: tuple[Logprob, ...] = ()


@dataclass(slots=True, eq=False)
class _Row:
    inputs: Mapping[str, Any]
    sampling: SamplingParams
    each: bool  # tell every token, not only the end
    loop: asyncio.AbstractEventLoop
    news: asyncio.Queue[tuple[list[int], FinishReason | Exception | None]]
    key: Hashable
    random: random.Random
    prompt: int
    adapter: str | None = None
    tokens: list[int] = field(default_factory=list)
    told: int = 0
    over: bool = False  # ended, or nobody waits for it
    seen: torch.Tensor | None = None  # True for each token of the text so far, where a penalty asks for it
    chances: list[Logprob] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.prompt + len(self.tokens)

    @property
    def left(self) -> int:
        return self.sampling.max_tokens - len(self.tokens)

    @property
    def beams(self) -> int:
        return self.sampling.beams

    def take(self, token: int, ends: frozenset[int]) -> None:
        if self.over:
            return
        if token < 0:
            return self.tell(not_finite("Try another DTYPE, such as bfloat16 or float32."))
        self.tokens.append(token)
        end: FinishReason | None = "stop" if token in ends else "length" if not self.left else None
        if end or self.each:
            self.tell(end)

    def tell(self, end: FinishReason | Exception | None) -> None:
        news, self.told = self.tokens[self.told :], len(self.tokens)
        self.over = self.over or end is not None
        try:
            self.loop.call_soon_threadsafe(self.news.put_nowait, (news, end))
        except RuntimeError:  # the loop is closed
            self.over = True


def _check_device(error: Exception) -> None:
    """Raise `error` if it is one after which a GPU does nothing more in this process."""
    if is_cuda_broken(error):
        raise error


def _key(inputs: Mapping[str, Any], sampling: SamplingParams) -> Hashable:
    """Prompts may be read together where this is equal: nothing of them then needs padding but the tokens.

    Nor those, where generate() takes a penalty for them.
    """
    shapes = tuple(
        (name, value.dtype, tuple(value.shape[1:])) if hasattr(value, "dtype") else (name, id(value))
        for name, value in sorted(inputs.items())
        if name not in _BY_TOKEN
    )
    if sampling.beams == 1:
        return shapes
    penalty = sampling.repetition_penalty
    return shapes, sampling.beams, penalty, None if penalty == 1 else inputs["input_ids"].shape[1]


class _Closed(BaseException):
    """Ends the engine's thread from wherever it is."""


class Generator:
    """Answers prompts with a decoder model of transformers, many at a time.

    max_batch_size: the most answers at a time. budget: the most tokens in the cache, padding and what is still to
    come included; None: see `cache_budget`. A lone row may have more. max_length: the most tokens of a prompt
    and its answer; None: the model's own limit. set_adapters: called on the engine's thread before the model
    runs, with what each row's `stream` was told as its adapter, in the rows' order.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch_size: int = 32,
        max_cache_tokens: int | None = None,
        max_model_len: int | None = None,
        set_adapters: Callable[[list[str | None]], None] | None = None,
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        limits = [
            limit for limit in (max_model_len, getattr(config, "max_position_embeddings", None)) if limit
        ]
        self.max_model_len: int | None = min(limits, default=None)
        self.model, self.tokenizer = model, tokenizer
        self._device, self._set_adapters = input_device(model), set_adapters
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self._ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self._pad: int = next((i for i in (tokenizer.pad_token_id, *self._ends) if i is not None), 0)
        self._max_rows, self._budget = max_batch_size, max_cache_tokens or cache_budget(model)
        self._joins = supports_joining_batches(model)
        self._penalty: float = model.generation_config.repetition_penalty or 1.0
        self._dead: Exception | None = None
        self._last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        )
        self._incoming: SimpleQueue[_Row | None] = SimpleQueue()
        self._waiting: deque[_Row] = deque()
        self._owed = 0.0  # seconds of steps that come before the next prompts
        self._taken: list[_Row] = []  # out of the queue, and not in the batch yet
        self._live: DecodeBatch[_Row] | None = None
        threading.Thread(target=self._work, name="engine", daemon=True).start()

    # -- for the event loop

    def fit_max_tokens(self, prompt: int, max_tokens: int | None, *, default: int, param: str) -> int:
        """How many tokens the answer to a prompt of `prompt` tokens may have; `default` where there is room.

        Raises JobError(code="too_long") with both numbers for what the model has no room for.
        """
        if self.max_model_len is None:
            return max_tokens or default
        room = self.max_model_len - prompt
        if room < 1:
            raise JobError(
                f"{param}: the prompt has {prompt} tokens, and the model takes {self.max_model_len} with the "
                "answer. Shorten it.",
                param=param,
                code="too_long",
            )
        if max_tokens is not None and max_tokens > room:
            raise JobError(
                f"max_tokens: the prompt has {prompt} tokens, and {max_tokens} more make "
                f"{prompt + max_tokens}; the model takes {self.max_model_len}. Ask for at most {room}.",
                param="max_tokens",
                code="too_long",
            )
        return max_tokens or min(default, room)

    async def stream(
        self,
        inputs: Mapping[str, Any],
        params: SamplingParams,
        *,
        each: bool = True,
        adapter: str | None = None,
    ) -> AsyncGenerator[TextDelta]:
        """The answer to a prompt, in pieces. Close it (`contextlib.aclosing`) to give its place up at once.

        inputs: what the tokenizer or processor made of one prompt, as tensors with a first dimension of one.
        each: a piece for each token that completes some text; False: all in one piece.
        adapter: for `set_adapters`.
        """
        if params.repetition_penalty is None:
            params = replace(params, repetition_penalty=self._penalty)
        row = _Row(
            inputs, params, each or bool(params.stop), asyncio.get_running_loop(), asyncio.Queue(),
            _key(inputs, params), random.Random(params.seed), inputs["input_ids"].shape[1],  # noqa: S311
            adapter,
        )  # fmt: skip
        detokenizer = Detokenizer(lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True))
        stops = StopStrings(params.stop)
        out, count, chances, end = "", 0, 0, None
        self._incoming.put(row)
        try:
            if self._dead is not None:
                raise self._dead
            while end is None:
                tokens, end = await row.news.get()
                if isinstance(end, Exception):
                    raise end
                groups = [[token] for token in tokens] if params.stop else [tokens]
                for number, group in enumerate(groups, 1):
                    count += len(group)
                    last = end is not None and number == len(groups)
                    told = group[:-1] if last and end == "stop" else group
                    text, found = stops.feed(detokenizer.feed(told, last=last))
                    out += text
                    if found:
                        end = "stop"
                        break
                if end:
                    out += stops.rest()
                if end or (out and each):
                    yield TextDelta(out, count, end, tuple(row.chances[chances:count]))
                    out, chances = "", count
        finally:
            row.over = True

    def close(self) -> None:
        """Let the thread end after the step that it is at. What still runs, and what comes later, fails."""
        self._incoming.put(None)

    # -- on the engine's thread

    def _work(self) -> None:
        end: Exception = RuntimeError("the generator was closed")
        try:
            self._run()
        except _Closed:
            pass
        except BaseException as error:
            log.critical("the engine stopped", exc_info=error)
            end = engine_died(error)
        # Who comes later finds _dead: it is set before the queue is read for the last time.
        self._dead = end
        rows = [*(self._live.rows if self._live else ()), *self._taken, *self._waiting]
        while not self._incoming.empty():
            rows += [row for row in (self._incoming.get(),) if row is not None]
        for row in rows:
            if not row.over:
                row.tell(end)

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                self._turn()

    def _turn(self) -> None:
        """Take in who fits, then one more token for everybody.

        Newcomers wait until the steps since the last ones' prompts have taken as long as those: what streams
        is never slowed down by more than half, and many who come one by one are read in few groups.
        """
        while not self._incoming.empty() or not (self._waiting or self._live or self._taken):
            row = self._incoming.get()
            if row is None:
                raise _Closed
            self._waiting.append(row)
        begun = time.perf_counter()
        if (self._live is None or self._owed <= 0) and (chosen := self._admit()):
            self._taken += chosen
            self._begin(chosen)
            self._taken = [row for row in self._taken if row not in chosen]
            # The others' steps went on while beams were searched.
            self._owed = 0.0 if chosen[0].beams > 1 else time.perf_counter() - begun
        if self._live is None:
            return
        begun, rows, cells, problem = time.perf_counter(), self._live.rows, self._live.mask.numel(), None
        try:
            self._step(self._live)
            self._owed -= time.perf_counter() - begun
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            problem = error
        if problem is None:
            return
        _check_device(problem)
        # Some layers of the cache are a token further than the others: who goes on begins with a new one.
        self._live = None
        if is_out_of_memory(problem) and len(rows) > 1:
            self._shrink(cells)
            self._waiting.extendleft(reversed(rows))
        else:
            log.error("a step failed for %d answers: %r", len(rows), problem)
            for row in rows:
                row.tell(problem)

    def _admit(self) -> list[_Row]:
        """Take the rows whose prompts are read next out of the queue: the first, and later ones like it."""
        self._waiting = deque(row for row in self._waiting if not row.over)
        live = self._live.rows if self._live else []
        width = self._live.mask.shape[1] if self._live else 0
        left = max((row.left for row in (*live, *self._taken)), default=0)
        longest = max((row.length for row in self._taken), default=0)  # a search for beams has taken them
        before = len(live) + sum(row.beams for row in self._taken)
        chosen: list[_Row] = []
        for row in self._waiting:
            if (chosen and row.key != chosen[0].key) or (self._taken and row.beams > 1):
                continue
            longest, left = max(longest, row.length), max(left, row.left)
            rows = before + (len(chosen) + 1) * row.beams
            full = rows > self._max_rows or rows * (max(width, longest) + left) > self._budget
            if (before or chosen) and (full or (chosen and (len(chosen) + 1) * longest > PREFILL_TOKENS)):
                break
            chosen.append(row)
        for row in chosen:
            self._waiting.remove(row)
        return chosen

    def _begin(self, rows: list[_Row]) -> None:
        """Read the prompts of `rows`. Where that fails for several, half of them at a time."""
        problem = None
        try:
            if rows[0].beams > 1:
                self._search(rows)
            elif self._joins:
                self._prefill(rows)
            else:
                self._generate(rows)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            problem = error
        if problem is None:
            return
        _check_device(problem)
        rows = [row for row in rows if not row.over]
        no_memory = is_out_of_memory(problem)
        if no_memory:
            empty_cache()
        if len(rows) > 1:
            half = len(rows) // 2
            self._begin(rows[:half])
            self._begin(rows[half:])
        elif rows and no_memory and self._live:
            self._shrink(self._live.mask.numel() + rows[0].length * rows[0].beams)
            self._waiting.appendleft(rows[0])
        elif rows:
            rows[0].tell(problem)

    def _shrink(self, cells: int) -> None:
        self._budget = max(1, int(cells * 0.8))
        empty_cache()
        log.warning("out of memory: at most %d tokens in the cache from now on", self._budget)

    def _collate(self, rows: list[_Row]) -> dict[str, Any]:
        """One model input of the rows' prompts and what they have been answered, padded on the left."""
        width = max(row.length for row in rows)
        inputs: dict[str, Any] = {}
        for name, first in rows[0].inputs.items():
            parts = [row.inputs[name] for row in rows]
            if name in _BY_TOKEN:
                filler = self._pad if name == "input_ids" else 0
                for i, row in enumerate(rows):
                    told = torch.tensor([row.tokens], dtype=first.dtype)
                    if name != "input_ids":
                        told = torch.full_like(told, 1 if name == "attention_mask" else 0)
                    parts[i] = pad(torch.cat([parts[i], told], 1), (width - row.length, 0), value=filler)
            if len(parts) > 1 or name in _BY_TOKEN:
                first = torch.cat(parts)
            if isinstance(first, torch.Tensor):
                first = first.to(self._device, self.model.dtype if first.is_floating_point() else None)
            inputs[name] = first
        return inputs

    def _adapt(self, rows: list[_Row]) -> None:
        if self._set_adapters:
            self._set_adapters([row.adapter for row in rows])

    def _prefill(self, rows: list[_Row]) -> None:
        self._adapt(rows)
        inputs = self._collate(rows)
        mask = inputs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(inputs["input_ids"])
        places = (mask.long().cumsum(-1) - 1).clamp(min=0)
        output = self.model(
            **inputs, position_ids=places, past_key_values=preallocated_cache(self.model), use_cache=True,
            **self._last_only,
        )  # fmt: skip
        batch = DecodeBatch(rows, output.past_key_values, mask, inputs["input_ids"][:, :0])
        if self._settle(batch, output.logits[:, -1]):
            if self._live:
                self._live.join(batch)
            else:
                self._live = batch

    def _step(self, batch: DecodeBatch[_Row]) -> None:
        self._adapt(batch.rows)
        mask = torch.cat([batch.mask, torch.ones_like(batch.mask[:, :1])], dim=1)
        places = mask.sum(dim=1, keepdim=True) - 1
        output = self.model(
            input_ids=batch.tokens, attention_mask=mask, position_ids=places,
            past_key_values=batch.cache, use_cache=True,
        )  # fmt: skip
        batch.mask, batch.cache = mask, output.past_key_values
        if not self._settle(batch, output.logits[:, -1]):
            self._live = None

    def _settle(self, batch: DecodeBatch[_Row], logits: torch.Tensor) -> bool:
        """Give each row its token and drop those that are over; False when none is left."""
        tokens = sample_next_tokens(logits, batch.rows)
        batch.tokens = torch.tensor(tokens, device=self._device)[:, None]
        for row, token in zip(batch.rows, tokens, strict=True):
            row.take(token, self._ends)
        going = [i for i, row in enumerate(batch.rows) if not row.over]
        if 0 < len(going) < len(batch.rows):
            batch.keep(going)
        return bool(going)

    def _config(self, rows: list[_Row], **changes: Any) -> Any:
        """What `generate` is told for `rows`."""
        config = copy.deepcopy(self.model.generation_config)
        config.update(
            do_sample=False, max_length=None, max_new_tokens=max(row.left for row in rows),
            pad_token_id=self._pad, temperature=None, top_p=None, top_k=None, **changes,
        )  # fmt: skip
        return config

    def _search(self, rows: list[_Row]) -> None:
        """Answer `rows`, which have one number of beams, from start to end. Meanwhile the others go on."""
        inputs = self._collate(rows)
        width = inputs["input_ids"].shape[1]

        def check(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            wrong = scores.isnan().any(dim=-1).reshape(len(rows), -1).any(dim=-1).tolist()
            for row in (row for row, is_wrong in zip(rows, wrong, strict=True) if is_wrong and not row.over):
                row.tell(not_finite("Try another DTYPE, such as bfloat16 or float32."))
            return scores

        def over(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            if self._joins:
                self._turn()
                self._adapt(rows)
            ended = [row.over or ids.shape[1] - width >= row.left for row in rows]
            return torch.tensor(ended, device=ids.device).repeat_interleave(len(ids) // len(rows))

        self._adapt(rows)
        found = self.model.generate(
            **inputs, logits_processor=LogitsProcessorList([check]),
            stopping_criteria=StoppingCriteriaList([over]),
            generation_config=self._config(
                rows, num_beams=rows[0].beams, repetition_penalty=rows[0].sampling.repetition_penalty,
                eos_token_id=sorted(self._ends) or None,
            ),
        )  # fmt: skip
        for row, tokens in zip(rows, found[:, width:].tolist(), strict=True):
            for token in tokens:
                row.take(token, self._ends)

    def _generate(self, rows: list[_Row]) -> None:
        """Answer `rows` from start to end. Meanwhile nobody joins them, and who leaves leaves a gap."""
        self._adapt(rows)

        def draw(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            tokens = sample_next_tokens(scores, rows)
            for row, token in zip(rows, tokens, strict=True):
                row.take(token, self._ends)
            chosen = torch.tensor(tokens, device=scores.device)[:, None].clamp(min=0)
            return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

        def over(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.tensor([row.over for row in rows], device=ids.device)

        self.model.generate(
            **self._collate(rows),
            generation_config=self._config(rows, num_beams=1, repetition_penalty=1.0, eos_token_id=None),
            logits_processor=LogitsProcessorList([draw]), stopping_criteria=StoppingCriteriaList([over]),
        )  # fmt: skip
