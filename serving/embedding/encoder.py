"""Sentence embeddings across jobs, for the workers whose models sentence-transformers loads.

encoder = load_encoder(path, device="auto", dtype="auto")
texts, vectors = await encoder.embed(["a", "b"], prompt="", param="texts", ...)
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from serving.dynamic_batching import DynamicBatcher
from serving.embedding.vectors import encode_vectors, truncate_and_normalize
from shared import startup
from shared.device import parallel_batches, pick_device, share_cores
from shared.errors import JobError, not_finite

MAX_REPEATED = 20_000_000  # characters, as many as a request can hold
# Tokens in one padded batch. A GPU wants many (16384 is text-embeddings-inference's default); on two CPU
# cores about a thousand was fastest, and larger batches were slower than none: benchmarks/results.
GPU_BATCH_TOKENS = 16384
CPU_BATCH_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Text:
    """One text on its way through the engine."""

    tokens: tuple[int, ...]  # with special tokens, cut to the model's length
    prompt_tokens: int  # how many of them are the prompt's; some poolings leave those out
    truncated: bool = False
    text: str = ""  # for the models that take no token ids


class Encoder:
    """A SentenceTransformer that tokenizes beside the engine and batches across jobs.

    Gives what `SentenceTransformer.encode` gives. Models whose first part is no plain text transformer
    (static embeddings, chat templates, flash attention without padding) go through `encode` itself.
    """

    def __init__(self, model: SentenceTransformer, *, budget: int) -> None:
        self.model = model
        self.dimensions: int = model.get_embedding_dimension() or len(model.encode("a"))
        self.max_tokens: int | None = model.max_seq_length
        self.prompts: dict[str, str] = model.prompts
        self.default_prompt: str | None = self.prompts.get(model.default_prompt_name or "")
        self._tokenizer: Any = getattr(model, "tokenizer", None)
        self._prefix, self._suffix, self.takes_tokens = self._special_tokens()
        self._left_padding = getattr(self._tokenizer, "padding_side", "right") == "left"
        self._pad: int = getattr(self._tokenizer, "pad_token_id", None) or 0
        self._skips_prompt = any(getattr(part, "include_prompt", True) is False for part in model)
        self._threads = parallel_batches(model.device)
        self._batcher: DynamicBatcher[Text, np.ndarray] = DynamicBatcher(
            self._run,
            budget=budget,
            length=lambda text: len(text.tokens),
            key=lambda text: text.prompt_tokens,
            threads=self._threads,
        )

    def _special_tokens(self) -> tuple[list[int], list[int], bool]:
        """The ids put before and after a text, and whether the model runs on token ids alone."""
        first = self.model[0]
        formats = getattr(first, "modality_config", {})
        if not getattr(self._tokenizer, "is_fast", False) or "text" not in formats or "message" in formats:
            return [], [], False
        if getattr(first, "can_flatten_inputs", False) or self._tokenizer.truncation_side != "right":
            return [], [], False
        body = self._ids(["a"])[0]
        whole = list(self._tokenizer("a")["input_ids"])
        for start in range(len(whole) - len(body) + 1):
            if whole[start : start + len(body)] == body:
                return whole[:start], whole[start + len(body) :], True
        return [], [], False

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special tokens, however long; words, for a model without a tokenizer."""
        if hasattr(self._tokenizer, "encode_batch"):
            found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in found]
        if not callable(self._tokenizer):
            return [[0] * len(text.split()) for text in texts]
        return plain_ids(self._tokenizer, texts)

    def prompt_for(self, prompt: str | None, prompt_name: str | None) -> str:
        """The text to put before each text; the model's default when neither is given."""
        if prompt is not None:
            if prompt_name is not None:
                raise JobError(
                    "prompt: give either prompt or prompt_name.", param="prompt", code="invalid_value"
                )
            return prompt
        if prompt_name is None:
            return self.default_prompt or ""
        if prompt_name not in self.prompts:
            names = ", ".join(repr(name) for name in self.prompts) or "none"
            raise JobError(
                f"prompt_name: the model has no prompt {prompt_name!r}. It has: {names}.",
                param="prompt_name",
                code="invalid_value",
            )
        return self.prompts[prompt_name]

    def tokenize(
        self, inputs: Sequence[str] | Sequence[list[int]], *, prompt: str, truncate: bool, param: str
    ) -> list[Text]:
        """`inputs` (texts, or arrays of the model's token ids) for the engine, with `prompt` before each.

        Raises JobError for a token id that the model does not have, for what is no Unicode, for a prompt that
        is too long for so many texts, and for a text that is too long when `truncate` is false.
        """
        check_unicode([prompt], "prompt")
        check_repeated(prompt, len(inputs), "prompt")
        if inputs and isinstance(inputs[0], str):
            prompted = [prompt + text for text in inputs]  # type: ignore[operator]
            check_unicode(prompted, param)
            bodies = self._ids(prompted)
        else:
            start = self._ids([prompt])[0] if prompt else []
            bodies = [start + body for body in self._checked(inputs, param)]  # type: ignore[arg-type]
            prompted = [""] * len(inputs)
        prompt_tokens = 0
        if prompt and self._skips_prompt and self.takes_tokens:
            prompt_tokens = len(self._prefix) + len(self._ids([prompt])[0])
        special = len(self._prefix) + len(self._suffix)
        limit = self.max_tokens or sys.maxsize
        texts = []
        for number, (body, text) in enumerate(zip(bodies, prompted, strict=True)):
            length = len(body) + special
            too_long = length > limit
            if too_long and not truncate:
                where = f"{param}.{number}" if len(bodies) > 1 else param
                raise JobError(
                    f"{where}: {length} tokens, and the model takes {limit}. "
                    "Shorten the text, or set truncate to true to have it cut.",
                    param=where,
                    code="too_long",
                )
            if too_long:
                body = body[: limit - special]
            tokens = (*self._prefix, *body, *self._suffix)
            texts.append(Text(tokens, prompt_tokens, too_long, "" if self.takes_tokens else text))
        return texts

    def _checked(self, arrays: Sequence[list[int]], param: str) -> list[list[int]]:
        """Arrays of token ids without the special tokens that they may or may not come with."""
        if not self.takes_tokens:
            raise JobError(
                f"{param}: this model takes texts, not token ids.", param=param, code="invalid_value"
            )
        size = len(self._tokenizer)
        bodies = []
        for number, ids in enumerate(arrays):
            if not all(0 <= token < size for token in ids):
                raise JobError(
                    f"{param}.{number}: token ids must be from 0 to {size - 1}, the model's own vocabulary.",
                    param=f"{param}.{number}",
                    code="invalid_value",
                )
            start, end = len(self._prefix), len(ids) - len(self._suffix)
            whole = start <= end and ids[:start] == self._prefix and ids[end:] == self._suffix
            bodies.append(ids[start:end] if whole else ids)
        return bodies

    async def embed(
        self,
        inputs: Sequence[str] | Sequence[list[int]],
        *,
        prompt: str,
        param: str,
        truncate: bool,
        batch_size: int | None,
        dimensions: int | None,
        normalize: bool,
        encoding_format: str,
    ) -> tuple[list[Text], Sequence[list[float] | str]]:
        """What was read of each input, and its embedding as `encode_vectors` writes it.

        param: the request's field that `inputs` came from, for errors. batch_size: at most this many of them
        in one batch. dimensions: keep so many leading ones. Raises JobError: see `tokenize`, and for too many
        dimensions.
        """
        width = dimensions or self.dimensions
        if width > self.dimensions:
            raise JobError(
                f"dimensions: {dimensions}, and the model has {self.dimensions}.",
                param="dimensions",
                code="invalid_value",
            )
        texts = await asyncio.to_thread(self.tokenize, inputs, prompt=prompt, truncate=truncate, param=param)
        rows = await self.encode(texts, batch_size=batch_size)
        rows = truncate_and_normalize(rows, dimensions=dimensions, normalize=normalize)
        return texts, await asyncio.to_thread(encode_vectors, rows, encoding_format)

    async def encode(self, texts: Sequence[Text], *, batch_size: int | None = None) -> np.ndarray:
        """Embeddings of shape (len(texts), self.dimensions), float32, as the model gives them.

        Raises JobError(code="not_finite").
        """
        step = batch_size or len(texts)
        rows: list[np.ndarray] = []
        for start in range(0, len(texts), step):
            rows += await self._batcher.submit(texts[start : start + step])
        embeddings = np.stack(rows)
        if (broken := ~np.isfinite(embeddings).all(axis=1)).any():  # base64 would hide it
            raise not_finite(f"in the embedding of text {broken.argmax()}")
        return embeddings

    def _run(self, texts: list[Text]) -> list[np.ndarray]:
        """One forward pass, on an engine thread."""
        share_cores(self._threads, self._batcher.running)
        if not self.takes_tokens:
            rows = self.model.encode(
                [text.text for text in texts], prompt="", batch_size=len(texts), convert_to_tensor=True
            )
        else:
            rows = [text.tokens for text in texts]
            ids, mask = padded(rows, value=self._pad, left=self._left_padding)
            device = self.model.device
            features: dict[str, Any] = {
                "input_ids": ids.to(device),
                "attention_mask": mask.to(device),
                "modality": "text",
            }
            if texts[0].prompt_tokens:
                features["prompt_length"] = texts[0].prompt_tokens
            with torch.inference_mode():
                rows = self.model(features)["sentence_embedding"]
        return list(rows.float().cpu().numpy())


