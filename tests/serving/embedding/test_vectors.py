"""Embeddings as numbers and as base64."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from serving.embedding.schemas import EmbedResponse, Usage
from serving.embedding.vectors import encode_vectors, shortest_decimals, truncate_and_normalize
from shared.results import to_plain

ROWS = np.random.default_rng(0).normal(0, 0.05, (40, 50)).astype(np.float32)


def response(vectors: list[list[float]] | list[str]) -> EmbedResponse:
    usage = Usage(prompt_tokens=1, total_tokens=1)
    return EmbedResponse.model_construct(
        embeddings=vectors, model="m", revision=None, dimensions=50, count=40, truncated=0, usage=usage
    )


def test_floats_are_printed_in_their_shortest_form() -> None:
    values = ROWS.flatten()
    values[:7] = [0, 1, -0.5, 1e-12, 3.0e8, 0.1, -1.3213707e-32]
    printed = [json.dumps(value) for value in shortest_decimals(values).tolist()]
    for value, text in zip(values, printed, strict=True):
        assert np.float32(float(text)) == value
        assert float(text) == float(str(value)), "numpy's own shortest form"


async def test_base64_holds_the_same_float32_and_is_smaller() -> None:
    numbers, coded = encode_vectors(ROWS, "float"), encode_vectors(ROWS, "base64")
    assert np.array_equal(np.array(numbers, np.float32), ROWS)
    assert all(
        base64.b64decode(text) == row.astype("<f4").tobytes() for text, row in zip(coded, ROWS, strict=True)
    )
    sizes = [len((await to_plain(response(vectors)))[1]) for vectors in (numbers, coded)]
    assert sizes[0] / sizes[1] > 2.2


def test_large_arrays_are_written_in_parts() -> None:
    rows = np.random.default_rng(1).random((1100, 300), np.float32)  # more than one part
    assert np.array_equal(np.array(encode_vectors(rows, "float"), np.float32), rows)
    assert encode_vectors(rows[:0], "float") == []


@pytest.mark.parametrize("dimensions", [None, 8])
def test_dimensions_are_cut_before_normalising(dimensions: int | None) -> None:
    vectors = truncate_and_normalize(ROWS, dimensions=dimensions, normalize=True)
    assert vectors.shape == (40, dimensions or 50)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    plain = truncate_and_normalize(ROWS, dimensions=dimensions, normalize=False)
    np.testing.assert_allclose(vectors * np.linalg.norm(plain, axis=1, keepdims=True), plain, atol=1e-6)
    assert not truncate_and_normalize(np.zeros((1, 4), "f4"), dimensions=None, normalize=True).any()


def test_numbers_that_are_not_finite_stay_so() -> None:
    vectors = encode_vectors(np.array([[np.nan, np.inf, 1.0]], np.float32), "float")
    np.testing.assert_array_equal(vectors, [[np.nan, np.inf, 1.0]])
