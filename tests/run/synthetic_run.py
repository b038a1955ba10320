"""A made-up run folder for the tests of the report; its numbers follow simple closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import yaml

from gardo.run.images import image_grid, save_grid
from gardo.run.metrics import MetricsWriter

CONFIG = {
    "recipe": "tiny",
    "seed": 42,
    "epochs": 24,
    "device": "cpu",
    "precision": "fp32",
    "output_dir": "runs/gardo",
    "model": {"path": "builtin:tiny-sd3", "family": "sd3", "lora": {"rank": 16, "alpha": 32}},
    "prompts": {"per_epoch": 8, "group_size": 16},
    "sampling": {"num_steps": 10, "guidance_scale": 1.0, "noise_level": 0.7, "sde": "flow"},
    "rewards": {"proxy": "count", "aux": ["shape", "cleanliness"], "eval": ["strict", "artefact"]},
    "algorithm": {
        "name": "grpo",
        "kl_coef": 0.1,
        "clip_range": 1e-4,
        "advantage_norm": "none",
        "diversity": True,
        "compat": "gardo",
        "gate": {"mode": "paper", "fraction": 0.1, "adaptive": True},
        "reference": {"kl_threshold": 3e-4, "reset_every": 10},
    },
    "train": {"learning_rate": 2e-3, "updates_per_epoch": 2},
    "evaluation": {"num_steps": 10, "guidance_scale": 1.0, "seed": 0, "weights": "live"},
}


def metrics_row(epoch: int, gain: float = 1.0) -> dict:
    """One epoch; `gain` bends the proxy's curve so that two runs differ."""
    wave = math.sin(1.7 * epoch)
    share = 0.05 + 0.03 * ((epoch * 7) % 5) / 4
    return {
        "epoch": epoch,
        "reward/count/mean": 0.55 + gain * 0.2 * (1 - math.exp(-epoch / 8)) + 0.01 * wave,
        "reward/count/std": 0.2,
        "reward/shape/mean": 0.71 + 0.002 * epoch - 0.01 * wave,
        "reward/shape/std": 0.1,
        "reward/cleanliness/mean": 5.2 + 0.01 * epoch,
        "reward/cleanliness/std": 0.4,
        "gate/share": share,
        "gate/fraction": 0.1 * 0.99**epoch,
        "uncertainty/mean": 0.2 + 0.02 * wave,
        "diversity/nn_distance": 0.31 - 0.001 * epoch,
        "kl": 2.8e-5 * (epoch % 10),
        "kl/gradient_share": 0.3 + 0.05 * wave,
        "kl/coef": 0.1 * 1.01**epoch,
        "cap/share": 0.02 * (epoch % 4),
        "cap/tau": 0.125,
        "reward_scale": 0.21,
        "advantage/rms": 0.9 + 0.02 * wave,
        "loss/policy": -1e-5 * epoch,
        "loss/total": -1e-5 * epoch + 1e-6,
        "ratio/max_abs_dev": 0.0,
        "clip_fraction": 0.4 + 0.1 * wave,
        "clip_fraction/positive": 0.45 + 0.1 * wave,
        "clip_fraction/negative": 0.35 + 0.1 * wave,
        "grad_norm": 0.01 + 0.001 * wave,
        "reference/reset": int(epoch % 10 == 9),
        "images_per_second": 91.0 + wave,
        "forwards/policy": 2304,
        "forwards/reference": round(share * 1024),
        "time/prompts": 0.01,
        "time/rollout": 0.9 + 0.02 * wave,
        "time/score": 0.12,
        "time/shape": 0.003,
        "time/reference": 0.08,
        "time/update": 1.1,
        "time/epoch": 2.3,
    }


def evaluation_row(epoch: int, name: str) -> dict:
    return {
        "epoch": epoch,
        "name": name,
        "images": 64,
        "reward/count/mean": 0.57 + 0.006 * epoch,
        "reward/count/std": 0.2,
        "reward/strict/mean": 0.55 + 0.005 * epoch,
        "reward/strict/std": 0.4,
        "reward/artefact/mean": 2.1e-4 + 1e-6 * epoch,
        "reward/artefact/std": 1e-4,
        "diversity/pairwise": 0.62 - 0.001 * epoch,
    }


def grid_image(epoch: int, count: int = 12):
    generator = torch.Generator().manual_seed(3)
    images = torch.full((count, 3, 24, 24), 0.5) + 0.02 * torch.randn(
        count, 3, 24, 24, generator=generator
    )
    images[:, 0, 6:14, 6 : 14 + epoch // 4] = 0.9
    images[:, 1:, 6:14, 6 : 14 + epoch // 4] = 0.1
    captions = [f"three red circles\ncount {0.5 + 0.01 * epoch:.2f} shape 0.71"] * count
    return image_grid(images, captions, columns=6)


def make_run(folder: Path, epochs: int = 24, gain: float = 1.0, **config) -> Path:
    """A finished run with everything in it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, **config}, sort_keys=False))
    with MetricsWriter(folder / "metrics.jsonl") as writer:
        for epoch in range(epochs):
            writer.write(metrics_row(epoch, gain))
    with MetricsWriter(folder / "evaluation.jsonl") as writer:
        for epoch, name in [(0, "start"), (epochs // 2, "during"), (epochs, "end")]:
            writer.write(evaluation_row(epoch, name))
            save_grid(folder / "images", grid_image(epoch), epoch, name)
    (folder / "summary.json").write_text(
        json.dumps(
            {
                "started": "2026-01-05T10:00:00Z",
                "finished": "2026-01-05T10:01:02Z",
                "seconds": 62.4,
                "versions": {"gardo": "0.1.0", "torch": "2.13.0", "diffusers": "0.42.0"},
                "hardware": "CPU, 2 cores",
                "command": "python -m gardo.train tiny --seed 42",
                "peak_memory_bytes": 1_234_567_890,
            }
        )
    )
    return folder
