"""The figure: where each method ends, seed by seed, and what its samples look like."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.mixture.distribution import HACK_MIDDLE, HACK_RADIUS, MODE_RADIUS, modes
from experiments.mixture.methods import PARTS

Record = dict[str, Any]

_CENTRE, _HACK, _INK = "#1b7837", "#b2182b", "#444444"
_DOTS = {
    "base": [("centre", "in the centre", _CENTRE)],
    "std": [("off_last_context", "off the manifold, saturated context", _HACK)],
    "hack": [("centre", "in the centre", _CENTRE), ("hacked", "hacked", _HACK)],
}


def draw(records: list[Record], path: Path) -> None:
    """Write the figure as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods = PARTS[2].methods
    figure = plt.figure(figsize=(13, 9.2), layout="constrained")
    rows: Any = figure.subfigures(3, 1, height_ratios=(1.15, 1, 1))
    for axes, part in zip(rows[0].subplots(1, 3), PARTS, strict=True):
        _dots(axes, [r for r in records if r["part"] == part.name], part.name)
        axes.set_title(part.title, fontsize=9)
    seed = min(r["seed"] for r in records)
    hack = {
        m.name: [r for r in records if (r["part"], r["method"]) == ("hack", m.name)]
        for m in methods
    }
    for axes, (name, mine) in zip(rows[1].subplots(1, len(methods)), hack.items(), strict=True):
        _samples(axes, next(r for r in mine if r["seed"] == seed))
        axes.set_title(name, fontsize=9)
    rows[1].suptitle(f"Samples after training on the flawed proxy, seed {seed}", fontsize=10)
    all_axes = rows[2].subplots(1, len(methods), sharey=True)
    for axes, (name, mine) in zip(all_axes, hack.items(), strict=True):
        _curves(axes, mine)
        axes.set_title(name, fontsize=9)
    all_axes[0].set_ylabel("share of samples")
    rows[2].suptitle("Training on the flawed proxy, every seed", fontsize=10)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _dots(axes: Any, records: list[Record], part: str) -> None:
    names = list(dict.fromkeys(r["method"] for r in records))
    for offset, (key, label, colour) in enumerate(_DOTS[part]):
        for y, name in enumerate(names):
            values = [r["end"][key] for r in records if r["method"] == name]
            height = y + 0.18 * offset
            axes.plot(values, [height] * len(values), "o", ms=5, alpha=0.5, color=colour)
            axes.plot(fmean(values), height, "|", ms=14, mew=2, color=colour)
        axes.plot([], [], "o", color=colour, label=label)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(-0.04, 1.04)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, -0.28), ncols=2, frameon=False)


def _samples(axes: Any, record: Record) -> None:
    from matplotlib.patches import Circle

    for middle in modes().tolist():
        axes.add_patch(Circle(middle, MODE_RADIUS, fill=False, color=_INK, lw=0.6))
    axes.add_patch(Circle(HACK_MIDDLE, HACK_RADIUS, fill=False, color=_HACK, lw=1.2))
    x, y = zip(*record["samples"], strict=True)
    axes.plot(x, y, ".", ms=2, color="#2166ac", alpha=0.6)
    axes.set(xlim=(-7.5, 7.5), ylim=(-7.5, 7.5), xticks=[], yticks=[], aspect="equal")


def _curves(axes: Any, records: list[Record]) -> None:
    for record in records:
        for key, colour in (("centre", _CENTRE), ("hacked", _HACK)):
            axes.plot(record["epochs"][key], color=colour, lw=0.9, alpha=0.7)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("epoch", fontsize=8)
    axes.tick_params(labelsize=7)
