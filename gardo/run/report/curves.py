"""The curves of a report: which panels there are, and each of them as a small SVG.

Drawings carry no text but numbers on their axes, and every colour is a CSS variable, so that
names stay in HTML (escaped, searchable) and the page's light or dark theme reaches the curves.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from gardo.run.report.load import Run, Series

COLOURS = 8
"""Number of series colours of the stylesheet, ``--s0`` .. ``--s7``."""

# Colours that appear nowhere else stand for CSS variables until the SVG text is there.
_TEXT, _GRID = "#fe0201", "#fe0202"
_STYLES: dict[str, dict[str, Any]] = {
    "line": {"linestyle": "-", "linewidth": 1.6},
    "dash": {"linestyle": (0, (4, 2)), "linewidth": 1.4},
    "dots": {
        "linestyle": "none",
        "marker": "o",
        "markersize": 5,
        "markeredgewidth": 1.4,
        "fillstyle": "none",
    },
}


@dataclass(frozen=True)
class Curve:
    """One curve of a panel; `style` is ``line``, ``dash`` or ``dots``."""

    label: str
    series: Series
    colour: int
    style: str = "line"


@dataclass
class Panel:
    """One set of axes: curves over epochs, and epochs to mark by a vertical line."""

    title: str
    curves: list[Curve]
    note: str = ""
    marks: list[tuple[int, int]] = field(default_factory=list)
    """(epoch, colour) of vertical lines."""
    legend: list[tuple[str, int | None, str]] = field(default_factory=list)
    """(label, colour or None for all runs, style)."""
    svg: str = ""


@dataclass(frozen=True)
class _Spec:
    """A panel before it meets the runs: (metric, label, style, held-out?) per curve."""

    title: str
    metrics: tuple[tuple[str, str, str, bool], ...]
    note: str = ""
    mark_resets: bool = False


def sections(runs: Sequence[Run]) -> list[tuple[str, list[Panel]]]:
    """The panels that the runs have data for, drawn, by section; empty sections are left out."""
    groups = [
        ("Rewards", _reward_specs(runs)),
        ("Held-out evaluation", _held_out_specs(runs)),
        ("Gate and reference", _GATE),
        ("Optimisation", _OPTIMISATION),
    ]
    result = []
    for title, specs in groups:
        panels = [p for p in (_panel(spec, runs) for spec in specs) if p.curves]
        for i, panel in enumerate(panels):
            panel.svg = draw(panel, salt=f"{title}{i}")
        if panels:
            result.append((title, panels))
    return result


def _one(title: str, key: str, note: str = "") -> _Spec:
    return _Spec(title, ((key, title, "line", False),), note)


_GATE = [
    _Spec(
        "Gate share",
        (
            ("gate/share", "share of samples gated", "line", False),
            ("gate/fraction", "adaptive target", "dash", False),
        ),
        "Samples whose KL penalty is on.",
    ),
    _one(
        "Uncertainty",
        "uncertainty/mean",
        "Mean proxy win rate minus auxiliary win rate, of the samples that drive the gate.",
    ),
    _Spec(
        "KL to the reference",
        (("kl", "kl", "line", False),),
        "Vertical lines: the reference was reset.",
        mark_resets=True,
    ),
    _one(
        "KL's gradient share",
        "kl/gradient_share",
        "Norm of the KL's gradient over norm of the policy loss's gradient, on 64 samples at one "
        "trained step, once per epoch.",
    ),
    _one("KL coefficient", "kl/coef", "Weight of the KL penalty."),
    _one("Cap share", "cap/share", "Samples whose proxy was capped."),
    _one(
        "Cap allowance",
        "cap/tau",
        "How far the proxy may over-rate a sample before it is capped.",
    ),
    _one(
        "Diversity",
        "diversity/nn_distance",
        "Cosine distance to the nearest image of the same prompt.",
    ),
    _one(
        "Image variance",
        "diversity/image_variance",
        "Of the images of a prompt, at 16 x 16 pixels.",
    ),
]
_OPTIMISATION = [
    _one("Policy loss", "loss/policy"),
    _one("Advantages", "advantage/rms", "Root mean square, after everything."),
    _one("Reward scale", "reward_scale", "What centred rewards are divided by."),
    _one("Gradient norm", "grad_norm", "Before clipping."),
    _one(
        "Ratio deviation",
        "ratio/max_abs_dev",
        "Largest |ratio - 1| of the first update; 0 when sampling and training agree.",
    ),
    _Spec(
        "Clip fraction",
        (
            ("clip_fraction", "all samples", "line", False),
            ("clip_fraction/positive", "advantage above 0", "dash", False),
            ("clip_fraction/negative", "advantage below 0", "dots", False),
        ),
        "Share of the samples whose ratio is outside the clip range: of all, and of those with a "
        "positive and a negative advantage.",
    ),
    _one("Images per second", "images_per_second"),
]


def _reward_specs(runs: Sequence[Run]) -> list[_Spec]:
    roles: dict[str, str] = {}
    for run in runs:
        if run.proxy:
            roles.setdefault(run.proxy, "proxy")
    for run in runs:
        for name in run.aux:
            roles.setdefault(name, "auxiliary")
    for name in training_rewards(runs):
        roles.setdefault(name, "reward")
    return [
        _Spec(
            f"{name} ({role})",
            (
                (f"reward/{name}/mean", "training prompts", "line", False),
                (f"reward/{name}/mean", "held-out prompts", "dots", True),
            ),
        )
        for name, role in roles.items()
    ]


def training_rewards(runs: Sequence[Run]) -> list[str]:
    """Names of the rewards in the training metrics of any run, in order of appearance."""
    found = (re.fullmatch(r"reward/(.+)/mean", key) for run in runs for key in run.metric_keys())
    return list(dict.fromkeys(m[1] for m in found if m))


def _held_out_specs(runs: Sequence[Run]) -> list[_Spec]:
    known = {f"reward/{n}/mean" for n in training_rewards(runs)}
    keys = dict.fromkeys(k for run in runs for k in run.evaluation_keys() if k not in known)
    return [_Spec(metric_name(k), ((k, metric_name(k), "line", True),)) for k in keys]


def metric_name(key: str) -> str:
    """A metric for people: ``reward/<name>/mean`` is the reward's name, others stay."""
    match = re.fullmatch(r"reward/(.+)/mean", key)
    return match[1] if match else key


