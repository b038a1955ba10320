"""Train the judge of the embedded task: ``python -m tools.tiny.judge_training --out FOLDER``.

The shipped judge is ``--out gardo/tiny/judge`` with the defaults: three minutes on one core.
Every batch is drawn afresh: scenes with one to nine objects, some with two kinds of objects, varied
as a decoder varies them (blur, noise, colour shifts), and corrupted ones that are no scene at all.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gardo.tiny.judge import Judge, JudgeOutput, load_judge, save_judge
from gardo.tiny.scenes import (
    CELLS,
    COLORS,
    IMAGE_SIZE,
    NUMBERS,
    SHAPES,
    Scene,
    all_scenes,
    render,
)
from tools.tiny.variations import (
    background,
    color_index,
    palette_colors,
    shape_index,
    stripes,
    to_pixels,
    uniform,
    vary_colors,
    vary_geometry,
    window,
)

CORRUPTED_SHARE = 0.3  # of the rows of a batch
MIXED_SHARE = 0.15


@dataclass
class Examples:
    """Images and targets.

    Attributes:
        images: ``[B, 3, S, S]`` float32 in [0, 1].
        count: ``[B]`` int64; 0 marks what is no scene.
        color: ``[B, colours]`` share of each colour among the objects.
        shape: ``[B, shapes]`` share of each shape among the objects.
        cells: ``[B, cells]`` 1 where a cell holds an object.
    """

    images: Tensor
    count: Tensor
    color: Tensor
    shape: Tensor
    cells: Tensor


def draw_examples(batch: int, generator: torch.Generator) -> Examples:
    """Draw a training batch; the same generator state draws the same batch."""
    first, second = _draw_scenes(batch, generator), _draw_scenes(batch, generator)
    images, others = render(first, generator), render(second, generator)
    cells, other_cells = _occupied_cells(images), _occupied_cells(others)

    # mixed rows take each cell from one of two scenes
    mixed = torch.rand(batch, 1, generator=generator) < MIXED_SHARE
    swap = (torch.rand(batch, CELLS**2, generator=generator) < 0.5) & mixed
    images = torch.where(to_pixels(swap), others, images)
    from_first, from_second = (cells & ~swap).float(), (other_cells & swap).float()
    cells = from_first + from_second
    total = cells.sum(dim=1, keepdim=True).clamp(min=1)
    color, shape = (
        (
            from_first.sum(1, keepdim=True) * F.one_hot(index(first), size)
            + from_second.sum(1, keepdim=True) * F.one_hot(index(second), size)
        )
        / total
        for index, size in ((color_index, len(COLORS)), (shape_index, len(SHAPES)))
    )
    count = cells.sum(dim=1).long()

    images = vary_geometry(images, generator)
    corrupted = torch.rand(batch, generator=generator) < CORRUPTED_SHARE
    kind = torch.randint(len(_CORRUPTIONS), (batch,), generator=generator)
    for number, corrupt in enumerate(_CORRUPTIONS):
        rows = (corrupted & (kind == number)).nonzero()[:, 0]
        if len(rows):
            images[rows] = corrupt(images[rows], generator)
    count = torch.where(corrupted, 0, count)
    return Examples(vary_colors(images, generator), count, color, shape, cells)


def judge_loss(output: JudgeOutput, target: Examples) -> Tensor:
    """Sum of the heads' mean cross-entropies; only rows with objects teach colour, shape, cells."""
    valid = (target.count > 0).float()
    share = valid / valid.sum().clamp(min=1)
    color = -(target.color * output.color.log_softmax(1)).sum(1)
    shape = -(target.shape * output.shape.log_softmax(1)).sum(1)
    cells = F.binary_cross_entropy_with_logits(output.cells, target.cells, reduction="none").mean(1)
    return F.cross_entropy(output.count, target.count) + ((color + shape + cells) * share).sum()


