"""What an endpoint costs, from RunPod's live catalogue."""

from __future__ import annotations

from typing import Any

from deploy.api import Gpu
from deploy.config import ConfigError


class Prices:
    """Dollars an hour of one GPU, by pool. An account's own discounts are not in the catalogue."""

    def __init__(self, gpus: list[Gpu]) -> None:
        self.by_pool: dict[str, float] = {}
        for gpu in gpus:
            if gpu.pool and "serverless" in gpu.price:
                self.by_pool[gpu.pool] = max(gpu.price["serverless"], self.by_pool.get(gpu.pool, 0.0))

    def check(self, pools: list[str]) -> None:
        """Raises ConfigError for a pool that RunPod does not have."""
        for pool in pools:
            if pool not in self.by_pool:
                raise ConfigError(f"RunPod has no pool {pool}. Its pools: {', '.join(sorted(self.by_pool))}.")

    def per_hour(self, gpu: dict[str, Any], workers: dict[str, int]) -> dict[str, Any]:
        """`worker`: one worker, by pool; `min`: the fewest workers in the cheapest pool; `max`: the most, all
        busy, in the dearest.
        """
        known = [pool for pool in gpu.get("pools", []) if pool in self.by_pool]
        worker = {pool: round(self.by_pool[pool] * gpu.get("count", 1), 4) for pool in known}
        cheapest, dearest = min(worker.values(), default=0.0), max(worker.values(), default=0.0)
        return {"worker": worker, "min": cheapest * workers["min"], "max": dearest * workers["max"]}
