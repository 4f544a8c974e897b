"""`make check-gpu` on tiny shapes: each part is a process, and the report keeps what each has found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.workers import ROOT

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("part", "minutes", "row"),
    [
        ("right: out", 1, "| of 8 jobs while memory ran out, answered | 8 | 8 | yes |"),
        ("nothing", 0, "| left out | the time is over | | |"),
    ],
)
def test_a_part_is_reported(tmp_path: Path, part: str, minutes: int, row: str) -> None:
    report = tmp_path / "gpu.md"
    command = [sys.executable, "-m", "benchmarks.gpu", "huggingface", "--cpu", f"--minutes={minutes}"]
    done = subprocess.run([*command, f"--only={part}", f"--report={report}"], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert row in report.read_text()
    assert "matrix product, torch.float32" in report.read_text()
