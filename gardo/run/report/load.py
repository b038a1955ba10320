"""Read a run folder, finished or not, into one `Run`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gardo.run.images import read_index
from gardo.run.metrics import read_metrics
from gardo.types import UserError


class ReportError(UserError):
    """A folder that no report can be written for; its text is one line."""


@dataclass(frozen=True)
class Series:
    """One metric over epochs; a value that is missing or null is NaN."""

    epochs: list[int]
    values: list[float]

    def finite(self) -> list[tuple[int, float]]:
        """The (epoch, value) pairs that have a value."""
        return [(e, v) for e, v in zip(self.epochs, self.values, strict=True) if math.isfinite(v)]

    def __bool__(self) -> bool:
        return any(math.isfinite(v) for v in self.values)


@dataclass(frozen=True)
class Grid:
    """One image grid of a run."""

    path: Path
    epoch: int | None
    title: str


@dataclass
class Run:
    """What a run folder holds. Missing files are empty values; `notes` says what was wrong."""

    path: Path
    label: str
    config: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> value."""
    config_text: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    grids: list[Grid] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def proxy(self) -> str | None:
        """Name of the proxy reward, or None when the config does not say."""
        names = reward_names(self.config.get("rewards.proxy"))
        if any(key.startswith("rewards.proxy.") for key in self.config):
            return "proxy"  # a weighted sum, which has a metric of its own
        return names[0] if names else None

    @property
    def aux(self) -> list[str]:
        """Names of the auxiliary rewards."""
        return reward_names(self.config.get("rewards.aux"))

    def metric(self, key: str) -> Series:
        """A metric of `metrics.jsonl` over the epochs."""
        return _series(self.metrics, key)

    def evaluation(self, key: str) -> Series:
        """A metric of `evaluation.jsonl` over the epochs."""
        return _series(self.evaluations, key)

    def metric_keys(self) -> list[str]:
        """Every numeric metric, in order of appearance, `epoch` aside."""
        return _numeric_keys(self.metrics)

    def evaluation_keys(self) -> list[str]:
        """The held-out metrics: every number of an evaluation but those that describe it.

        Of a reward only the mean counts: not its deviation, nor the share that is missing.
        """
        return [
            key
            for key in _numeric_keys(self.evaluations)
            if not self._describes(key)
            and not key.startswith("time/")
            and not re.fullmatch(r"reward/.+/(?!mean$)[^/]+", key)
        ]

    def evaluation_settings(self) -> dict[str, Any]:
        """How the held-out numbers were made: from their rows and from the config."""
        settings = {
            key.removeprefix("evaluation."): value
            for key, value in self.config.items()
            if key.startswith("evaluation.") and key not in _NOT_MEASURING
        }
        if settings.get("guidance_scale", 0) is None:  # null: as in sampling
            settings["guidance_scale"] = self.config.get("sampling.guidance_scale")
        for row in self.evaluations[-1:]:
            settings |= {k: v for k, v in row.items() if self._describes(k)}
        return settings

    def _describes(self, key: str) -> bool:
        return key in _DESCRIPTIONS or f"evaluation.{key}" in self.config


_DESCRIPTIONS = ("images", "prompts", "seed", "num_steps", "guidance_scale", "weights")
"""What a line of `evaluation.jsonl` may say of itself beside its metrics."""
_NOT_MEASURING = ("evaluation.every", "evaluation.grid_images")
"""Settings of the evaluation that its numbers do not depend on."""


def load_run(path: str | Path) -> Run:
    """Read a run folder. A run has a `config.yaml` or a `metrics.jsonl`; all else is optional.

    Raises ReportError for a path that is not a run and for a file that cannot be understood.
    """
    path = Path(path)
    if not path.exists():
        raise ReportError(f"{path}: no such folder")
    if not path.is_dir():
        raise ReportError(f"{path}: not a folder; give the folder of a run")
    config_path, metrics_path = path / "config.yaml", path / "metrics.jsonl"
    if not config_path.is_file() and not metrics_path.is_file():
        raise ReportError(f"{path}: not a run: neither config.yaml nor metrics.jsonl in it")

    run = Run(path=path, label=path.resolve().name)
    try:
        if config_path.is_file():
            run.config_text, run.config = _read_config(config_path)
        run.metrics = _read_rows(metrics_path, run.notes)
        run.evaluations = _read_rows(path / "evaluation.jsonl", run.notes)
        run.notes += _missing_scores(run.metrics) + _missing_scores(run.evaluations)
        run.notes += _health(run.metrics)
        run.summary = _read_summary(path / "summary.json")
        run.grids = _find_grids(path / "images", run.notes)
    except (ValueError, OSError) as error:
        raise ReportError(" ".join(str(error).split())) from error
    return run


