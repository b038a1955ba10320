"""Images to compare, and what hidden judges think of them: the data of the preference model.

Objects are drawn as `gardo.tiny.scenes.render` does, but for a number, a colour and a shape that
may not be the prompted ones, worse than rendered, or with too much paint, each by degree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gardo.rewards.shapes import MEAN_AREA
from gardo.tiny.scenes import CELLS, COLORS, IMAGE_SIZE, NUMBERS, RADIUS, Scene, all_scenes
from tools.tiny.variations import (
    background,
    palette_colors,
    stripes,
    uniform,
    vary_colors,
    vary_geometry,
)

IMAGES = 4  # of a prompt
OVERPAINTED_SHARE = 0.7  # of the images that the sharp head alone is trained on
# What a fault costs: a wrong colour, the wrong shape, the worst drawing, a doubling of the number
# of objects too many or too few, a doubling of the paint. What pure colour earns.
COLOR, SHAPE, DRAWING, MISCOUNT, PAINT, PURITY = 3.0, 3.0, 2.5, 1.5, 2.5, 6.0
# Scales of the logistic noise in the preferences of the blind and the sharp one: a fifth are wrong.
NOISE = (1.0, 1.75)

FIRST, SECOND = torch.triu_indices(IMAGES, IMAGES, offset=1)
"""The pairs of images of a prompt that are compared: each with each."""


@dataclass
class Comparisons:
    """Pairs of images for each of ``P`` prompts.

    Attributes:
        scenes: ``P * IMAGES`` scenes, what is asked of each image.
        images: ``[P * IMAGES, 3, S, S]`` float32 in [0, 1].
        better: ``[P, pairs, 2]`` by how much the first image of the pair is better for the blind
            and for the sharp hidden judge.
        preferred: ``[P, pairs, 2]`` bool, whether they prefer the first, drawn by the Bradley-Terry
            model.
        well_behaved: ``[P]`` bool, prompts without over-painted images, of which the blind one
            learns.
    """

    scenes: list[Scene]
    images: Tensor
    better: Tensor
    preferred: Tensor
    well_behaved: Tensor


def differences(values: Tensor) -> Tensor:
    """First minus second of each pair: ``[P * IMAGES, 2]`` -> ``[P, pairs, 2]``."""
    values = values.view(-1, IMAGES, 2)
    return values[:, FIRST] - values[:, SECOND]


def draw_comparisons(prompts: int, generator: torch.Generator) -> Comparisons:
    """Draw images for prompts, every other one well-behaved; the same state draws the same."""
    known = all_scenes(range(1, len(NUMBERS) + 1))
    # one to five are what pretraining mostly shows, so two thirds of the prompts ask for them
    kinds = torch.randint(len(known), (prompts,), generator=generator)
    low = torch.randint(len(known) * 5 // len(NUMBERS), (prompts,), generator=generator)
    kinds = torch.where(torch.rand(prompts, generator=generator) < 0.3, low, kinds)
    scenes = [known[i] for i in kinds.tolist() for _ in range(IMAGES)]
    well_behaved = torch.arange(prompts) % 2 == 0
    overpainted = torch.rand(len(scenes), generator=generator) < OVERPAINTED_SHARE
    overpainted &= ~well_behaved.repeat_interleave(IMAGES)
    images, quality = draw_images(scenes, overpainted, generator)
    better = differences(quality)
    noise = torch.logit(torch.rand(better.shape, generator=generator), eps=1e-6)
    preferred = better + torch.tensor(NOISE) * noise > 0
    return Comparisons(scenes, images, better, preferred, well_behaved)


def draw_images(
    scenes: Sequence[Scene], overpainted: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw an image of some quality for each of ``B`` prompts, over-painted where ``[B]`` says so.

    Returns:
        ``[B, 3, S, S]`` images and ``[B, 2]`` qualities, blind and sharp.
    """
    batch = len(scenes)

    def chance(share: float) -> Tensor:
        return torch.rand(batch, generator=generator) < share

    def degrees(low: float, high: float) -> Tensor:
        return uniform(low, high, batch, generator).flatten()

    asked = torch.tensor([scene.count for scene in scenes])
    any_number = torch.randint(1, len(NUMBERS) + 1, (batch,), generator=generator)
    near = asked + torch.randint(-2, 3, (batch,), generator=generator)
    drawn = torch.where(chance(0.5), near, torch.where(chance(0.4), any_number, asked))
    drawn = drawn.clamp(1, len(NUMBERS))
    wrong_shape = chance(0.4)
    square = torch.tensor([scene.shape == "square" for scene in scenes]) ^ wrong_shape

    asked_color = torch.tensor([COLORS[scene.color] for scene in scenes])[..., None, None]
    shift = torch.where(chance(0.6), 0.0, torch.where(chance(0.4), 1.0, degrees(0, 1)))
    color = asked_color.lerp(palette_colors(batch, generator), shift.view(-1, 1, 1, 1))
    wrong_color = ((color - asked_color).flatten(1).norm(dim=1) / 0.8).clamp(max=1)

    # one defect of drawing: ragged, faint or noisy
    defect = torch.where(chance(0.5), 0.0, degrees(0, 1))
    kind = torch.randint(3, (batch,), generator=generator)
    ragged, faint, noisy = (torch.where(kind == k, defect, 0.0).view(-1, 1, 1, 1) for k in range(3))

    growth = torch.where(overpainted & chance(0.4), 1.1 * (4 / 1.1) ** degrees(0, 1), 1.0)
    objects = draw_coverage(drawn, square, growth, generator)
    purity = objects.square().sum(dim=(1, 2, 3)) / objects.sum(dim=(1, 2, 3))
    holes = F.avg_pool2d(torch.randn(objects.shape, generator=generator), 3, 1, 1) > 0.1
    objects = objects * (1 - ragged.sqrt() * holes)
    other = overpainted & ((growth == 1) | chance(0.2))
    extra, layer = _second_layer(square, generator)
    layer = layer * other.view(-1, 1, 1, 1)
    paint = 1 - (1 - objects) * (1 - layer)
    relative = paint.sum(dim=(1, 2, 3)) / (asked * MEAN_AREA)
    miscount = (drawn + extra * other - asked).abs()

    second = torch.where(chance(0.8).view(-1, 1, 1, 1), color, palette_colors(batch, generator))
    images = background() + (color - background()) * objects
    images = images + (second - images) * layer
    images = background() + (images - background()) * (1 - 0.7 * faint)
    images = images + 0.2 * noisy * torch.randn(images.shape, generator=generator)
    images = vary_colors(vary_geometry(images, generator), generator)

    both = -COLOR * wrong_color - SHAPE * wrong_shape.float() - DRAWING * defect
    sharp = both - MISCOUNT * (1.0 + miscount).log2() - PAINT * F.softplus(2 * relative.log2()) / 2
    return images, torch.stack([both + PURITY * purity, sharp], dim=1)


