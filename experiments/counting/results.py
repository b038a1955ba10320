"""Accuracy by count over seeds: JSON, Markdown and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from experiments.counting.run import COUNTS, METHODS, RANGES, Scale
from experiments.tables import cell, over_seeds, seeds_of, table_head, table_row

Record = dict[str, Any]

_NAMES = ("base", *METHODS)


def summarize(records: Sequence[Record], scale: Scale) -> dict[str, Any]:
    """Accuracy of each method by count and by range: a value per seed, mean and deviation."""
    methods = {}
    for name in _NAMES:
        mine = [r["accuracy"] for r in records if r["method"] == name]
        by_count = {str(c): over_seeds([row[str(c)] for row in mine]) for c in COUNTS}
        by_range = {
            key: over_seeds([fmean(row[str(c)] for c in counts) for row in mine])
            for key, counts in RANGES.items()
        }
        methods[name] = {"counts": by_count, "ranges": by_range}
    return {
        "scale": asdict(scale),
        "seeds": sorted({r["seed"] for r in records if r["seed"] is not None}),
        "torch": torch.__version__,
        "methods": methods,
    }


def markdown(summary: dict[str, Any]) -> str:
    """Accuracy by range, every seed of it, and by count."""
    scale, seeds = summary["scale"], ", ".join(map(str, summary["seeds"]))
    titles = {key: f"{key} ({c.start} to {c.stop - 1})" for key, c in RANGES.items()}
    lines = [
        "# Results of the counting experiment",
        "",
        "Written by `python -m experiments.counting`; what it means, and the protocol, are",
        "in `docs/experiments/counting.md`. Strict accuracy, mean ± standard deviation over the",
        f"seeds {seeds}; {8 * scale['images']} images per count, ten steps without noise;",
        f"{scale['epochs']} epochs; torch {summary['torch']}.",
        "",
        *table_head(["method", *titles.values()]),
    ]
    for name, method in summary["methods"].items():
        lines.append(table_row([name, *(cell(method["ranges"][key]) for key in RANGES)]))
    lines += ["", "## Seed by seed", "", *table_head(["method", *titles.values()])]
    for name, method in summary["methods"].items():
        lines.append(table_row([name, *(seeds_of(method["ranges"][key]) for key in RANGES)]))
    lines += ["", "## By count", "", *table_head(["method", *map(str, COUNTS)])]
    for name, method in summary["methods"].items():
        lines.append(
            table_row([name, *(f"{method['counts'][str(c)]['mean']:.3f}" for c in COUNTS)])
        )
    return "\n".join(lines) + "\n"


def draw(summary: dict[str, Any], path: Path) -> None:
    """Write the figure as PNG: accuracy by count, with the ranges marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for name, method in summary["methods"].items():
        rows = [method["counts"][str(c)] for c in COUNTS]
        axes.errorbar(
            list(COUNTS),
            [row["mean"] for row in rows],
            [row["sd"] or 0 for row in rows],
            marker="o",
            ms=4,
            lw=1.4,
            elinewidth=0.7,
            label=name,
        )
    for key, counts in RANGES.items():
        axes.axvline(counts.start - 0.5, color="#bbb", lw=0.8)
        axes.text(counts.start - 0.4, 1.02, key, fontsize=8, color="#666")
    axes.set(xlabel="shapes asked for", ylabel="strict accuracy", ylim=(-0.03, 1.1))
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)
