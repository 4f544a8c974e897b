"""Embeddings as a client receives them: truncated, normalised, written as numbers or base64."""

from __future__ import annotations

import base64

import numpy as np

# Numbers that are written at a time. `tolist` holds the interpreter lock, about 25 ns a number: a thread that
# wrote a large result in one call would stop the event loop.
_PART = 2**18


def truncate_and_normalize(embeddings: np.ndarray, *, dimensions: int | None, normalize: bool) -> np.ndarray:
    """The leading `dimensions` of each embedding, scaled to length 1 after truncation, which shortens it.

    embeddings: (texts, model's dimensions), float32.
    """
    vectors = embeddings[:, :dimensions]
    if normalize:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def encode_vectors(embeddings: np.ndarray, encoding_format: str) -> list[list[float]] | list[str]:
    """Each embedding as base64 of little-endian float32, or as numbers in their shortest float32 form."""
    if encoding_format == "base64":
        return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in embeddings]
    step = max(1, _PART // max(1, embeddings.shape[1]))
    vectors: list[list[float]] = []
    for start in range(0, len(embeddings), step):
        vectors += shortest_decimals(embeddings[start : start + step].astype(np.float32)).tolist()
    return vectors


def shortest_decimals(values: np.ndarray) -> np.ndarray:
    """float32 `values` as the float64 that JSON prints shortest and that reads back as the same float32.

    A float32 needs 6 to 9 significant digits; tolist() alone would print the 17 of a float64. Rounding an
    array to 6, 7, 8 and 9 digits is 13 times faster than numpy's text of each number.
    """
    exact = values.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.where(exact == 0, 0, np.floor(np.log10(np.abs(exact))))
        result, done = exact.copy(), np.zeros(values.shape, bool)
        for digits in range(6, 10):
            scale = 10.0 ** (digits - 1 - exponent)
            rounded = np.rint(exact * scale) / scale
            fits = (rounded.astype(np.float32) == values) & ~done
            result[fits] = rounded[fits]
            done |= fits
    inexact = (exponent < -14) | (exponent > 5)  # `scale` is not an exact power of ten
    result[inexact] = [float(str(value)) for value in values[inexact]]
    return result
