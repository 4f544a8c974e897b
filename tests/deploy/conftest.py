"""An account that stands in for RunPod's, and `python -m deploy` with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.__main__ import main
from deploy.rollout import Pace
from tests.deploy.stand_in import KEY, Account, account

PACE = Pace(
    poll=0.01,
    back_off=0.01,
    log_silence=0.05,
    log_every=0.05,
    unhealthy=0.05,
    capacity=0.15,
    total=30,
    ping=5,
)
WORKER = "sentence-transformers"


@dataclass
class Cli:
    """`python -m deploy` for one worker. out, err: what the last call printed."""

    capsys: pytest.CaptureFixture[str]
    folder: Path
    pace: Pace = PACE
    out: str = ""
    err: str = ""

    def __call__(self, command: str, *options: str, **config: Any) -> int:
        """The exit status. config: keys that this call's deploy.toml has in place of the defaults."""
        path = self.folder / "deploy.toml"
        keys = {"pools": ["AMPERE_16", "ADA_24"], "cuda": "13.0", **config}
        tables = {key: keys.pop(key) for key in list(keys) if isinstance(keys[key], dict)}
        lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
        for name, table in tables.items():
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
        path.write_text("\n".join(lines))
        status = main([command, WORKER, f"--config={path}", *options], self.pace)
        self.out, self.err = self.capsys.readouterr()
        assert KEY not in self.out + self.err
        return status

    def json(self, command: str, *options: str, **config: Any) -> Any:
        """What --json prints; the exit status is in `exit`."""
        status = self(command, "--json", *options, **config)
        result = json.loads(self.out)
        assert result["exit"] == status
        return result


@pytest.fixture
def runpod(monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    for name in ("TAG", "MODEL_NAME"):
        monkeypatch.delenv(name, raising=False)
    with account() as state:
        monkeypatch.setenv("RUNPOD_API_BASE_URL", state.url)
        monkeypatch.setenv("RUNPOD_API_KEY", KEY)
        monkeypatch.setenv("REGISTRY", "docker.io/me")
        yield state


@pytest.fixture
def cli(runpod: Account, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    return Cli(capsys, tmp_path)