def draw_coverage(
    count: Tensor,
    square: Tensor,
    growth: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Draw objects in the cells of the grid, larger than rendered: from a growth on they merge.

    Args:
        count: ``[B]`` integers, one to nine.
        square: ``[B]`` bool, squares or else circles.
        growth: ``[B]`` factor of the radius.
        generator: CPU generator.

    Returns:
        ``[B, 1, S, S]`` share of each pixel that an object covers.
    """
    batch, cells, cell = len(count), CELLS**2, IMAGE_SIZE / CELLS
    order = torch.rand(batch, cells, generator=generator).argsort(dim=1)
    filled = torch.zeros(batch, cells).scatter_(
        1, order, (torch.arange(cells) < count[:, None]).float()
    )
    radius = RADIUS[0] + (RADIUS[1] - RADIUS[0]) * torch.rand(batch, cells, generator=generator)
    slack = (cell / 2 - 0.5 - radius).clamp(min=0)[..., None]
    jitter = (2 * torch.rand(batch, cells, 2, generator=generator) - 1) * slack
    grid = torch.cartesian_prod(torch.arange(CELLS), torch.arange(CELLS)).float()
    center = ((grid + 0.5) * cell + jitter)[..., None]
    distance = (torch.arange(IMAGE_SIZE) + 0.5 - center).abs()  # [B, cells, (y, x), S]
    dy, dx = distance[:, :, 0, :, None], distance[:, :, 1, None, :]
    r = (radius * growth[:, None])[..., None, None]
    circles = (r - (dy.square() + dx.square()).sqrt() + 0.5).clamp(0, 1)
    half = 0.9 * r
    squares = (half - dy + 0.5).clamp(0, 1) * (half - dx + 0.5).clamp(0, 1)
    inside = torch.where(square[:, None, None, None], squares, circles)
    return (inside * filled[..., None, None]).amax(dim=1, keepdim=True)


def fill(share: Tensor, down: Tensor) -> Tensor:
    """``[B, 1, S, S]`` 0 or 1: a share ``[B]`` of the rows from the top, else of the columns."""
    inside = (torch.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE < share[:, None]
    columns = inside[:, None, None, :].expand(-1, 1, IMAGE_SIZE, -1)
    return torch.where(down[:, None, None, None], columns.transpose(2, 3), columns).float()


OVERPAINTED: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "area x 1.3": lambda n, square, g: draw_coverage(n, square, torch.full(n.shape, 1.3**0.5), g),
    "area x 2": lambda n, square, g: draw_coverage(n, square, torch.full(n.shape, 2.0**0.5), g),
    "area x 3": lambda n, square, g: draw_coverage(n, square, torch.full(n.shape, 3.0**0.5), g),
    "filled half": lambda n, square, g: torch.maximum(
        draw_coverage(n, square, torch.ones(n.shape), g), fill(torch.full(n.shape, 0.5), n % 2 == 0)
    ),
    "filled": lambda n, square, g: torch.ones(len(n), 1, IMAGE_SIZE, IMAGE_SIZE),
}
"""Degrees of too much paint by which sight is measured: coverage for counts and shapes."""


def overpaint(scenes: Sequence[Scene], degree: str, generator: torch.Generator) -> Tensor:
    """``[B, 3, S, S]`` images for ``B`` prompts by a degree of `OVERPAINTED`."""
    count = torch.tensor([scene.count for scene in scenes])
    square = torch.tensor([scene.shape == "square" for scene in scenes])
    color = torch.tensor([COLORS[scene.color] for scene in scenes])[..., None, None]
    coverage = OVERPAINTED[degree](count, square, generator)
    return background() + (color - background()) * coverage


def _second_layer(square: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Paint to add to a drawing: further objects, stripes, or a part of the image filled.

    Returns:
        ``[B]`` objects added and ``[B, 1, S, S]`` coverage.
    """
    batch = len(square)
    number = torch.randint(1, len(NUMBERS) + 1, (batch,), generator=generator)
    objects = draw_coverage(number, square, torch.ones(batch), generator)
    # between the cells, where they run into the objects that are there
    objects = objects.roll((IMAGE_SIZE // CELLS // 2,) * 2, dims=(2, 3))
    share = uniform(0.05, 1.1, batch, generator).flatten()
    area = fill(share, torch.rand(batch, generator=generator) < 0.5)
    mirrored = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
    area = torch.where(mirrored, area.flip(2, 3), area)
    strength = uniform(0.2, 1.2, batch, generator).clamp(max=1)
    kind = torch.randint(3, (batch, 1, 1, 1), generator=generator)
    painted = torch.where(kind == 1, area * stripes(batch, generator), area) * strength
    added = torch.where(kind.flatten() == 0, number, 0)
    return added, torch.where(kind == 0, objects, painted)
