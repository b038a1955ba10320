"""The runs of the counting experiment, and their accuracy by count."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

from experiments.ablation.methods import GRPO
from experiments.training_runs import TrainingRun, train_all
from gardo.run.metrics import write_atomic
from gardo.tiny import pipeline_path
from gardo.tiny.scenes import MAX_COUNT, NUMBERS
from gardo.types import UserError
from tools.tiny.quality import SamplerSetting, accuracy_by_count

Record = dict[str, Any]

COUNTS = range(1, len(NUMBERS) + 1)
#: counts of the training prompts: those of the pretraining and two more
TRAINED = range(1, 8)
#: by what the model has seen: pretraining, reinforcement learning alone, neither
RANGES = {
    "pretrained": range(1, MAX_COUNT + 1),
    "trained": range(MAX_COUNT + 1, TRAINED.stop),
    "unseen": range(TRAINED.stop, COUNTS.stop),
}
METHODS: dict[str, dict[str, str]] = {"grpo": GRPO, "gardo": {}}
SAMPLER = SamplerSetting(num_steps=10, guidance_scale=1.0)


@dataclass(frozen=True)
class Scale:
    """How much is run; ``images`` are those of each of a count's eight prompts."""

    epochs: int = 30
    group_size: int = 12
    images: int = 10

    @property
    def overrides(self) -> dict[str, str]:
        """What the experiment changes in the recipe ``tiny``, for both methods alike."""
        return {
            "epochs": str(self.epochs),
            "prompts.group_size": str(self.group_size),
            "prompts.parameters": f"{{counts: {list(TRAINED)}}}",
            "train.learning_rate": "2e-3",
            "evaluation.every": "0",
            "evaluation.max_prompts": "8",
            "evaluation.num_steps": "10",
            "checkpoint.snapshot": "false",
        }


FULL = Scale()
QUICK = Scale(epochs=2, group_size=4, images=1)


def run_all(seeds: Sequence[int], scale: Scale, out: Path, jobs: int) -> list[Record]:
    """Train both methods from every seed and measure them and the base.

    Raises:
        UserError: as `train_all` raises it, or a stored result that cannot be read.
    """
    runs = {
        (method, seed): TrainingRun(
            out / "runs" / f"{method}-seed{seed}",
            {"seed": str(seed), **scale.overrides, **overrides},
        )
        for seed in seeds
        for method, overrides in METHODS.items()
    }
    train_all(list(runs.values()), jobs)
    records = [_measured("base", None, None, scale, out)]
    records += [_measured(m, seed, run.folder, scale, out) for (m, seed), run in runs.items()]
    return records


def _measured(method: str, seed: int | None, run: Path | None, scale: Scale, out: Path) -> Record:
    """Strict accuracy by count, kept in ``OUT/accuracy``; the same noise for every policy."""
    name = method if seed is None else f"{method}-seed{seed}"
    path = out / "accuracy" / f"{name}.json"
    identity: Record = {"method": method, "seed": seed, "images": scale.images}
    if path.exists():
        try:
            record: Record = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: expected a stored result, got {error}") from error
        if {key: record.get(key) for key in identity} == identity:
            return record
    torch.manual_seed(0)
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_path(), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if run is not None:
        pipeline.load_lora_weights(str(run / "export"))
    accuracy = accuracy_by_count(pipeline, SAMPLER, scale.images, COUNTS)
    record = {**identity, "accuracy": {str(count): value for count, value in accuracy.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(record).encode())
    return record
