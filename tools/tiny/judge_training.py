"""Train the judge of the embedded task: ``python -m tools.tiny.judge_training --out FOLDER``.

The shipped judge is ``--out gardo/tiny/judge`` with the defaults: three minutes on one core.
Every batch is drawn afresh: scenes with one to nine objects, some with two kinds of objects, varied
as a decoder varies them (blur, noise, colour shifts), and corrupted ones that are no scene at all.
"""

from __future__ import annotations

import argparse
import math
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
    BACKGROUND,
    CELLS,
    COLORS,
    IMAGE_SIZE,
    NUMBERS,
    SHAPES,
    Scene,
    all_scenes,
    render,
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
    images = torch.where(_to_pixels(swap), others, images)
    from_first, from_second = (cells & ~swap).float(), (other_cells & swap).float()
    cells = from_first + from_second
    total = cells.sum(dim=1, keepdim=True).clamp(min=1)
    color, shape = (
        (
            from_first.sum(1, keepdim=True) * F.one_hot(index(first), size)
            + from_second.sum(1, keepdim=True) * F.one_hot(index(second), size)
        )
        / total
        for index, size in ((_color_index, len(COLORS)), (_shape_index, len(SHAPES)))
    )
    count = cells.sum(dim=1).long()

    images = _vary_geometry(images, generator)
    corrupted = torch.rand(batch, generator=generator) < CORRUPTED_SHARE
    kind = torch.randint(len(_CORRUPTIONS), (batch,), generator=generator)
    for number, corrupt in enumerate(_CORRUPTIONS):
        rows = (corrupted & (kind == number)).nonzero()[:, 0]
        if len(rows):
            images[rows] = corrupt(images[rows], generator)
    count = torch.where(corrupted, 0, count)
    return Examples(_vary_colors(images, generator), count, color, shape, cells)


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
            & (output.color.argmax(1) == _color_index(scenes))
            & (output.shape.argmax(1) == _shape_index(scenes))
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


def _color_index(scenes: list[Scene]) -> Tensor:
    names = list(COLORS)
    return torch.tensor([names.index(scene.color) for scene in scenes])


def _shape_index(scenes: list[Scene]) -> Tensor:
    return torch.tensor([SHAPES.index(scene.shape) for scene in scenes])


def _background() -> Tensor:
    return torch.tensor(BACKGROUND).view(1, 3, 1, 1)


def _occupied_cells(images: Tensor) -> Tensor:
    deviation = (images - _background()).abs().amax(dim=1, keepdim=True)
    return F.max_pool2d(deviation, IMAGE_SIZE // CELLS).flatten(1) > 0.3


def _to_pixels(cells: Tensor) -> Tensor:
    grid = cells.view(-1, 1, CELLS, CELLS)
    size = IMAGE_SIZE // CELLS
    return grid.repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)


def _uniform(low: float, high: float, batch: int, generator: torch.Generator) -> Tensor:
    """[B, 1, 1, 1] numbers."""
    return low + (high - low) * torch.rand(batch, 1, 1, 1, generator=generator)


def _palette_colors(batch: int, generator: torch.Generator) -> Tensor:
    palette = torch.tensor(list(COLORS.values()))
    return palette[torch.randint(len(palette), (batch,), generator=generator)][:, :, None, None]


