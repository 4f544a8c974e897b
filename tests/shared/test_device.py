"""The device of a model, and the shares of the CPU's threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from shared.device import parallel_batches, pick_device, share_cores
from shared.errors import StartError

pytestmark = pytest.mark.engine


def test_settings_choose_device_and_dtype() -> None:
    import torch

    assert pick_device("cpu") == (torch.device("cpu"), torch.float32)
    assert pick_device("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)
    assert pick_device()[0].type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(StartError, match="DEVICE=cuda:99: ") as caught:
        pick_device("cuda:99")
    assert caught.value.code == "no_gpu"


def test_a_batch_has_its_share_of_the_cores() -> None:
    import torch

    def share(running: int) -> int:
        share_cores(4, running)
        return torch.get_num_threads()

    with ThreadPoolExecutor(1) as thread:
        shares = [thread.submit(share, running).result() for running in (1, 2, 3, 4, 9, 0)]
    assert shares == [4, 2, 1, 1, 1, 4]


def test_only_a_cpu_runs_several_batches() -> None:
    import torch

    assert parallel_batches(torch.device("cpu")) == torch.get_num_threads()
    assert parallel_batches(torch.device("cuda")) == 1
