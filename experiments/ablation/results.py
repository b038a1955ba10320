"""Statistics of the ablation over seeds: JSON for machines, Markdown for readers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from experiments.ablation.methods import METHODS
from experiments.ablation.run import MEASURED
from experiments.tables import cell, over_seeds, seeds_of, table_head, table_row

Record = dict[str, Any]

TITLES = {
    "proxy": "count (proxy)",
    "strict": "strict_count",
    "judge": "judge",
    "clean": "clean (aux)",
    "shape_fit": "shape_fit (aux)",
    "artifact": "artifact",
    "diversity": "diversity",
    "distance": "feature distance",
    "gated": "gated",
    "resets": "resets",
    "seconds": "s/epoch",
}
DIGITS = {"artifact": 4, "diversity": 2, "distance": 1, "resets": 1, "seconds": 2}
#: held-out figure of the frontier
HELD_OUT = "strict"
#: how far below the start the held-out accuracy may end and still count as kept: about the
#: standard error of an accuracy over 160 images
TOLERANCE = 0.04


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Every figure at the end, one value per seed, with mean and standard deviation.

    A setting is on the ``frontier`` when no other is at least as good by the means of both the
    proxy and the held-out accuracy. ``hacked`` counts the seeds in which the proxy rose while the
    held-out accuracy fell. A method's ``kept_gain`` is the largest mean gain of the proxy among
    its KL coefficients that kept the held-out accuracy (see `TOLERANCE`); None if none did.
    """
    settings = list(dict.fromkeys(r["setting"] for r in records))
    rows = {name: _setting([r for r in records if r["setting"] == name]) for name in settings}
    for row in rows.values():
        row["frontier"] = not any(_dominates(other, row) for other in rows.values())
    start = _over_seeds([r["start"] for r in records if r["setting"] == settings[0]])
    return {
        "scale": records[0]["scale"],
        "seeds": sorted({r["seed"] for r in records}),
        "torch": torch.__version__,
        "start": start,
        "settings": rows,
        "methods": {
            name: _kept_gain([r for r in rows.values() if r["method"] == name], start)
            for name in dict.fromkeys(r["method"] for r in rows.values())
        },
    }


def _kept_gain(settings: Sequence[Record], start: Record) -> Record:
    kept = [r for r in settings if r[HELD_OUT]["mean"] >= start[HELD_OUT]["mean"] - TOLERANCE]
    best = max(kept, key=lambda r: r["proxy"]["mean"], default=None)
    if best is None:
        return {"kept_gain": None, "kept_at": None}
    gain = best["proxy"]["mean"] - start["proxy"]["mean"]
    return {"kept_gain": round(gain, 5), "kept_at": best["kl_coef"]}


def _setting(mine: Sequence[Record]) -> dict[str, Any]:
    figures = [
        {**r["end"], "gated": r["gated"], "resets": r["resets"], "seconds": r["seconds"]}
        for r in mine
    ]
    hacked = [
        r["end"]["proxy"] > r["start"]["proxy"] and r["end"][HELD_OUT] < r["start"][HELD_OUT]
        for r in mine
    ]
    return {
        "method": mine[0]["method"],
        "kl_coef": mine[0]["kl_coef"],
        "hacked": sum(hacked),
        "runs": len(mine),
        **_over_seeds(figures),
    }


def _over_seeds(rows: Sequence[Record]) -> dict[str, Any]:
    names = [*MEASURED, *(n for n in ("gated", "resets", "seconds") if n in rows[0])]
    columns = {name: over_seeds([row[name] for row in rows], digits=5) for name in names}
    if "seconds" in columns:  # the median: a run beside which something else ran does not count
        columns["seconds"]["median"] = round(median(columns["seconds"]["seeds"]), 3)
    return columns


def _dominates(other: Record, row: Record) -> bool:
    ahead = [other[name]["mean"] - row[name]["mean"] for name in ("proxy", HELD_OUT)]
    return min(ahead) >= 0 and max(ahead) > 0


def markdown(summary: dict[str, Any]) -> str:
    """The table of all settings, and the seeds behind the two figures of the frontier."""
    scale, seeds = summary["scale"], ", ".join(map(str, summary["seeds"]))
    columns = [*MEASURED, "gated", "resets", "seconds"]
    head = ["method", "kl_coef", *(TITLES[c] for c in columns), "hacked", "frontier"]
    lines = [
        "# Results of the ablation",
        "",
        "Written by `python -m experiments.ablation`; what it means, and the protocol, are",
        f"in `docs/experiments/ablation.md`. After {scale['epochs']} epochs of "
        f"{scale['groups']} prompts x {scale['group_size']} samples;",
        f"mean ± standard deviation over the seeds {seeds}; {4 * scale['prompts']} images each,",
        f"ten steps without noise; torch {summary['torch']}. *hacked*: seeds in which the proxy",
        "rose and `strict_count` fell. *frontier*: no other setting is better in both. Seconds are",
        "the median over the seeds.",
        "",
        *table_head(head),
        table_row(["before", "", *(_cell(c, summary["start"].get(c)) for c in columns), "", ""]),
    ]
    for row in summary["settings"].values():
        coef = "" if row["kl_coef"] is None else f"{row['kl_coef']:g}"
        cells = [row["method"], coef, *(_cell(c, row[c]) for c in columns)]
        best = "yes" if row["frontier"] else ""
        lines.append(table_row([*cells, f"{row['hacked']} of {row['runs']}", best]))
    lines += [
        "",
        "## Gain of the proxy that keeps the held-out accuracy",
        "",
        "The largest mean gain of `count` among a method's settings whose mean `strict_count`",
        f"ended at most {TOLERANCE} below the start.",
        "",
        *table_head(["method", "gain", "at kl_coef"]),
    ]
    for name, method in summary["methods"].items():
        gain, coef = method["kept_gain"], method["kept_at"]
        shown = "none kept it" if gain is None else f"{gain:+.3f}"
        lines.append(table_row([name, shown, "" if coef is None else f"{coef:g}"]))
    shown_seeds = ("proxy", HELD_OUT, "clean")
    lines += ["", "## Seed by seed", "", *table_head(["setting", *shown_seeds])]
    for name, row in summary["settings"].items():
        lines.append(table_row([name, *(seeds_of(row[c]) for c in shown_seeds)]))
    lines += ["", "## Methods", ""]
    lines += [
        f"- `{m.name}`: {m.title}. "
        + (" ".join(f"`--{k} {v}`" for k, v in m.overrides.items()) or "The recipe as it is.")
        for m in METHODS
    ]
    return "\n".join(lines) + "\n"


def _cell(column: str, value: dict[str, Any] | None) -> str:
    if value is not None and "median" in value:
        return f"{value['median']:.{DIGITS[column]}f}"
    return cell(value, DIGITS.get(column, 3))
