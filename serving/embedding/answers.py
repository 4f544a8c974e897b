"""The answers of embedding workers: their own, and OpenAI's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.embedding.schemas import (
    Embedding,
    EmbeddingsRequest,
    EmbeddingsResponse,
    EmbeddingsUsage,
    EmbedRequest,
    EmbedResponse,
    Usage,
)
from shared.errors import invalid
from shared.jobs import Job

if TYPE_CHECKING:
    from serving.embedding.encoder import Encoder


async def embed(
    request: EmbedRequest, job: Job, encoder: Encoder, *, prompt: str, model: str, revision: str | None
) -> EmbedResponse:
    """Raises JobError(code="empty") for a request without a text; see `Encoder.embed` and `_check_size`."""
    inputs = request.texts or ([] if request.text is None else [request.text])
    if not inputs:
        raise invalid("texts", "no texts. Give texts, a list of at least one, or text.", "empty")
    dimensions = request.dimensions or encoder.dimensions
    _check_size(job, len(inputs), dimensions, request.encoding_format)
    texts, vectors = await encoder.embed(
        inputs,
        prompt=prompt,
        param="texts" if request.texts else "text",
        truncate=request.truncate,
        batch_size=request.batch_size,
        dimensions=request.dimensions,
        normalize=request.normalize,
        encoding_format=request.encoding_format,
    )
    tokens = sum(len(text.tokens) for text in texts)
    return EmbedResponse.model_construct(
        embeddings=vectors,
        model=model,
        revision=revision,
        dimensions=dimensions,
        count=len(vectors),
        truncated=sum(text.truncated for text in texts),
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
    )


async def embed_openai(
    request: EmbeddingsRequest, job: Job, encoder: Encoder, *, prompt: str, model: str
) -> EmbeddingsResponse:
    """The answer of /v1/embeddings: unit vectors, long texts truncated. Raises JobError as `embed` does."""
    _check_size(job, len(request.input), request.dimensions or encoder.dimensions, request.encoding_format)
    texts, vectors = await encoder.embed(
        request.input,
        prompt=prompt,
        param="input",
        truncate=True,
        batch_size=None,
        dimensions=request.dimensions,
        normalize=True,
        encoding_format=request.encoding_format,
    )
    tokens = sum(len(text.tokens) for text in texts)
    return EmbeddingsResponse(
        data=[Embedding.model_construct(index=i, embedding=vector) for i, vector in enumerate(vectors)],
        model=model,
        usage=EmbeddingsUsage(prompt_tokens=tokens, total_tokens=tokens),
    )


def _check_size(job: Job, count: int, dimensions: int, encoding_format: str) -> None:
    """Refuse what could not be returned. A number takes at least ten bytes of JSON, in base64 16 / 3."""
    size = count * dimensions * (10 if encoding_format == "float" else 16 / 3)
    job.check_size(int(size), "Use encoding_format base64 or fewer dimensions. ")
