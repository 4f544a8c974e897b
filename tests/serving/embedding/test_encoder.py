"""The Encoder without a job: as a benchmark or a notebook uses it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import AutoTokenizer

from serving.embedding.encoder import Encoder, load_encoder
from serving.embedding.vectors import truncate_and_normalize
from shared.errors import JobError
from tests.helpers import least_stall
from tools.models import minilm

pytestmark = pytest.mark.engine
MIXED = [" ".join(f"word{i % 7} and" for i in range(length)) for length in (3, 90, 1, 40, 7, 120, 2, 15)]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(minilm())


async def test_an_encoder_needs_no_job(encoder: Encoder) -> None:
    """Its embeddings are the library's, alone and in batches with other calls."""
    texts = [*MIXED, "", "ünïcödé 漢字 🤗", "x" * 5000, "word " * 2000]
    library = SentenceTransformer(str(minilm()), device="cpu")
    expected = library.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    together = await encoder.embed(encoder.tokenize(texts))
    np.testing.assert_allclose(together, expected, atol=1e-5)
    calls = [encoder.encode(encoder.tokenize([text])) for text in texts * 4]
    for number, embeddings in enumerate(await asyncio.gather(*calls)):
        vector = truncate_and_normalize(embeddings, dimensions=None, normalize=True)[0]
        np.testing.assert_allclose(vector, expected[number % len(texts)], atol=1e-5)


async def test_batch_size_bounds_the_texts_of_one_call(encoder: Encoder) -> None:
    batches: list[int] = []
    hook = encoder.model.register_forward_pre_hook(
        lambda _, inputs: batches.append(len(inputs[0]["input_ids"]))
    )
    texts = encoder.tokenize(["short"] * 12)
    await encoder.encode(texts, batch_size=5)
    assert batches == [5, 5, 2]
    batches.clear()
    await asyncio.gather(*(encoder.encode(texts[:1]) for _ in range(40)))
    hook.remove()
    assert sum(batches) == 40
    assert len(batches) <= 3, "calls that wait together run together"


async def test_a_vector_that_is_not_finite_fails_its_call_alone(encoder: Encoder) -> None:
    def break_long_texts(_: Any, inputs: Any, output: Any) -> None:
        output["sentence_embedding"][inputs[0]["attention_mask"].sum(1) > 9] = np.nan

    hook = encoder.model.register_forward_hook(break_long_texts)
    texts = encoder.tokenize(["fine", "too much " * 9])
    calls = asyncio.gather(encoder.encode(texts), encoder.encode(texts[:1]), return_exceptions=True)
    failed, fine = await calls
    hook.remove()
    assert isinstance(failed, JobError)
    assert (failed.code, "text 1" in failed.message) == ("not_finite", True)
    assert fine.shape == (1, 384)


async def test_a_model_without_a_transformer_runs_through_the_library(tmp_path: Path) -> None:
    """The ids of its tokenizer mean nothing without its own preprocessing."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16)]).save(str(tmp_path))
    encoder = load_encoder(tmp_path, device="cpu", budget=64)
    assert (encoder.takes_tokens, encoder.dimensions) == (False, 16)
    embeddings = await encoder.encode(encoder.tokenize(["a b c", "d"], prompt="p: "))
    assert isinstance(encoder.model, SentenceTransformer)
    np.testing.assert_allclose(embeddings, encoder.model.encode(["a b c", "d"], prompt="p: "), atol=1e-5)
    with pytest.raises(JobError, match="texts, not token ids"):
        encoder.tokenize([[1, 2]], param="input")


async def test_prompts_of_the_model_are_its_defaults_and_its_names() -> None:
    prompts = {"query": "find: ", "document": ""}
    model = SentenceTransformer(str(minilm()), device="cpu", prompts=prompts, default_prompt_name="query")
    # A pooling that leaves the prompt's tokens out has to know how many they are.
    model.set_pooling_include_prompt(False)
    encoder = Encoder(model, budget=1024)
    assert encoder.prompt_for(None, None) == "find: "
    assert encoder.prompt_for(None, "document") == ""
    texts = ["a", "some more words"]
    vectors = await encoder.embed(encoder.tokenize(texts, prompt="find: "))
    np.testing.assert_allclose(vectors, model.encode(texts, normalize_embeddings=True), atol=1e-5)


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
async def test_10_000_texts_do_not_block_the_event_loop(encoder: Encoder, encoding_format: str) -> None:
    """The forward pass is left out: 384 zeros a text; the rest is real."""
    stub = Encoder(encoder.model, budget=16384)
    stub.batcher = type(stub.batcher)(
        lambda texts: [np.full(384, 0.1, np.float32)] * len(texts),
        budget=16384,
        length=lambda text: len(text.tokens),
    )

    async def embed() -> None:
        texts = await asyncio.to_thread(stub.tokenize, [f"the text number {i}" for i in range(10_000)])
        assert len(await stub.embed(texts, dimensions=64, encoding_format=encoding_format)) == 10_000

    assert await least_stall(embed) < 0.1