def check_unicode(texts: Sequence[str], param: str) -> None:
    """Raises JobError for half of a surrogate pair, which JSON can hold and no tokenizer takes."""
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            where = f"{param}.{number}" if len(texts) > 1 else param
            raise JobError(
                f"{where}: half of a surrogate pair, which is no Unicode. Send whole characters.",
                param=where,
                code="invalid_value",
            ) from None


def check_repeated(text: str, times: int, param: str) -> None:
    """Raises JobError for a text that, put before each of so many others, would fill the memory."""
    if len(text) * times > MAX_REPEATED:
        raise JobError(
            f"{param}: {len(text)} characters before each of {times} texts are more than {MAX_REPEATED} in "
            "all. Shorten it, or split the job.",
            param=param,
            code="too_large",
        )


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids by a tokenizer of transformers, without special tokens, however long."""
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, truncation=False, padding=False, verbose=False,
        return_attention_mask=False, return_token_type_ids=False,
    )["input_ids"]  # fmt: skip
    return ids


def padded(rows: Sequence[Sequence[int]], *, value: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as one tensor, filled up with `value`, and the mask that is 1 where they are."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), value)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        at = longest - len(row) if left else 0
        ids[number, at : at + len(row)] = torch.tensor(row)
        mask[number, at : at + len(row)] = 1
    return ids, mask


def batch_tokens(device: torch.device, asked: int | None) -> int:
    """Tokens in one padded batch: as asked, or what suits the device."""
    return asked or (CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS)


def load_encoder(
    path: Path, *, device: str, dtype: str, trust_remote_code: bool = False, budget: int | None = None
) -> Encoder:
    """The encoder of the model in the folder `path`.

    budget: tokens in one padded batch; None: what suits the device. Logs the phase load.
    Raises StartError for what a new attempt cannot change.
    """
    with startup.phase("load") as phase:
        place, number_format = pick_device(device, dtype)
        model = SentenceTransformer(
            str(path),
            device=str(place),
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            model_kwargs={"dtype": number_format},
        ).eval()
        phase.bytes = sum(weight.nbytes for weight in model.parameters())
    return Encoder(model, budget=batch_tokens(place, budget))
