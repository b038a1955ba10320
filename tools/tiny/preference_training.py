"""Train the preference model: ``python -m tools.tiny.preference_training --out FOLDER``.

The shipped one is ``--out gardo/tiny/preference`` with the defaults: three minutes on one core.
Images drawn for one prompt are compared two by two; which one is preferred is drawn by the
Bradley-Terry model from their hidden qualities (`tools.tiny.preference_data`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gardo.tiny.preference import PreferenceModel, load_preference, save_preference
from gardo.tiny.scenes import NUMBERS, all_scenes, render
from tools.tiny.preference_data import (
    OVERPAINTED,
    Comparisons,
    differences,
    draw_comparisons,
    overpaint,
)
from tools.tiny.variations import vary_colors

SIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def preference_loss(scores: Tensor, target: Comparisons) -> Tensor:
    """Bradley-Terry loss of scores ``[P * IMAGES, 2]``, summed over the two heads.

    The blind head learns from well-behaved images alone.
    """
    margin = differences(scores)
    loss = F.softplus(torch.where(target.preferred, -margin, margin))
    return loss[target.well_behaved, :, 0].mean() + loss[..., 1].mean()


@torch.inference_mode()
def measure(model: PreferenceModel, images: int, seed: int) -> dict[str, Any]:
    """What the heads know, on fresh data.

    Args:
        model: in evaluation mode.
        images: prompts to compare images for, and images for each degree of too much paint.
        seed: of the data.

    Returns:
        ``flipped``, share of wrong preferences; ``accuracy`` of both heads in naming the better
        image of a pair (of well-behaved pairs for the blind one); ``sight``: by sight and degree of
        too much paint, the rate at which rendered scenes beat over-painted ones for the same
        prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = draw_comparisons(images, generator)
    right = (differences(model(pairs.images, pairs.scenes)) > 0) == (pairs.better > 0)
    flipped = pairs.preferred != (pairs.better > 0)
    known = [pairs.well_behaved, torch.ones_like(pairs.well_behaved)]

    def by_head(values: Tensor) -> dict[str, float]:
        return {
            name: round(values[rows, :, head].float().mean().item(), 4)
            for head, (name, rows) in enumerate(zip(("blind", "sharp"), known, strict=True))
        }

    kinds = all_scenes(range(1, len(NUMBERS) + 1))
    scenes = [kinds[i % len(kinds)] for i in range(images)]
    clean = model(render(scenes, generator), scenes)
    worse = {degree: model(overpaint(scenes, degree, generator), scenes) for degree in OVERPAINTED}
    sight = {
        str(s): {
            degree: round((mix(clean, s) > mix(scores, s)).float().mean().item(), 4)
            for degree, scores in worse.items()
        }
        for s in SIGHTS
    }
    return {"flipped": by_head(flipped), "accuracy": by_head(right), "sight": sight}


def mix(scores: Tensor, sight: float) -> Tensor:
    return scores[:, 0].lerp(scores[:, 1], sight)


@torch.no_grad()
def standardise(model: PreferenceModel, images: int, generator: torch.Generator) -> None:
    """Scale both heads to mean 0 and variance 1 on rendered scenes, varied as a decoder does."""
    kinds = all_scenes(range(1, len(NUMBERS) + 1))
    scenes = [kinds[i % len(kinds)] for i in range(images)]
    scores = model.eval()(vary_colors(render(scenes, generator), generator), scenes)
    scale, mean = scores.std(dim=0), scores.mean(dim=0)
    for head, layer in enumerate((model.blind.score, model.sharp.score)):
        layer.weight /= scale[head]
        layer.bias.sub_(mean[head]).div_(scale[head])


def train_preference(
    out_dir: Path | str,
    seed: int = 20,
    steps: int = 900,
    prompts: int = 64,
    learning_rate: float = 4e-3,
    test_images: int = 2000,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a preference model and write it to ``out_dir`` as `load_preference` reads it.

    Args:
        out_dir: folder, made if missing.
        seed: of the weights and the data.
        steps: optimiser steps (AdamW, one cycle of the learning rate).
        prompts: in a step, with four images each.
        learning_rate: peak.
        test_images: fresh ones of each kind, on which `measure` looks.
        report: called with a line of progress now and then.

    Returns:
        What `measure` found of the written model.

    Raises:
        ValueError: ``steps`` or ``prompts`` below 1.
    """
    if steps < 1 or prompts < 1:
        raise ValueError(f"steps, prompts: expected positive integers, got {steps}, {prompts}")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PreferenceModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(steps, 2), pct_start=0.15
    )
    start = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        comparisons = draw_comparisons(prompts, generator)
        scores = model(comparisons.images, comparisons.scenes)
        loss = preference_loss(scores, comparisons)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            seconds = time.monotonic() - start
            report(f"step {step}/{steps}  loss {loss.item():.3f}  {seconds:.0f} s")
    standardise(model, test_images, generator)
    record = {"seed": seed, "steps": steps, "prompts": prompts, "learning_rate": learning_rate}
    save_preference(model, out_dir, record)
    # what ships is measured: the half-precision weights, read back
    measured = measure(load_preference(out_dir), test_images, seed=seed + 1)
    save_preference(model, out_dir, {**record, **measured})
    return measured


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the preference model of the embedded task.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--prompts", type=int, default=64)
    options = parser.parse_args(arguments)
    measured = train_preference(options.out, options.seed, options.steps, options.prompts)
    print(f"wrong preferences: {measured['flipped']}, accuracy: {measured['accuracy']}")
    for sight, rates in measured["sight"].items():
        print(
            f"sight {sight}:", "  ".join(f"{degree}: {rate:.3f}" for degree, rate in rates.items())
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
