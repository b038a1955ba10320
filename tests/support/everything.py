"""The keys of ``algorithm`` that are off by default, all on, and small runs that combine them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from gardo.config import load_config
from gardo.distributed.process import Runtime
from gardo.run.folder import RunFolder
from gardo.trainer import Trainer
from tests.support.forked import SMALLEST

Row = dict[str, Any]
Weights = dict[str, Tensor]

EVERYTHING = {
    "algorithm.reward_scale": "auto",
    "algorithm.cap": "on",
    "algorithm.diversity": "supported",
    "algorithm.gate.anchor": "base",
    "algorithm.gate.share_of": "all",
    "algorithm.gate.fraction": "0.2",
    "algorithm.kl_coef": "{target_share: 0.3}",
    "algorithm.reference.reset_every": "0",
    "algorithm.reference.kl_threshold": "0",
    "algorithm.reference.reset_steps": "3",
}
ALGORITHMS = {
    "grpo": EVERYTHING,
    "nft": {**EVERYTHING, "algorithm.name": "nft", "sampling.same_latent": "false"},
}
SMALL = {
    **SMALLEST,
    "epochs": 2,
    "prompts.group_size": 6,
    "sampling.batch_size": 12,
    "train.batch_size": 6,
    "train.learning_rate": 1e-3,
    "evaluation.every": 0,
    "evaluation.max_prompts": 1,
    "evaluation.grid_images": 0,
    "health.ratio": "null",
    "checkpoint.every": 0,
}


def train_small(folder: Path, recipe: str = "tiny", **changes: Any) -> tuple[list[Row], Weights]:
    """Train here and without a report: the rows of its metrics, and the exported weights."""
    settings = {**SMALL, **changes, "output_dir": folder}
    config = load_config(recipe, overrides=[(key, str(value)) for key, value in settings.items()])
    Trainer(config, Runtime("cpu", threads=1)).train(RunFolder.create(config))
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    weights = load_file(folder / "export" / "pytorch_lora_weights.safetensors")
    return [json.loads(line) for line in metrics], weights
