"""Relevance scores of documents for a query: by a cross-encoder, or by the cosine of embeddings.

reranker = load_reranker(path)
scores = await reranker.score("what is a panda?", ["A bear from China.", "A dish."])  # scores.values
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from serving.dynamic_batching import DynamicBatcher
from serving.embedding.tokenization import (
    batch_tokens,
    check_repeated,
    check_unicode,
    pad,
    token_ids,
    too_long,
)
from shared import startup
from shared.device import parallel_batches, pick_device, share_cores
from shared.errors import JobError, invalid, not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from serving.embedding.encoder import Encoder, Text


@dataclass(frozen=True)
class Scores:
    values: list[float]  # one for each document
    prompt_tokens: int
    truncated: int  # documents that were cut to the model's length


@dataclass(frozen=True, slots=True)
class Pair:
    """One tokenized query and document."""

    tokens: tuple[int, ...]
    second: int  # index of the document's first token
    truncated: bool


class Reranker:
    """A cross-encoder that tokenizes outside of the engine thread and batches across jobs.

    Gives what sentence-transformers' `CrossEncoder.predict` gives without an activation.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, budget: int) -> None:
        """budget: tokens in one padded batch."""
        self.model, self.tokenizer = model, tokenizer
        positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        if "roberta" in model.config.model_type:
            positions -= model.config.pad_token_id + 1  # RoBERTa's first positions belong to the padding
        self.max_tokens: int = min(tokenizer.model_max_length, positions)
        pair = tokenizer("a", "a")
        ids, owners = pair["input_ids"], pair.sequence_ids(0)
        self._before = ids[: owners.index(0)]
        self._between = [ids[i] for i in range(owners.index(0), owners.index(1)) if owners[i] is None]
        self._after = ids[len(owners) - owners[::-1].index(1) :]
        self._has_types = 1 in pair.get("token_type_ids", ())
        self._threads = parallel_batches(model.device)
        self.batcher: DynamicBatcher[Pair, float] = DynamicBatcher(
            self._forward, budget=budget, length=lambda pair: len(pair.tokens), threads=self._threads
        )

    def tokenize(self, query: str, documents: Sequence[str], *, truncate: bool = True) -> list[Pair]:
        """Blocks. Raises JobError for invalid Unicode, for a query that leaves no tokens for a document or is
        too long for so many documents, and for a long document when `truncate` is false.
        """
        check_unicode([query], "query")
        check_unicode(documents, "documents")
        check_repeated(query, len(documents), "query")
        start = [*self._before, *token_ids(self.tokenizer, [query])[0], *self._between]
        limit = self.max_tokens - len(start) - len(self._after)  # tokens of a document
        if limit < 1:
            raise query_too_long(self.max_tokens)
        pairs = []
        for number, ids in enumerate(token_ids(self.tokenizer, documents)):
            if len(ids) > limit and not truncate:
                length = len(ids) + self.max_tokens - limit  # with the query
                raise too_long(f"documents.{number}", length, self.max_tokens, "document")
            tokens = (*start, *ids[:limit], *self._after)
            pairs.append(Pair(tokens, len(start), len(ids) > limit))
        return pairs

    async def score(
        self, query: str, documents: Sequence[str], *, truncate: bool = True, raw_scores: bool = False
    ) -> Scores:
        """The sigmoid of the model's logits, or the logits themselves. Raises JobError as `tokenize` does."""
        pairs = await asyncio.to_thread(self.tokenize, query, documents, truncate=truncate)
        values = await self.batcher.submit(pairs)
        if not all(map(math.isfinite, values)):
            raise not_finite("Try DTYPE=float32.")
        if not raw_scores:
            values = [sigmoid(value) for value in values]
        tokens, truncated = sum(len(pair.tokens) for pair in pairs), sum(pair.truncated for pair in pairs)
        return Scores(values, tokens, truncated)

    def _forward(self, pairs: list[Pair]) -> list[float]:
        """The logits of one batch, on an engine thread."""
        share_cores(self._threads, self.batcher.running)
        left = self.tokenizer.padding_side == "left"
        ids, mask = pad([pair.tokens for pair in pairs], value=self.tokenizer.pad_token_id or 0, left=left)
        inputs = {"input_ids": ids, "attention_mask": mask}  # (batch, seq)
        if self._has_types:
            types = [[0] * pair.second + [1] * (len(pair.tokens) - pair.second) for pair in pairs]
            inputs["token_type_ids"] = pad(types, value=0, left=left)[0]
        device = self.model.device
        with torch.inference_mode():
            logits = self.model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
        scores: list[float] = logits[:, 0].float().tolist()  # (batch, 1) -> (batch,)
        return scores


async def score_by_cosine(
    encoder: Encoder,
    query: str,
    documents: Sequence[str],
    *,
    truncate: bool = True,
    raw_scores: bool = False,
) -> Scores:
    """The cosine of the query's embedding and each document's, each with its own prompt.

    raw_scores: changes nothing; `Reranker.score` has the same parameters. Raises JobError for a query that
    the model would truncate, and as `Encoder.tokenize` does.
    """

    def tokenize() -> list[Text]:
        prompts = encoder.prompts
        texts = encoder.tokenize([query], prompt=prompts["query"], param="query")
        if texts[0].truncated:
            raise query_too_long(encoder.max_tokens)
        return texts + encoder.tokenize(
            documents, prompt=prompts["document"], truncate=truncate, param="documents"
        )

    texts = await asyncio.to_thread(tokenize)
    embeddings = torch.from_numpy(await encoder.encode(texts))  # (1 + documents, dimensions), float32
    vectors = torch.nn.functional.normalize(embeddings)
    tokens, truncated = sum(len(text.tokens) for text in texts), sum(text.truncated for text in texts)
    return Scores((vectors[1:] @ vectors[0]).tolist(), tokens, truncated)


def sigmoid(score: float) -> float:
    return 0.0 if score < -700 else 1 / (1 + math.exp(-score))  # exp overflows at 710


def query_too_long(limit: int | None) -> JobError:
    message = f"the query alone fills the model's {limit} tokens. Shorten it: only documents are truncated."
    return invalid("query", message, "too_long")


def load_reranker(
    path: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    budget: int | None = None,
) -> Reranker:
    """The cross-encoder in the folder `path`.

    budget: tokens in one padded batch; None: what suits the device. Logs the phase load.
    """
    with startup.phase("load") as phase:
        torch_device, torch_dtype = pick_device(device, dtype)
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch_dtype, **options)
        model = model.to(torch_device).eval()
        phase.bytes = sum(weight.nbytes for weight in model.parameters())
    return Reranker(model, tokenizer, budget=batch_tokens(torch_device, budget))
