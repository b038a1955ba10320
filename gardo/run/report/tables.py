"""The tables of a report. Cells are texts for people; what a run does not have is a dash."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gardo.run.progress import STAGES
from gardo.run.report.curves import metric_name, training_rewards
from gardo.run.report.load import Run, Series, reward_names

MISSING = "\N{EN DASH}"


def number(value: float | None) -> str:
    """A number with four significant digits, or a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    if 1e-3 <= abs(value) < 1e6:
        digits = max(0, 3 - math.floor(math.log10(abs(value))))
        return f"{value:.{min(digits, 4)}f}"
    return f"{value:.2e}"


def change(first: float | None, last: float | None) -> str:
    """The signed difference, with percent where the first value is not tiny; or a dash."""
    if first is None or last is None or not (math.isfinite(first) and math.isfinite(last)):
        return MISSING
    difference = last - first
    if difference == 0:
        return "0"
    text = ("+" if difference > 0 else "\N{MINUS SIGN}") + number(abs(difference))
    if abs(first) > 1e-9:
        percent = 100 * difference / abs(first)
        shown = f"{percent:+.{0 if abs(percent) >= 1 else 1}f}".replace("-", "\N{MINUS SIGN}")
        if abs(percent) >= 0.05:
            text += f" ({shown}\N{NARROW NO-BREAK SPACE}%)"
    return text


@dataclass(frozen=True)
class Row:
    """One metric of the summary: its first and last value, and the way between."""

    role: str
    name: str
    first: str
    last: str
    change: str
    spark: str
    """Points of a 100 x 24 polyline, empty with fewer than two values."""


@dataclass(frozen=True)
class SummaryGroup:
    """Rows that share their two columns, e.g. ``epoch 0`` and ``epoch 59``."""

    title: str
    first_title: str
    last_title: str
    rows: list[Row] = field(default_factory=list)


def summary(run: Run) -> list[SummaryGroup]:
    """First against last: training rewards, then everything that was held out."""
    groups = []
    rewards = list(
        dict.fromkeys([*([run.proxy] if run.proxy else []), *run.aux, *training_rewards([run])])
    )
    if rewards and run.metrics:
        epochs = span(run.metrics)
        rows = [
            metric_row(role(run, name), name, run.metric(f"reward/{name}/mean"), epochs)
            for name in rewards
        ]
        groups.append(SummaryGroup("Training prompts", *_columns(*epochs), rows))
    keys = run.evaluation_keys()
    if keys:
        epochs = span(run.evaluations)
        rows = [
            metric_row(_held_out_role(run, key), metric_name(key), run.evaluation(key), epochs)
            for key in keys
        ]
        groups.append(SummaryGroup("Held-out prompts", *_columns(*epochs), rows))
    return groups


@dataclass(frozen=True)
class Scorer:
    """How a reward scored in the last epoch, or for a held-out one in the last evaluation."""

    role: str
    name: str
    mean: str
    spread: str
    per_image: str
    missing: str


def scorers(run: Run) -> list[Scorer]:
    """A row for each reward that has metrics: mean, spread, time per image, missing share."""
    trained = [run.proxy, *run.aux] if run.metrics else []
    training = [name for name in dict.fromkeys([*trained, *training_rewards([run])]) if name]
    held_out = [metric_name(k) for k in run.evaluation_keys() if k.startswith("reward/")]
    rows = []
    for name in dict.fromkeys([*training, *held_out]):
        read, lines = (
            (run.metric, run.metrics) if name in training else (run.evaluation, run.evaluations)
        )
        last = span(lines)[1]
        mean, spread, missing, seconds = (
            dict(read(key).finite()).get(last)
            for key in (
                f"reward/{name}/mean",
                f"reward/{name}/std",
                f"reward/{name}/missing",
                f"time/reward/{name}",
            )
        )
        rows.append(
            Scorer(
                role(run, name),
                name,
                number(mean),
                number(spread),
                MISSING if seconds is None else f"{number(1000 * seconds)} ms",
                MISSING if missing is None else f"{missing:.1%}",
            )
        )
    return rows


def role(run: Run, name: str) -> str:
    """What a reward is to a run: proxy, auxiliary, held-out, or just a reward."""
    if name == run.proxy:
        return "proxy"
    if name in run.aux:
        return "auxiliary"
    return "held-out" if name in reward_names(run.config.get("rewards.eval")) else "reward"


def _held_out_role(run: Run, key: str) -> str:
    known = role(run, metric_name(key)) if key.startswith("reward/") else ""
    return known if known in ("proxy", "auxiliary") else ""  # the table says that it is held out


def _columns(first: int, last: int) -> tuple[str, str]:
    return f"epoch {first}", f"epoch {last}" if last != first else "last"


def metric_row(
    role_name: str, name: str, series: Series, epochs: tuple[int, int] | None = None
) -> Row:
    """The values at two epochs, by default at the first and last that the metric has."""
    first, last = ends(series, epochs)
    return Row(role_name, name, number(first), number(last), change(first, last), spark(series))


