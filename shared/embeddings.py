"""Sentence embeddings across jobs, for the workers whose models sentence-transformers loads.

    encoder = load_encoder(settings, prewarm.resolve(settings, "BAAI/bge-large-en-v1.5"), budget=None)
    texts, rows = await encoder.embed(["a", "b"], prompt="", param="texts", ...)

`EmbedRequest` is what these workers take; `answer` and `answer_openai` are all that they need to serve it.
What those are made of is public too, for rerankers and the like.
"""

from __future__ import annotations

import asyncio
import base64
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, field_validator

from shared import openai_api, prewarm
from shared.batching import Batcher
from shared.errors import JobError
from shared.hardware import cpu_lanes, pick_device, share_cores
from shared.jobs import Request, check_size, current_job, not_finite
from shared.settings import WorkerSettings
from shared.volume import ModelPath

if TYPE_CHECKING:
    import numpy as np
    import torch
    from sentence_transformers import SentenceTransformer

MAX_TEXTS = openai_api.MAX_INPUTS
MAX_REPEATED = 20_000_000  # characters, as many as a request can hold

# Tokens in one padded batch. A GPU wants many (16384 is text-embeddings-inference's default); on two CPU
# cores about a thousand was fastest, and larger batches were slower than none: benchmarks/results.
GPU_BATCH_TOKENS = 16384
CPU_BATCH_TOKENS = 1024


# ---- requests and responses ----------------------------------------------------------------------------


class EmbedRequest(Request):
    texts: list[str] = Field(
        default=[], max_length=MAX_TEXTS, description="The texts, or one text; an empty text is a text"
    )
    text: str | None = Field(None, description="A single text, used when `texts` is missing or empty")
    batch_size: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="At most this many texts of the job in one batch; unset: by tokens alone",
    )
    normalize: bool = Field(True, description="Scale each embedding to length 1")
    dimensions: int | None = Field(
        None, ge=1, description="Keep this many leading dimensions (Matryoshka), before normalising"
    )
    prompt_name: str | None = Field(
        None, description="A prompt that the model's files define, put before each text"
    )
    prompt: str | None = Field(None, description="A prompt to put before each text; instead of `prompt_name`")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="Lists of numbers, or base64 of little-endian float32"
    )
    truncate: bool = Field(True, description="Cut texts that are too long for the model; false: refuse them")

    @field_validator("texts", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Tokens that the model read, special ones included")
    total_tokens: int = Field(description="The same: there is no completion")


class EmbedResponse(BaseModel):
    embeddings: Sequence[list[float] | str] = Field(description="One for each text, in their order")
    model: str = Field(description="The model, as MODEL_NAME gives it")
    revision: str | None = Field(description="Its commit, where known")
    dimensions: int = Field(description="Length of each embedding")
    count: int = Field(description="Number of embeddings")
    truncated: int = Field(description="How many texts were cut to the model's length")
    usage: Usage


async def answer(
    encoder: Encoder, request: EmbedRequest, *, prompt: str, model: str, revision: str | None
) -> dict[str, Any]:
    """The fields of an EmbedResponse. Raises JobError(code="empty") without a text; see `Encoder.embed`."""
    inputs = request.texts or ([] if request.text is None else [request.text])
    if not inputs:
        raise JobError(
            "texts: no texts. Give texts, a list of at least one, or text.", param="texts", code="empty"
        )
    texts, rows = await encoder.embed(
        inputs, prompt=prompt, param="texts" if request.texts else "text", truncate=request.truncate,
        batch_size=request.batch_size, dimensions=request.dimensions, normalize=request.normalize,
        encoding_format=request.encoding_format,
    )  # fmt: skip
    tokens = sum(len(text.tokens) for text in texts)
    return {
        "embeddings": rows,
        "model": model,
        "revision": revision,
        "dimensions": request.dimensions or encoder.dimensions,
        "count": len(rows),
        "truncated": sum(text.truncated for text in texts),
        "usage": Usage(prompt_tokens=tokens, total_tokens=tokens),
    }


async def answer_openai(
    encoder: Encoder, request: openai_api.EmbeddingsRequest, *, prompt: str, model: str
) -> openai_api.EmbeddingsResponse:
    """The answer of /v1/embeddings: unit vectors, long texts cut. Raises JobError: see `Encoder.embed`."""
    texts, rows = await encoder.embed(
        request.input, prompt=prompt, param="input", truncate=True, batch_size=None,
        dimensions=request.dimensions, normalize=True, encoding_format=request.encoding_format,
    )  # fmt: skip
    tokens = sum(len(text.tokens) for text in texts)
    return openai_api.EmbeddingsResponse(
        data=[openai_api.Embedding.model_construct(index=i, embedding=row) for i, row in enumerate(rows)],
        model=model,
        usage=openai_api.EmbeddingsUsage(prompt_tokens=tokens, total_tokens=tokens),
    )


# ---- the engine ----------------------------------------------------------------------------------------


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
        self._lanes = cpu_lanes(model.device)
        self._batcher: Batcher[Text, np.ndarray] = Batcher(
            self._run,
            budget=budget,
            length=lambda text: len(text.tokens),
            key=lambda text: text.prompt_tokens,
            lanes=self._lanes,
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
        """What was read of each input, and its embedding as `written` writes it.

        param: the request's field that `inputs` came from, for errors. batch_size: at most this many of them
        in one batch. dimensions: keep so many leading ones. Raises JobError: see `tokenize`, too many
        dimensions, or a result that the platform would not take.
        """
        width = dimensions or self.dimensions
        if width > self.dimensions:
            raise JobError(
                f"dimensions: {dimensions}, and the model has {self.dimensions}.",
                param="dimensions",
                code="invalid_value",
            )
        # A number as JSON text hardly ever takes less than ten bytes; base64 takes four thirds of four.
        size = len(inputs) * width * (10 if encoding_format == "float" else 16 / 3)
        check_size(int(size), current_job.get(), "Use encoding_format base64 or fewer dimensions. ")
        texts = await asyncio.to_thread(self.tokenize, inputs, prompt=prompt, truncate=truncate, param=param)
        rows = await self.encode(texts, batch_size=batch_size)
        return texts, await asyncio.to_thread(
            lambda: written(shape(rows, dimensions=dimensions, normalize=normalize), encoding_format)
        )

    async def encode(self, texts: Sequence[Text], *, batch_size: int | None = None) -> np.ndarray:
        """Embeddings of shape (len(texts), self.dimensions), float32, as the model gives them.

        Raises JobError(code="not_finite").
        """
        import numpy as np

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
        import torch

        share_cores(self._lanes, self._batcher.running)
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
    import torch

    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), value)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        at = longest - len(row) if left else 0
        ids[number, at : at + len(row)] = torch.tensor(row)
        mask[number, at : at + len(row)] = 1
    return ids, mask


