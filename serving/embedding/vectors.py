"""Embeddings as a client receives them: cut, normalised, encode_vectors as numbers or base64."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np


def truncate_and_normalize(embeddings: np.ndarray, *, dimensions: int | None, normalize: bool) -> np.ndarray:
    """The leading `dimensions` of each row, scaled to length 1 after the cut, which would shorten them."""
    rows = embeddings[:, :dimensions]
    if normalize:
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return rows


def encode_vectors(embeddings: np.ndarray, encoding_format: str) -> Sequence[list[float] | str]:
    """The rows as base64 of little-endian float32, or as numbers in their shortest float32 form."""
    if encoding_format == "base64":
        return [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in embeddings]
    return shortest_decimals(embeddings.astype(np.float32)).tolist()  # type: ignore[no-any-return]


def shortest_decimals(values: np.ndarray) -> np.ndarray:
    """float32 `values` as the float64 that JSON prints shortest and that reads back as the same.

    A float32 needs 6 to 9 significant digits; tolist() alone would print the 17 of a float64. Rounding
    whole arrays to 6, 7, 8 and 9 digits is 13 times faster than asking numpy for each number's text.
    """
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