def span(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """First and last epoch of the lines of a file; there must be one."""
    epochs = [row["epoch"] for row in rows]
    return min(epochs), max(epochs)


def ends(
    series: Series, epochs: tuple[int, int] | None = None
) -> tuple[float | None, float | None]:
    """Values at two epochs, None where there is none; one epoch alone has no last value."""
    values = dict(series.finite())
    if epochs is None:
        if not values:
            return None, None
        epochs = min(values), max(values)
    first, last = epochs
    return values.get(first), values.get(last) if last != first else None


def spark(series: Series, width: int = 100, height: int = 24) -> str:
    """SVG polyline points of a curve in a box, 2 units of room around it."""
    points = series.finite()
    if len(points) < 2:
        return ""
    xs, ys = [float(e) for e, _ in points], [v for _, v in points]
    x_span, y_span = (xs[-1] - xs[0]) or 1.0, max(ys) - min(ys)
    shown = []
    for x, y in zip(xs, ys, strict=True):
        share = (y - min(ys)) / y_span if y_span > 0 else 0.5
        shown.append(
            f"{2 + (width - 4) * (x - xs[0]) / x_span:.1f},{height - 2 - (height - 4) * share:.1f}"
        )
    return " ".join(shown)


def comparison(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, list[tuple[str, str]]]]]]:
    """Several runs: per group and metric the (last value, change) of each run."""
    training = [(f"reward/{n}/mean", n) for n in training_rewards(runs)]
    training += [
        (k, k)
        for k in (
            "gate/share",
            "kl",
            "kl/gradient_share",
            "cap/share",
            "diversity/nn_distance",
            "ratio/max_abs_dev",
            "images_per_second",
        )
        if any(run.metric(k) for run in runs)
    ]
    held_out = dict.fromkeys(k for run in runs for k in run.evaluation_keys())
    groups = []
    if training:
        rows = [
            (name, [_last(run.metric(key), run.metrics) for run in runs]) for key, name in training
        ]
        groups.append(("Training prompts, last epoch", rows))
    if held_out:
        rows = [
            (metric_name(key), [_last(run.evaluation(key), run.evaluations) for run in runs])
            for key in held_out
        ]
        groups.append(("Held-out prompts, last evaluation", rows))
    return groups


def _last(series: Series, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    if not rows:
        return MISSING, MISSING
    epochs = span(rows)
    first, last = ends(series, epochs)
    if epochs[0] == epochs[1]:
        return number(first), MISSING
    return number(last), change(first, last)


def config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Keys whose values are not the same in all runs, the output folder aside."""
    keys = dict.fromkeys(k for run in runs for k in run.config if k != "output_dir")
    rows = [(k, [str(run.config[k]) if k in run.config else MISSING for run in runs]) for k in keys]
    return [(k, values) for k, values in rows if len(set(values)) > 1]


@dataclass(frozen=True)
class Timing:
    """A stage's share of the run."""

    stage: str
    seconds: str
    per_epoch: str
    percent: float
    colour: int


def timings(run: Run) -> list[Timing]:
    """Stages by their order in an epoch; `other` is the rest of ``time/epoch``.

    Evaluations that stand outside the epochs' times bring a ``time/evaluate`` of their own.
    """
    known = [
        key.removeprefix("time/")
        for key in run.metric_keys()
        # a reward's time is per image, and overlaps sampling
        if key.startswith("time/") and not key.startswith("time/reward/")
    ]
    stages = [s for s in STAGES if s in known]
    stages += [s for s in known if s not in STAGES and s not in ("epoch", "total")]
    totals = {s: _total(run, f"time/{s}") for s in stages}
    evaluations = sum(v for _, v in run.evaluation("time/evaluate").finite())
    if evaluations > 0:
        totals["evaluate"] = totals.get("evaluate", 0.0) + evaluations
    whole = max(_total(run, "time/epoch") + evaluations, sum(totals.values()))
    if whole <= 0 or not run.metrics:
        return []
    if whole - sum(totals.values()) > 0.005 * whole:
        totals["other"] = whole - sum(totals.values())
    count = len(run.metrics)
    return [
        Timing(stage, f"{seconds:.1f} s", f"{seconds / count:.2f} s", 100 * seconds / whole, i % 8)
        for i, (stage, seconds) in enumerate(totals.items())
    ]


def _total(run: Run, key: str) -> float:
    return sum(v for _, v in run.metric(key).finite())


@dataclass(frozen=True)
class Forwards:
    """Transformer rows of a run, and what a reference pass on every sample would have taken."""

    policy: str
    reference: str
    ungated: str
    saved: str
    source: str


def forwards(run: Run) -> Forwards | None:
    """Rows through the policy and the reference, and what the gate saved.

    The rows of an ungated pass are read from ``forwards/reference_ungated`` where the run logged
    them. Else they follow from the gate: an epoch that sent R rows for a share s of its samples
    would have sent R / s for all. Epochs without a gated sample sent none and say nothing about
    that number; they take the mean of the others.
    """
    policy, reference = run.metric("forwards/policy"), run.metric("forwards/reference")
    if not policy and not reference:
        return None
    used = _total(run, "forwards/reference") if reference else None
    full, source = None, ""
    if run.metric("forwards/reference_ungated"):
        full = _total(run, "forwards/reference_ungated")
        source = "as logged"
    elif reference:
        shares = dict(run.metric("gate/share").finite())
        estimates = [rows / shares[e] for e, rows in reference.finite() if shares.get(e, 0) > 0]
        if estimates:
            full = sum(estimates) / len(estimates) * len(reference.finite())
            source = "reference rows / gate share"
    saved = None if full is None or used is None or full <= 0 else 1 - used / full
    return Forwards(
        _rows(_total(run, "forwards/policy") if policy else None),
        _rows(used),
        _rows(full),
        MISSING if saved is None else f"{saved:.0%}",
        source,
    )


def _rows(value: float | None) -> str:
    return MISSING if value is None else f"{round(value):,}".replace(",", "\N{THIN SPACE}")
