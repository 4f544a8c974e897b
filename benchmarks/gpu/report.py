"""What the parts share: the device, the rows of the report, and facts that a later part needs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def cell(value: Any) -> str:
    """A number with three significant digits, anything else as one line of text."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return " ".join(str(value).replace("|", "/").split())


@dataclass(frozen=True)
class Part:
    """What a part is given.

    worker: one of models.CASES. folder: of its model. tiny: tiny shapes, as with --cpu. report: the markdown
    file. facts: a JSON file, the measurements of earlier parts by name.
    """

    worker: str
    folder: Path
    tiny: bool
    report: Path
    facts: Path

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.tiny else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 where the GPU has it natively, else float16; float32 on a CPU."""
        if self.tiny:
            return torch.float32
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bf16 else torch.float16

    def row(self, what: str, measured: Any, aim: Any = "", reached: bool | None = None) -> None:
        """Append a row at once: a part that is killed keeps the rows before."""
        verdict = {True: "yes", False: "**no**", None: ""}[reached]
        cells = (cell(value) for value in (what, measured, aim, verdict))
        with self.report.open("a") as file:
            file.write("| " + " | ".join(cells) + " |\n")

    def at_least(self, what: str, measured: float, aim: float) -> None:
        self.row(what, measured, f">= {aim:g}", measured >= aim)

    def at_most(self, what: str, measured: float, aim: float) -> None:
        self.row(what, measured, f"<= {aim:g}", measured <= aim)

    def attempt(self, what: str, work: Callable[[], None]) -> None:
        """Run one of several alternatives; where it fails, its row has the cause and the others follow."""
        try:
            work()
        except Exception as error:
            self.row(what, f"failed: {type(error).__name__}: {str(error)[:200]}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def known(self, name: str) -> Any:
        """A fact of an earlier part; None where that part did not get so far."""
        return json.loads(self.facts.read_text()).get(name) if self.facts.exists() else None

    def keep(self, name: str, value: Any) -> None:
        facts = json.loads(self.facts.read_text()) if self.facts.exists() else {}
        new = self.facts.with_suffix(".new")
        new.write_text(json.dumps({**facts, name: value}))
        os.replace(new, self.facts)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device, *, repeats: int) -> float:
    """Seconds of one call of `work` on an idle device: the best of three rounds of `repeats` calls."""
    work()  # kernels are chosen and memory is allocated at the first call
    best = float("inf")
    for _ in range(3):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize(device)
        best = min(best, (time.perf_counter() - begin) / repeats)
    return best
