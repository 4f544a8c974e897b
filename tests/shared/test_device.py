"""Which device, and who has its cores."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from shared.device import parallel_batches, share_cores


@pytest.mark.engine
def test_a_batch_has_its_share_of_the_cores() -> None:
    import torch

    def share(running: int) -> int:
        share_cores(4, running)
        return torch.get_num_threads()

    with ThreadPoolExecutor(1) as lane:
        assert [lane.submit(share, running).result() for running in (1, 2, 3, 4, 9, 0)] == [4, 2, 1, 1, 1, 4]


@pytest.mark.engine
def test_only_a_cpu_has_several_lanes() -> None:
    import torch

    assert parallel_batches(torch.device("cpu")) == torch.get_num_threads()
    assert parallel_batches(torch.device("cuda")) == 1