@torch.inference_mode()
def accuracy_by_count(judge: Judge, per_count: int, seed: int) -> dict[int, float]:
    """Share of fresh rendered scenes whose count, colour and shape are all told right, by count."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for count in range(1, len(NUMBERS) + 1):
        kinds = all_scenes([count])
        scenes = [kinds[i % len(kinds)] for i in range(per_count)]
        output = judge(render(scenes, generator))
        right = (
            (output.count.argmax(1) == count)
            & (output.color.argmax(1) == color_index(scenes))
            & (output.shape.argmax(1) == shape_index(scenes))
        )
        result[count] = right.float().mean().item()
    return result


def train_judge(
    out_dir: Path | str,
    seed: int = 0,
    steps: int = 800,
    batch: int = 192,
    learning_rate: float = 3e-3,
    test_scenes: int = 800,
    report: Callable[[str], None] = print,
) -> dict[int, float]:
    """Train a judge and write it to ``out_dir`` as `load_judge` reads it.

    Args:
        out_dir: folder, made if missing.
        seed: of the weights and the examples.
        steps: optimiser steps (AdamW, one cycle of the learning rate).
        batch: examples a step.
        learning_rate: peak.
        test_scenes: fresh scenes of each count, on which the accuracy is measured.
        report: called with a line of progress now and then.

    Returns:
        Accuracy of the written judge by count, as `accuracy_by_count` has it.

    Raises:
        ValueError: ``steps`` or ``batch`` below 1.
    """
    if steps < 1 or batch < 1:
        raise ValueError(f"steps, batch: expected positive integers, got {steps}, {batch}")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=max(steps, 2), pct_start=0.15
    )
    start = time.monotonic()
    judge.train()
    for step in range(1, steps + 1):
        examples = draw_examples(batch, generator)
        output = judge(examples.images)
        loss = judge_loss(output, examples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            right = (output.count.argmax(1) == examples.count).float().mean().item()
            line = f"step {step}/{steps}  loss {loss.item():.3f}  count {right:.3f}"
            report(f"{line}  {time.monotonic() - start:.0f} s")
    record = {"seed": seed, "steps": steps, "batch": batch, "learning_rate": learning_rate}
    save_judge(judge.eval(), out_dir, record)
    # what ships is measured: the half-precision weights, read back
    accuracy = accuracy_by_count(load_judge(out_dir), per_count=test_scenes, seed=seed + 1)
    save_judge(judge, out_dir, {**record, "accuracy": {str(n): a for n, a in accuracy.items()}})
    return accuracy


def _draw_scenes(batch: int, generator: torch.Generator) -> list[Scene]:
    # one to five are what training shows, so they make half of the examples
    low = torch.randint(1, 6, (batch,), generator=generator)
    wide = torch.randint(1, len(NUMBERS) + 1, (batch,), generator=generator)
    count = torch.where(torch.rand(batch, generator=generator) < 0.25, low, wide)
    color = torch.randint(len(COLORS), (batch,), generator=generator)
    shape = torch.randint(len(SHAPES), (batch,), generator=generator)
    names = list(COLORS)
    return [
        Scene(n, names[c], SHAPES[s])
        for n, c, s in zip(count.tolist(), color.tolist(), shape.tolist(), strict=True)
    ]


def _occupied_cells(images: Tensor) -> Tensor:
    deviation = (images - background()).abs().amax(dim=1, keepdim=True)
    return F.max_pool2d(deviation, IMAGE_SIZE // CELLS).flatten(1) > 0.3


def _stripes(images: Tensor, generator: torch.Generator) -> Tensor:
    """Paint stripes of a palette colour over the image or a part of it."""
    batch = len(images)
    wave = stripes(batch, generator)
    strength = wave * uniform(0.2, 1.0, batch, generator) * window(batch, generator)
    return images + strength * (palette_colors(batch, generator) - images)


def _fill(images: Tensor, generator: torch.Generator) -> Tensor:
    """Paint the whole image or a large part of it in one colour."""
    batch = len(images)
    strength = uniform(0.2, 1.0, batch, generator) * window(batch, generator)
    return images + strength * (palette_colors(batch, generator) - images)


def _noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Heavy noise, pixel-wise or in 3 x 3 smears."""
    batch = len(images)
    noise = torch.randn(images.shape, generator=generator)
    smeared = F.avg_pool2d(noise, 3, 1, 1) * 3
    coarse = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
    return images + torch.where(coarse, smeared, noise) * uniform(0.12, 0.4, batch, generator)


def _blank(images: Tensor, generator: torch.Generator) -> Tensor:
    return background().expand_as(images).clone()


def _double(images: Tensor, generator: torch.Generator) -> Tensor:
    """Overlay the image with itself a few pixels further, so that objects run together."""
    down, right = torch.randint(2, 5, (2,), generator=generator).tolist()
    moved = torch.roll(images, (down, right), dims=(2, 3))
    keep = (images - background()).abs() >= (moved - background()).abs()
    return torch.where(keep, images, moved)


def _ghost(images: Tensor, generator: torch.Generator) -> Tensor:
    """Fade the objects of some cells, always the most colourful one, to a quarter to two thirds."""
    batch = len(images)
    deviation = (images - background()).abs().amax(dim=1, keepdim=True)
    strongest = F.max_pool2d(deviation, IMAGE_SIZE // CELLS).flatten(1).argmax(dim=1)
    faded = F.one_hot(strongest, CELLS**2).bool() | (
        torch.rand(batch, CELLS**2, generator=generator) < 0.2
    )
    keep = torch.where(to_pixels(faded), uniform(0.2, 0.65, batch, generator), 1.0)
    return background() + (images - background()) * keep


_CORRUPTIONS: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = (
    _stripes,
    _stripes,  # twice as often: what exploited colour rewards look like
    _fill,
    _noise,
    _blank,
    _double,
    _ghost,
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the judge of the embedded task.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=192)
    options = parser.parse_args(arguments)
    accuracy = train_judge(options.out, options.seed, options.steps, options.batch)
    print("accuracy by count:", "  ".join(f"{n}: {a:.3f}" for n, a in accuracy.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
