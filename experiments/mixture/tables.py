"""Results over seeds: JSON for machines, Markdown for readers."""

from __future__ import annotations

from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch

from experiments.mixture.methods import PARTS
from experiments.mixture.training import Settings
from experiments.tables import cell, over_seeds, seeds_of, table_head, table_row

COLUMNS = {
    "centre": "in the centre",
    "hacked": "hacked",
    "off": "off the manifold",
    "off_last_context": "off, saturated context",
    "penalised": "penalised",
    "resets": "resets",
    "refused": "refused",
    "true": "true reward",
    "proxy": "proxy",
}
"""Figures of a run and what the tables call them."""

SHOWN = {
    "base": ("centre", "off", "penalised", "resets", "true"),
    "std": ("off_last_context", "off", "centre", "proxy"),
    "hack": ("hacked", "centre", "penalised", "resets", "refused", "true", "proxy"),
}
_COUNTS = ("resets", "refused")


def figures(record: dict[str, Any]) -> dict[str, float]:
    """The figures of one run: shares of final samples, and what happened in training.

    ``penalised`` is the mean share of gated samples over all epochs; ``refused`` counts the
    epochs in which a reset was due and refused.
    """
    epochs = record["epochs"]
    return {
        **record["end"],
        "penalised": fmean(epochs["gate"]),
        "resets": sum(epochs["reset"]),
        "refused": sum(epochs["refused"]),
    }


def summarize(records: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """Every figure of every method: one value per seed, their mean and standard deviation."""
    parts: dict[str, Any] = {}
    for part in PARTS:
        mine = [r for r in records if r["part"] == part.name]
        starts = {r["seed"]: r["start"] for r in mine}
        parts[part.name] = {
            "title": part.title,
            "pretrained": _over_seeds(list(starts.values())),
            "methods": {
                method.name: _over_seeds([figures(r) for r in mine if r["method"] == method.name])
                for method in part.methods
            },
        }
    return {
        "settings": asdict(settings),
        "seeds": sorted({r["seed"] for r in records}),
        "seconds_per_run": round(fmean(r["seconds"] for r in records), 2),
        "torch": torch.__version__,
        "parts": parts,
    }


def _over_seeds(rows: list[dict[str, float]]) -> dict[str, Any]:
    return {name: over_seeds([row[name] for row in rows]) for name in rows[0]}


def markdown(summary: dict[str, Any]) -> str:
    """One table per part: mean ± standard deviation over seeds, and the seeds' main figure."""
    seeds = ", ".join(map(str, summary["seeds"]))
    lines = [
        "# Results of the mixture experiment",
        "",
        "Written by `python -m experiments.mixture`; what it means, and the protocol, are",
        f"in `docs/experiments/mixture.md`. Mean ± standard deviation over the seeds {seeds};",
        f"{summary['settings']['evaluation_samples']} samples each; torch {summary['torch']}.",
    ]
    for name, part in summary["parts"].items():
        shown = SHOWN[name]
        first = COLUMNS[shown[0]]
        head = ["method", *(COLUMNS[c] for c in shown), f"{first}, seed by seed"]
        lines += ["", f"## {part['title']}", "", *table_head(head)]
        for method, values in [("pretrained", part["pretrained"]), *part["methods"].items()]:
            cells = [_cell(c, values[c]) if c in values else "" for c in shown]
            lines.append(table_row([method, *cells, seeds_of(values[shown[0]])]))
    return "\n".join(lines) + "\n"


def _cell(column: str, value: dict[str, Any]) -> str:
    return cell(value, 1 if column in _COUNTS else 3)