def shape(embeddings: np.ndarray, *, dimensions: int | None, normalize: bool) -> np.ndarray:
    """The leading `dimensions` of each row, scaled to length 1 after the cut, which would shorten them."""
    import numpy as np

    rows = embeddings[:, :dimensions]
    if normalize:
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows


def written(embeddings: np.ndarray, encoding_format: str) -> Sequence[list[float] | str]:
    """The rows as base64 of little-endian float32, or as numbers in their shortest float32 form."""
    import numpy as np

    if encoding_format == "base64":
        return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in embeddings]
    return shortest(embeddings.astype(np.float32)).tolist()  # type: ignore[no-any-return]


def shortest(values: np.ndarray) -> np.ndarray:
    """float32 `values` as the float64 that JSON prints shortest and that reads back as the same.

    A float32 needs 6 to 9 significant digits; tolist() alone would print the 17 of a float64. Rounding
    whole arrays to 6, 7, 8 and 9 digits is 13 times faster than asking numpy for each number's text.
    """
    import numpy as np

    exact = values.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.where(exact == 0, 0, np.floor(np.log10(np.abs(exact))))
        result, found = exact.copy(), np.zeros(values.shape, bool)
        for digits in range(6, 10):
            scale = 10.0 ** (digits - 1 - exponent)
            rounded = np.rint(exact * scale) / scale
            fits = (rounded.astype(np.float32) == values) & ~found
            result[fits] = rounded[fits]
            found |= fits
    inexact = (exponent < -14) | (exponent > 5)  # `scale` is no exact power of ten
    result[inexact] = [float(str(value)) for value in values[inexact]]
    return result


def batch_tokens(device: torch.device, asked: int | None) -> int:
    """Tokens in one padded batch: as asked, or what suits the device."""
    return asked or (CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS)


def load_encoder(settings: WorkerSettings, found: ModelPath, *, budget: int | None) -> Encoder:
    """The encoder of the model that `prewarm.resolve` has found.

    budget: tokens in one padded batch; None: what suits the device. Logs the phases import and load.
    Raises StartError for what a new try cannot mend.
    """
    with prewarm.phase("import"):
        from sentence_transformers import SentenceTransformer
    with prewarm.phase("load") as phase:
        device, dtype = pick_device(settings)
        model = SentenceTransformer(
            str(found.path),
            device=str(device),
            trust_remote_code=settings.trust_remote_code,
            local_files_only=True,
            model_kwargs={"dtype": dtype},
        ).eval()
        phase.bytes = sum(weight.nbytes for weight in model.parameters())
    return Encoder(model, budget=batch_tokens(device, budget))
