"""From a request to a response of an embedding worker: its own, and OpenAI's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from serving.embedding.schemas import (
    Embedding,
    EmbeddingsRequest,
    EmbeddingsResponse,
    EmbedRequest,
    EmbedResponse,
    Usage,
    Vectors,
)
from shared.errors import invalid
from shared.jobs import Job

if TYPE_CHECKING:
    from serving.embedding.encoder import Encoder


class Prompt(NamedTuple):
    """What is put before each text. param: the field of the request that it came in, for errors."""

    text: str
    param: str = "prompt"


async def embed(
    request: EmbedRequest, job: Job, encoder: Encoder, prompt: Prompt, *, model: str, revision: str | None
) -> EmbedResponse:
    """The answer of an embedding worker's own route.

    Raises JobError: code "empty" for a request without a text, "result_too_large", and as `Encoder.tokenize`
    and `Encoder.encode` do.
    """
    inputs = request.texts or ([] if request.text is None else [request.text])
    if not inputs:
        raise invalid("texts", "no texts. Give texts, a list of at least one, or text.", "empty")
    vectors, truncated, usage = await _embed(
        request,
        job,
        encoder,
        inputs,
        param="texts" if request.texts else "text",
        prompt=prompt,
        truncate=request.truncate,
        batch_size=request.batch_size,
        normalize=request.normalize,
    )
    # model_construct: to validate each number of a large result takes as long as to write it.
    return EmbedResponse.model_construct(
        embeddings=vectors,
        model=model,
        revision=revision,
        dimensions=request.dimensions or encoder.dimensions,
        count=len(vectors),
        truncated=truncated,
        usage=usage,
    )


async def embed_openai(
    request: EmbeddingsRequest,
    job: Job,
    encoder: Encoder,
    prompt: Prompt,
    *,
    model: str,
    accept_token_ids: bool,
) -> EmbeddingsResponse:
    """The answer of /v1/embeddings: unit vectors, long texts truncated. Raises JobError as `embed` does.

    accept_token_ids: false refuses arrays of token ids: a client that sends OpenAI's, as LangChain does by
    default, would receive the embedding of another text.
    """
    if not (accept_token_ids or isinstance(request.input[0], str)):
        raise invalid(
            "input",
            "token ids are refused: most clients send those of OpenAI's models, which mean another text "
            "here. Send text: LangChain's OpenAIEmbeddings does with check_embedding_ctx_length=False. For "
            "the model's own ids set ACCEPT_TOKEN_IDS=true on the endpoint.",
            "unsupported",
        )
    vectors, _, usage = await _embed(request, job, encoder, request.input, param="input", prompt=prompt)
    numbered: Iterable[tuple[int, list[float] | str]] = enumerate(vectors)
    return EmbeddingsResponse.model_construct(
        data=[Embedding.model_construct(index=index, embedding=vector) for index, vector in numbered],
        model=model,
        usage=usage,
    )


async def _embed(
    request: EmbedRequest | EmbeddingsRequest,
    job: Job,
    encoder: Encoder,
    inputs: Sequence[str] | Sequence[list[int]],
    *,
    param: str,
    prompt: Prompt,
    truncate: bool = True,
    batch_size: int | None = None,
    normalize: bool = True,
) -> tuple[Vectors, int, Usage]:
    """The embeddings of `inputs`, and how many of those were truncated."""
    dimensions = request.dimensions or encoder.dimensions
    # A number takes at least 10 bytes of JSON, a float32 in base64 16 / 3.
    size = len(inputs) * dimensions * (10 if request.encoding_format == "float" else 16 / 3)
    job.check_size(int(size), "Use encoding_format base64 or fewer dimensions. ")
    if dimensions > encoder.dimensions:
        raise invalid("dimensions", f"{dimensions}, and the model has {encoder.dimensions}.")
    texts = await asyncio.to_thread(
        encoder.tokenize,
        inputs,
        prompt=prompt.text,
        truncate=truncate,
        param=param,
        prompt_param=prompt.param,
    )
    vectors = await encoder.embed(
        texts,
        batch_size=batch_size,
        dimensions=dimensions,
        normalize=normalize,
        encoding_format=request.encoding_format,
    )
    tokens = sum(len(text.tokens) for text in texts)
    usage = Usage(prompt_tokens=tokens, total_tokens=tokens)
    return vectors, sum(text.truncated for text in texts), usage
