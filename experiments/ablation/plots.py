"""Figures of the ablation: the frontier of proxy and held-out accuracy, and curves over epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.ablation.methods import METHODS
from experiments.ablation.results import HELD_OUT, TITLES

Record = dict[str, Any]

_COLOURS = {m.name: f"C{index}" for index, m in enumerate(METHODS)}


def draw_frontier(summary: dict[str, Any], path: Path) -> None:
    """Mean proxy against mean held-out figures; a line joins the KL coefficients of a method."""
    plt = _pyplot()
    figure, both = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
    for axes, held_out in zip(both, (HELD_OUT, "clean"), strict=True):
        start = summary["start"]
        axes.plot(
            start["proxy"]["mean"], start[held_out]["mean"], "k*", ms=13, label="before training"
        )
        for method in METHODS:
            rows = [r for r in summary["settings"].values() if r["method"] == method.name]
            if not rows:
                continue
            x, y = ([r[name]["mean"] for r in rows] for name in ("proxy", held_out))
            xerr, yerr = ([r[name]["sd"] or 0 for r in rows] for name in ("proxy", held_out))
            axes.errorbar(
                x,
                y,
                xerr=xerr,
                yerr=yerr,
                marker="o",
                ms=5,
                lw=1.2,
                elinewidth=0.5,
                alpha=0.85,
                color=_COLOURS[method.name],
                label=method.name,
            )
            for row in rows:
                if row["kl_coef"] is not None:
                    place = (row["proxy"]["mean"], row[held_out]["mean"])
                    axes.annotate(
                        f"{row['kl_coef']:g}",
                        place,
                        fontsize=6.5,
                        xytext=(4, 3),
                        textcoords="offset points",
                    )
        axes.set_xlabel(TITLES["proxy"])
        axes.set_ylabel(TITLES[held_out])
        axes.grid(alpha=0.3)
    both[0].legend(fontsize=7.5)
    figure.suptitle("After training: further right and further up is better", fontsize=11)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_curves(records: Sequence[Record], path: Path) -> None:
    """Means over seeds: the proxy, held-out accuracy, diversity and KL over the epochs."""
    plt = _pyplot()
    figure, grid = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    panels: list[tuple[str, Callable[[Record], tuple[list[int], list[float]]]]] = [
        ("count (proxy), training samples", _training("proxy")),
        ("strict_count, held out", _evaluated(HELD_OUT)),
        ("diversity (pairwise distance), held out", _evaluated("diversity")),
        ("KL to the current reference, penalised samples", _training("kl")),
    ]
    for axes, (title, read) in zip(grid.flat, panels, strict=True):
        for name in dict.fromkeys(r["setting"] for r in records):
            mine = [r for r in records if r["setting"] == name]
            method, coef = mine[0]["method"], mine[0]["kl_coef"]
            if coef is not None and coef != middle(records):
                continue
            curves = [read(r) for r in mine]
            epochs, values = curves[0][0], zip(*(c[1] for c in curves), strict=True)
            axes.plot(
                epochs, [fmean(v) for v in values], color=_COLOURS[method], lw=1.3, label=name
            )
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.set_xlabel("epoch", fontsize=8)
    grid[1, 1].set_yscale("symlog", linthresh=1e-6)
    grid[0, 0].legend(fontsize=7.5)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def middle(records: Sequence[Record]) -> float:
    """The middle of the KL coefficients, which curves and images are shown for."""
    coefs = sorted({r["kl_coef"] for r in records if r["kl_coef"] is not None})
    return float(coefs[len(coefs) // 2])


def _training(name: str) -> Callable[[Record], tuple[list[int], list[float]]]:
    def read(record: Record) -> tuple[list[int], list[float]]:
        values = [value or 0.0 for value in record["curves"][name]]
        return list(range(1, len(values) + 1)), values

    return read


def _evaluated(name: str) -> Callable[[Record], tuple[list[int], list[float]]]:
    def read(record: Record) -> tuple[list[int], list[float]]:
        rows = record["evaluations"]
        return [row["epoch"] for row in rows], [row[name] for row in rows]

    return read


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
