"""What the experiments' tables share: statistics over seeds, Markdown, and the files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any


def over_seeds(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Mean, standard deviation (None for one seed) and the values of the seeds, rounded."""
    return {
        "mean": round(fmean(values), digits),
        "sd": round(stdev(values), digits) if len(values) > 1 else None,
        "seeds": [round(value, digits) for value in values],
    }


def table_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def table_head(cells: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [table_row(cells), "|" + "---|" * len(cells)]


def cell(value: dict[str, Any] | None, digits: int = 3) -> str:
    """Mean ± standard deviation of what `over_seeds` returned; empty for None."""
    if value is None:
        return ""
    spread = "" if value["sd"] is None else f" ± {value['sd']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"


def seeds_of(value: dict[str, Any], digits: int = 3) -> str:
    """The values of the seeds in a row."""
    return " ".join(f"{v:.{digits}f}" for v in value["seeds"])


def write(out: Path, summary: dict[str, Any], table: str) -> str:
    """Write ``results.json`` and ``results.md`` into ``out``; returns the Markdown."""
    (out / "results.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(table, encoding="utf-8")
    return table