def load_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Read several runs and give each a label of its own (folder name, or more of the path)."""
    runs = [load_run(p) for p in paths]
    labels = [r.label for r in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            run.label = "/".join(run.path.resolve().parts[-2:])
    labels = [r.label for r in runs]
    for i, run in enumerate(runs):
        if labels.count(run.label) > 1:
            run.label = f"{run.label} ({i + 1})"
    return runs


def reward_names(value: Any) -> list[str]:
    """Names in a reward setting: a name, a mapping with a `name`, or a list of either."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [str(value["name"])] if "name" in value else [str(k) for k in value]
    if isinstance(value, (list, tuple)):
        return [name for item in value for name in reward_names(item)]
    return [str(value)]


def _read_rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = read_metrics(path, ignore_unfinished=True)
    for i, row in enumerate(rows):
        if not isinstance(row.get("epoch"), int):
            raise ValueError(f"{path}, object {i + 1}: no integer 'epoch'")
    if rows and not path.read_bytes().endswith(b"\n"):
        notes.append(
            f"{path.name}: the last line is unfinished; the run was stopped while "
            "writing it, or still runs."
        )
    return rows


def _missing_scores(rows: list[dict[str, Any]]) -> list[str]:
    """A note for each reward that could not score some samples."""
    notes = []
    for key in _numeric_keys(rows):
        match = re.fullmatch(r"reward/(.+)/missing", key)
        worst = max((v for _, v in _series(rows, key).finite()), default=0.0)
        if match and worst > 0:
            notes.append(
                f"{match[1]} could not score up to {worst:.1%} of the samples of an epoch."
            )
    return list(dict.fromkeys(notes))


def _health(rows: list[dict[str, Any]]) -> list[str]:
    """A note on updates that were left out, and one for each alarm that sounded."""
    notes = []
    skipped = {e: int(v) for e, v in _series(rows, "health/skipped_updates").finite() if v > 0}
    if skipped:
        notes.append(
            f"Updates left out, because a loss or gradient was not finite: {sum(skipped.values())} "
            f"(epochs {_spans(list(skipped))})."
        )
    sounded: dict[str, list[int]] = {}
    for row in rows:
        alarms = row.get("alarms")
        for name in alarms if isinstance(alarms, list) else ():
            sounded.setdefault(str(name), []).append(row["epoch"])
    notes += [f"Alarm {name} in epochs {_spans(epochs)}." for name, epochs in sounded.items()]
    return notes


def _spans(epochs: list[int]) -> str:
    """Epochs in words: 3, 7-12."""
    spans: list[list[int]] = []
    for epoch in epochs:
        if spans and epoch == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], epoch]
        else:
            spans.append([epoch])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(tree).__name__}")
    return text, flatten(tree)


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(summary, dict):
        raise ValueError(f"{path}: expected an object, got {type(summary).__name__}")
    return summary


def _find_grids(folder: Path, notes: list[str]) -> list[Grid]:
    index = folder / "index.json"
    if index.is_file():
        grids = [Grid(folder / e["file"], e["epoch"], e["title"]) for e in read_index(index)]
    else:
        grids = []
        for path in sorted(folder.glob("*.png")):
            match = re.fullmatch(r"epoch_(\d+)", path.stem)
            grids.append(Grid(path, int(match[1]) if match else None, path.stem))
    for grid in grids:
        if not grid.path.is_file():
            notes.append(f"images/{grid.path.name} is listed but missing.")
    return [g for g in grids if g.path.is_file()]


def _series(rows: list[dict[str, Any]], key: str) -> Series:
    # One value per epoch; a later line of the same epoch (start and end of an empty run) wins.
    points = {row["epoch"]: _number(row.get(key)) for row in rows if key in row}
    epochs = sorted(points)
    return Series(epochs, [points[e] for e in epochs])


def _number(value: Any) -> float:
    # NaN marks null, and anything that is not a number.
    return float(value) if isinstance(value, (int, float)) else math.nan


def _numeric_keys(rows: list[dict[str, Any]]) -> list[str]:
    keys: dict[str, None] = {}
    for row in rows:
        for key, value in row.items():
            if key != "epoch" and isinstance(value, (int, float)):
                keys[key] = None
    return list(keys)
