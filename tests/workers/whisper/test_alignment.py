"""Dynamic time warping against every path, on small matrices."""

import math
from itertools import pairwise

import numpy as np
import pytest

from workers.whisper.alignment import dynamic_time_warping, path_starts


def cheapest(cost: np.ndarray, i: int, j: int) -> float:
    if i < 0 or j < 0:
        return math.inf
    if i == j == 0:
        return float(cost[0, 0])
    return float(cost[i, j]) + min(cheapest(cost, a, b) for a, b in ((i - 1, j - 1), (i - 1, j), (i, j - 1)))


def test_dynamic_time_warping_takes_the_cheapest_path() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        rows, columns = rng.integers(1, 6, 2)
        cost = rng.normal(size=(rows, columns)).astype(np.float32)
        path = dynamic_time_warping(cost)
        assert path[0] == (0, 0)
        assert path[-1] == (rows - 1, columns - 1)
        assert all((c - a, d - b) in {(0, 1), (1, 0), (1, 1)} for (a, b), (c, d) in pairwise(path))
        total = sum(float(cost[step]) for step in path)
        assert total == pytest.approx(cheapest(cost, rows - 1, columns - 1), abs=1e-4)
        assert len(path_starts(path)) == rows
