"""Text embeddings across jobs, by models that sentence-transformers loads.

encoder = load_encoder(path)
texts = encoder.tokenize(["a", "b"])
embeddings = await encoder.encode(texts)  # (2, encoder.dimensions), float32
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from serving.dynamic_batching import DynamicBatcher
from serving.embedding.plain_model import PlainModel, load_plain
from serving.embedding.tokenization import (
    batch_tokens,
    check_repeated,
    check_unicode,
    pad,
    param_of,
    token_ids,
    too_long,
)
from serving.embedding.vectors import encode_vectors, truncate_and_normalize
from shared import startup
from shared.device import parallel_batches, pick_device, share_cores
from shared.errors import invalid, not_finite

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True, slots=True)
class Text:
    """One tokenized text."""

    tokens: tuple[int, ...]  # with prompt and special tokens, truncated to the model's length
    prompt_tokens: int  # how many of them are the prompt's, for poolings that leave those out
    truncated: bool = False
    text: str = ""  # for models that take no token ids


class Encoder:
    """An embedding model that tokenizes outside of the engine thread and batches across jobs.

    Gives what `SentenceTransformer.encode` gives. Models whose first module is not a plain text transformer
    (static embeddings, chat templates, flash attention without padding) run through `encode` itself.
    """

    def __init__(self, model: SentenceTransformer | PlainModel, *, budget: int) -> None:
        """budget: tokens in one padded batch."""
        self.model = model
        dimensions = model.get_embedding_dimension()
        self.dimensions: int = dimensions or len(cast("SentenceTransformer", model).encode("a"))
        self.max_tokens: int | None = model.max_seq_length
        self.prompts: dict[str, str] = model.prompts
        self.default_prompt: str | None = self.prompts.get(model.default_prompt_name or "")
        self._tokenizer: Any = getattr(model, "tokenizer", None)
        self._prefix, self._suffix, self.takes_tokens = self._special_tokens()
        self._left_padding = getattr(self._tokenizer, "padding_side", "right") == "left"
        self._pad_token: int = getattr(self._tokenizer, "pad_token_id", None) or 0
        self._skips_prompt = any(getattr(module, "include_prompt", True) is False for module in model)
        self._threads = parallel_batches(model.device)
        self.batcher: DynamicBatcher[Text, np.ndarray] = DynamicBatcher(
            self._forward,
            budget=budget,
            length=lambda text: len(text.tokens),
            key=lambda text: text.prompt_tokens,
            threads=self._threads,
        )

    def _special_tokens(self) -> tuple[list[int], list[int], bool]:
        """The ids before and after a text's own, and whether the model runs on token ids alone."""
        first = self.model[0]
        formats = getattr(first, "modality_config", {})
        if not getattr(self._tokenizer, "is_fast", False) or "text" not in formats or "message" in formats:
            return [], [], False
        if getattr(first, "can_flatten_inputs", False) or self._tokenizer.truncation_side != "right":
            return [], [], False
        body = self._ids(["a"])[0]
        ids = list(self._tokenizer("a")["input_ids"])
        for start in range(len(ids) - len(body) + 1):
            if ids[start : start + len(body)] == body:
                return ids[:start], ids[start + len(body) :], True
        return [], [], False

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special tokens, not truncated; for a model without a tokenizer a 0 a word."""
        if hasattr(self._tokenizer, "encode_batch"):
            return [e.ids for e in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        if not callable(self._tokenizer):
            return [[0] * len(text.split()) for text in texts]
        return token_ids(self._tokenizer, texts)

    def prompt_for(self, prompt: str | None, prompt_name: str | None) -> str:
        """The text to put before each text; the model's default when neither is given.

        Raises JobError when both are, or for a name that the model's files do not have.
        """
        if prompt is not None:
            if prompt_name is not None:
                raise invalid("prompt", "give either prompt or prompt_name.")
            return prompt
        if prompt_name is None:
            return self.default_prompt or ""
        if prompt_name not in self.prompts:
            names = ", ".join(repr(name) for name in self.prompts) or "none"
            raise invalid("prompt_name", f"the model has no prompt {prompt_name!r}. It has: {names}.")
        return self.prompts[prompt_name]

    def tokenize(
        self,
        inputs: Sequence[str] | Sequence[list[int]],
        *,
        prompt: str = "",
        truncate: bool = True,
        param: str = "texts",
        prompt_param: str = "prompt",
    ) -> list[Text]:
        """`inputs` (texts, or arrays of the model's token ids) for `encode`, with `prompt` before each.

        param, prompt_param: the request's fields that they came from, for errors. Blocks. Raises JobError for
        a token id that the model does not have, for invalid Unicode, for a prompt that is too long for so
        many texts, and for a text that is too long when `truncate` is false.
        """
        check_unicode([prompt], prompt_param)
        check_repeated(prompt, len(inputs), prompt_param)
        if inputs and isinstance(inputs[0], str):
            prompted = [prompt + text for text in inputs]  # type: ignore[operator]
            check_unicode(prompted, param)
            bodies = self._ids(prompted)
        else:
            start = self._ids([prompt])[0] if prompt else []
            bodies = [start + body for body in self._own_ids(inputs, param)]  # type: ignore[arg-type]
            prompted = [""] * len(inputs)
        prompt_tokens = 0
        if prompt and self._skips_prompt and self.takes_tokens:
            prompt_tokens = len(self._prefix) + len(self._ids([prompt])[0])
        special = len(self._prefix) + len(self._suffix)
        limit = self.max_tokens or sys.maxsize
        texts = []
        for number, (body, text) in enumerate(zip(bodies, prompted, strict=True)):
            length = len(body) + special
            truncated = length > limit
            if truncated:
                if not truncate:
                    raise too_long(param_of(param, number, len(bodies)), length, limit)
                body = body[: limit - special]
            tokens = (*self._prefix, *body, *self._suffix)
            texts.append(Text(tokens, prompt_tokens, truncated, "" if self.takes_tokens else text))
        return texts

    def _own_ids(self, arrays: Sequence[list[int]], param: str) -> list[list[int]]:
        """Arrays of token ids without the special tokens that they may or may not come with."""
        if not self.takes_tokens:
            raise invalid(param, "this model takes texts, not token ids.")
        size = len(self._tokenizer)
        bodies = []
        for number, ids in enumerate(arrays):
            if not all(0 <= token < size for token in ids):
                message = f"token ids must be from 0 to {size - 1}, the model's own vocabulary."
                raise invalid(param_of(param, number, len(arrays)), message)
            start, end = len(self._prefix), len(ids) - len(self._suffix)
            complete = start <= end and ids[:start] == self._prefix and ids[end:] == self._suffix
            bodies.append(ids[start:end] if complete else ids)
        return bodies

    async def embed(
        self,
        texts: Sequence[Text],
        *,
        batch_size: int | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
        encoding_format: str = "float",
    ) -> list[list[float]] | list[str]:
        """`encode` as a client receives it: the leading `dimensions`, to length 1, as numbers or base64."""
        embeddings = await self.encode(texts, batch_size=batch_size)
        embeddings = truncate_and_normalize(embeddings, dimensions=dimensions, normalize=normalize)
        return await asyncio.to_thread(encode_vectors, embeddings, encoding_format)

    async def encode(self, texts: Sequence[Text], *, batch_size: int | None = None) -> np.ndarray:
        """Embeddings as the model gives them, (texts, self.dimensions), float32.

        batch_size: at most this many of `texts` in one batch. Raises JobError(code="not_finite").
        """
        step = batch_size or len(texts)
        vectors: list[np.ndarray] = []
        for start in range(0, len(texts), step):
            vectors += await self.batcher.submit(texts[start : start + step])
        return await asyncio.to_thread(_stack, vectors)

    def _forward(self, texts: list[Text]) -> list[np.ndarray]:
        """The embeddings of one batch, on an engine thread."""
        share_cores(self._threads, self.batcher.running)
        if not self.takes_tokens:
            embeddings = cast("SentenceTransformer", self.model).encode(
                [text.text for text in texts], prompt="", batch_size=len(texts), convert_to_tensor=True
            )
            return list(embeddings.float().cpu().numpy())
        sequences = [text.tokens for text in texts]
        ids, mask = pad(sequences, value=self._pad_token, left=self._left_padding)  # (batch, seq)
        device = self.model.device
        features: dict[str, Any] = {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            "modality": "text",
        }
        if texts[0].prompt_tokens:
            features["prompt_length"] = texts[0].prompt_tokens
        with torch.inference_mode():
            embeddings = self.model(features)["sentence_embedding"]  # (batch, dimensions)
        return list(embeddings.float().cpu().numpy())


def _stack(vectors: list[np.ndarray]) -> np.ndarray:
    """The vectors as one array. Raises JobError(code="not_finite"): base64 would hide a NaN."""
    embeddings = np.stack(vectors)
    if (broken := ~np.isfinite(embeddings).all(axis=1)).any():
        raise not_finite(f"It is in the embedding of text {broken.argmax()}. Try DTYPE=float32.")
    return embeddings


def load_encoder(
    path: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    budget: int | None = None,
) -> Encoder:
    """The encoder of the model in the folder `path`.

    budget: tokens in one padded batch; None: what suits the device. Logs the phase load, which holds the
    import of sentence_transformers for a model that is not of the usual form.
    Raises StartError where a new attempt would fail too.
    """
    torch_device, torch_dtype = pick_device(device, dtype)
    tokens = batch_tokens(torch_device, budget)
    with startup.phase("load") as phase:
        plain = load_plain(path, device=torch_device, dtype=torch_dtype)
        encoder = Encoder(plain, budget=tokens) if plain else None
        if encoder is None or not encoder.takes_tokens:
            from sentence_transformers import SentenceTransformer

            model = SentenceTransformer(
                str(path),
                device=str(torch_device),
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                model_kwargs={"dtype": torch_dtype},
            ).eval()
            encoder = Encoder(model, budget=tokens)
        phase.bytes = sum(weight.nbytes for weight in encoder.model.parameters())
    return encoder
