"""A deploy with a real worker: the stand-in starts it when the endpoint is made, as RunPod would."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.deploy.conftest import PACE, WORKER, Cli
from tests.deploy.stand_in import Account


@pytest.mark.engine
@pytest.mark.parametrize("type_", ["queue", "http"])
def test_deploy_ends_in_the_answer_of_the_worker(runpod: Account, cli: Cli, type_: str) -> None:
    runpod.real = True
    cli.pace = replace(PACE, poll=0.2, total=200)
    result = cli.json("deploy", "--tag=1.0.0", f"--type={type_}", env={"MAX_BATCH_TOKENS": "512"})
    assert result["exit"] == 0, cli.err
    first, second = result["output"]["embeddings"]
    assert len(first) == len(second) == 32  # the tiny model
    assert cli("destroy", "--yes") == 0
    assert not runpod.named(WORKER)