def _vary_geometry(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip, shift by up to a pixel and a half, and scale a little; the outside stays grey."""
    batch = len(images)
    scale = _uniform(0.93, 1.07, batch, generator).flatten()
    shift = (2 * torch.rand(batch, 2, generator=generator) - 1) * 1.5 * 2 / IMAGE_SIZE
    # a third stays on the pixel grid, as sharp as rendered
    still = torch.rand(batch, generator=generator) < 0.35
    scale, shift = torch.where(still, 1.0, scale), shift * ~still[:, None]
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    background = _background()
    return F.grid_sample(images - background, grid, align_corners=False) + background


def _vary_colors(images: Tensor, generator: torch.Generator) -> Tensor:
    """What a decoder does: soft edges, small shifts of colour and brightness, faint noise."""
    batch = len(images)
    sigma = _uniform(0.3, 0.8, batch, generator)
    blurred = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(blurred, _blur(images, sigma), images)
    gain = 1 + 0.08 * (2 * torch.rand(batch, 3, 1, 1, generator=generator) - 1)
    bias = 0.04 * (2 * torch.rand(batch, 3, 1, 1, generator=generator) - 1)
    noise = torch.randn(images.shape, generator=generator) * _uniform(0, 0.04, batch, generator)
    return ((images - 0.5) * gain + 0.5 + bias + noise).clamp(0, 1)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur over 5 x 5 pixels with one width per image, [B, 1, 1, 1]."""
    offset = torch.arange(-2, 3).float()
    weight = torch.exp(-offset.square() / (2 * sigma.view(-1, 1).square()))
    weight = weight / weight.sum(dim=1, keepdim=True)
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    columns = (padded.unfold(3, 5, 1) * weight[:, None, None, None]).sum(-1)
    return (columns.unfold(2, 5, 1) * weight[:, None, None, None]).sum(-1)


def _stripes(images: Tensor, generator: torch.Generator) -> Tensor:
    """Paint stripes of a palette colour over the image or a part of it."""
    batch = len(images)
    angle = _uniform(0, math.pi, batch, generator)
    straight = torch.rand(batch, 1, 1, 1, generator=generator) < 0.6
    angle = torch.where(straight, (angle / (math.pi / 2)).round() * (math.pi / 2), angle)
    period = _uniform(2, 9, batch, generator)
    phase = _uniform(0, 2 * math.pi, batch, generator)
    pixel = torch.arange(IMAGE_SIZE).float()
    along = pixel[:, None] * angle.sin() + pixel[None, :] * angle.cos()
    wave = 0.5 + 0.5 * torch.sin(2 * math.pi * along / period + phase)
    hard = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
    wave = torch.where(hard, (wave > 0.6).float(), wave)
    strength = wave * _uniform(0.2, 1.0, batch, generator) * _window(batch, generator)
    return images + strength * (_palette_colors(batch, generator) - images)


def _fill(images: Tensor, generator: torch.Generator) -> Tensor:
    """Paint the whole image or a large part of it in one colour."""
    batch = len(images)
    strength = _uniform(0.2, 1.0, batch, generator) * _window(batch, generator)
    return images + strength * (_palette_colors(batch, generator) - images)


def _window(batch: int, generator: torch.Generator) -> Tensor:
    """[B, 1, S, S] rectangles of at least half the image's side, or the whole image."""
    size = torch.randint(IMAGE_SIZE // 2, 2 * IMAGE_SIZE, (batch, 2), generator=generator)
    start = torch.rand(batch, 2, generator=generator) * (IMAGE_SIZE - size).clamp(min=0)
    start, end = start.floor()[..., None], (start.floor() + size)[..., None]
    pixel = torch.arange(IMAGE_SIZE)
    inside = (pixel >= start) & (pixel < end)
    return (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None].float()


def _noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Heavy noise, pixel-wise or in 3 x 3 smears."""
    batch = len(images)
    noise = torch.randn(images.shape, generator=generator)
    smeared = F.avg_pool2d(noise, 3, 1, 1) * 3
    coarse = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
    return images + torch.where(coarse, smeared, noise) * _uniform(0.12, 0.4, batch, generator)


def _blank(images: Tensor, generator: torch.Generator) -> Tensor:
    return _background().expand_as(images).clone()


def _double(images: Tensor, generator: torch.Generator) -> Tensor:
    """Overlay the image with itself a few pixels further, so that objects run together."""
    down, right = torch.randint(2, 5, (2,), generator=generator).tolist()
    moved = torch.roll(images, (down, right), dims=(2, 3))
    keep = (images - _background()).abs() >= (moved - _background()).abs()
    return torch.where(keep, images, moved)


def _ghost(images: Tensor, generator: torch.Generator) -> Tensor:
    """Fade the objects of some cells, always the most colourful one, to a quarter to two thirds."""
    batch = len(images)
    deviation = (images - _background()).abs().amax(dim=1, keepdim=True)
    strongest = F.max_pool2d(deviation, IMAGE_SIZE // CELLS).flatten(1).argmax(dim=1)
    faded = F.one_hot(strongest, CELLS**2).bool() | (
        torch.rand(batch, CELLS**2, generator=generator) < 0.2
    )
    keep = torch.where(_to_pixels(faded), _uniform(0.2, 0.65, batch, generator), 1.0)
    return _background() + (images - _background()) * keep


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
