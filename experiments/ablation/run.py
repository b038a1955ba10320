"""The runs of the ablation, and what is read from their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from experiments.ablation.methods import Setting, settings
from experiments.training_runs import TrainingRun, train_all
from gardo.run.metrics import read_metrics

Record = dict[str, Any]

#: figures of an evaluation, in the order of the tables
MEASURED = {
    "proxy": "reward/count/mean",
    "strict": "reward/strict_count/mean",
    "judge": "reward/judge/mean",
    "clean": "reward/clean/mean",
    "shape_fit": "reward/shape_fit/mean",
    "artifact": "reward/artifact/mean",
    "diversity": "diversity/pairwise",
    "distance": "feature_distance",
}
CURVES = {
    "proxy": "reward/count/mean",
    "kl": "kl",
    "gate": "gate/share",
    "diversity": "diversity/nn_distance",
}


@dataclass(frozen=True)
class Scale:
    """How much is run; the same compute for every method.

    Attributes:
        groups: prompts per epoch.
        evaluations: held-out evaluations after the one at the start, which a seed has once.
        prompts: how many of the 40 prompts are judged, four images each.
    """

    epochs: int = 20
    groups: int = 6
    group_size: int = 12
    kl_coefs: tuple[float, ...] = (0.1, 0.3, 1.0)
    evaluations: int = 1
    prompts: int = 40

    @property
    def overrides(self) -> dict[str, str]:
        """What the experiment changes in the recipe ``tiny``, for every method alike."""
        return {
            "epochs": str(self.epochs),
            "prompts.per_epoch": str(self.groups),
            "prompts.group_size": str(self.group_size),
            "rewards.parameters": "{count: {color_weight: 8.0}}",
            "train.learning_rate": "2e-3",
            "evaluation.every": str(max(1, self.epochs // self.evaluations)),
            "evaluation.max_prompts": str(self.prompts),
            "evaluation.num_steps": "10",
            "checkpoint.snapshot": "false",
        }


FULL = Scale()
QUICK = Scale(epochs=3, groups=4, group_size=4, kl_coefs=(0.1,), evaluations=1, prompts=8)


@dataclass(frozen=True)
class Task:
    """One run: a setting from one seed.

    Attributes:
        at_start: whether the base is evaluated, which all runs of a seed have in common.
    """

    setting: Setting
    seed: int
    scale: Scale
    out: Path
    at_start: bool

    @property
    def run(self) -> TrainingRun:
        overrides = {
            "seed": str(self.seed),
            **self.scale.overrides,
            "evaluation.at_start": str(self.at_start).lower(),
            **self.setting.overrides,
        }
        return TrainingRun(self.out / "runs" / f"{self.setting.name}-seed{self.seed}", overrides)


def tasks(seeds: Sequence[int], scale: Scale, out: Path) -> list[Task]:
    """All runs, one seed after the other, so that what is there so far compares all settings."""
    return [
        Task(setting, seed, scale, out, at_start=index == 0)
        for seed in seeds
        for index, setting in enumerate(settings(scale.kl_coefs))
    ]


def run_all(seeds: Sequence[int], scale: Scale, out: Path, jobs: int) -> list[Record]:
    """Train what is missing and read every run; UserError as `train_all` raises it."""
    every = tasks(seeds, scale, out)
    train_all([task.run for task in every], jobs)
    base = {task.seed: evaluations_of(task)[0] for task in every if task.at_start}
    return [record_of(task, base[task.seed]) for task in every]


def evaluations_of(task: Task) -> list[Record]:
    """Epoch and figures of a finished run's evaluations."""
    return [
        {"epoch": row["epoch"], **{name: row[key] for name, key in MEASURED.items()}}
        for row in read_metrics(task.run.folder / "evaluation.jsonl")
    ]


def record_of(task: Task, base: Record) -> Record:
    """What a finished run leaves: its evaluations, its curves, and what it cost.

    ``base`` is the evaluation before the first epoch, by the run that made it.
    """
    run = task.run
    epochs = read_metrics(run.folder / "metrics.jsonl")
    evaluations = [base, *(row for row in evaluations_of(task) if row["epoch"] > 0)]
    return {
        "method": task.setting.method.name,
        "kl_coef": task.setting.kl_coef,
        "setting": task.setting.name,
        "seed": task.seed,
        "scale": asdict(task.scale),
        "folder": run.folder.name,
        "start": base,
        "end": evaluations[-1],
        "evaluations": evaluations,
        "curves": {name: [row.get(key) for row in epochs] for name, key in CURVES.items()},
        "gated": fmean(row["gate/share"] for row in epochs),
        "resets": sum(row["reference/reset"] for row in epochs),
        "seconds": median(row["time/epoch"] for row in epochs),
    }