def _panel(spec: _Spec, runs: Sequence[Run]) -> Panel:
    panel = Panel(spec.title, [], spec.note)
    shown: dict[str, str] = {}
    for i, run in enumerate(runs):
        for j, (key, label, style, held_out) in enumerate(spec.metrics):
            series = run.evaluation(key) if held_out else run.metric(key)
            if not series:
                continue
            # One run: a colour per metric. Several: a colour per run, the style tells the metric.
            colour = (i if len(runs) > 1 else j) % COLOURS
            panel.curves.append(Curve(label, series, colour, style))
            shown[label] = style
            if len(runs) == 1:
                panel.legend.append((label, colour, style))
        if spec.mark_resets:
            panel.marks += [
                (epoch, i % COLOURS if len(runs) > 1 else 1)
                for epoch, value in run.metric("reference/reset").finite()
                if value
            ]
    if len(runs) > 1:
        panel.legend = [(label, None, style) for label, style in shown.items()]
    if len(panel.legend) < 2:
        panel.legend = []
    return panel


def draw(panel: Panel, salt: str) -> str:
    """A panel as inline SVG without a size of its own; `salt` keeps ids apart within a page."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 8,
        "axes.edgecolor": _GRID,
        "axes.linewidth": 0.8,
        "xtick.color": _GRID,
        "ytick.color": _GRID,
        "xtick.labelcolor": _TEXT,
        "ytick.labelcolor": _TEXT,
        "text.color": _TEXT,
        "grid.color": _GRID,
        "grid.linewidth": 0.5,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.2, 2.3))
        figure.patch.set_alpha(0.0)
        axes = figure.add_axes((0.125, 0.115, 0.855, 0.80))
        axes.patch.set_alpha(0.0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y")
        axes.tick_params(length=2.5, pad=3)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        formatter = ScalarFormatter(useOffset=False)
        formatter.set_powerlimits((-3, 4))
        axes.yaxis.set_major_formatter(formatter)
        axes.yaxis.get_offset_text().set_color(_TEXT)
        for epoch, colour in panel.marks:
            axes.axvline(
                epoch,
                color=_series_colour(colour),
                linewidth=1.1,
                alpha=0.75,
                linestyle=(0, (3, 2)),
                zorder=1,
            )
        for curve in panel.curves:
            look = dict(_STYLES[curve.style])
            if curve.style != "dots" and _needs_markers(curve.series):
                look |= {"marker": "o", "markersize": 3}
            axes.plot(
                curve.series.epochs,
                curve.series.values,
                color=_series_colour(curve.colour),
                solid_joinstyle="round",
                **look,
            )
        axes.margins(x=0.02, y=0.08)
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _to_inline(buffer.getvalue(), panel)


def _needs_markers(series: Series) -> bool:
    """Few points, or one between two gaps, which a line alone would not show."""
    finite = series.finite()
    if len(finite) <= 12:
        return True
    alive = [False, *map(math.isfinite, series.values), False]
    return any(alive[i - 1 : i + 2] == [False, True, False] for i in range(1, len(alive) - 1))


def _series_colour(index: int) -> str:
    return f"#fe01{index:02x}"


def _to_inline(svg: str, panel: Panel) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # names such as axes_1, the same in every drawing
    svg = svg.replace(_TEXT, "var(--muted)").replace(_GRID, "var(--axis)")
    svg = re.sub(r"#fe01([0-9a-f]{2})", lambda m: f"var(--s{int(m[1], 16)})", svg)
    label = escape(f"{panel.title} over epochs", quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
