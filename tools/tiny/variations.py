"""Ways to vary and spoil rendered images, from which the training data of networks is made."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gardo.tiny.scenes import BACKGROUND, CELLS, COLORS, IMAGE_SIZE, SHAPES, Scene


def background() -> Tensor:
    """[1, 3, 1, 1]."""
    return torch.tensor(BACKGROUND).view(1, 3, 1, 1)


def to_pixels(cells: Tensor) -> Tensor:
    """Spread [B, CELLS * CELLS] over the pixels of the cells: [B, 1, S, S]."""
    grid = cells.view(-1, 1, CELLS, CELLS)
    size = IMAGE_SIZE // CELLS
    return grid.repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)


def uniform(low: float, high: float, batch: int, generator: torch.Generator) -> Tensor:
    """[B, 1, 1, 1] numbers."""
    return low + (high - low) * torch.rand(batch, 1, 1, 1, generator=generator)


def palette_colors(batch: int, generator: torch.Generator) -> Tensor:
    """[B, 3, 1, 1] colours that a prompt can ask for."""
    palette = torch.tensor(list(COLORS.values()))
    return palette[torch.randint(len(palette), (batch,), generator=generator)][:, :, None, None]


def vary_geometry(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip, shift by up to a pixel and a half, and scale a little; the outside stays grey."""
    batch = len(images)
    scale = uniform(0.93, 1.07, batch, generator).flatten()
    shift = (2 * torch.rand(batch, 2, generator=generator) - 1) * 1.5 * 2 / IMAGE_SIZE
    # a third stays on the pixel grid, as sharp as rendered
    still = torch.rand(batch, generator=generator) < 0.35
    scale, shift = torch.where(still, 1.0, scale), shift * ~still[:, None]
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    grey = background()
    return F.grid_sample(images - grey, grid, align_corners=False) + grey


def vary_colors(images: Tensor, generator: torch.Generator) -> Tensor:
    """What a decoder does: soft edges, small shifts of colour and brightness, faint noise."""
    batch = len(images)
    sigma = uniform(0.3, 0.8, batch, generator)
    blurred = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(blurred, blur(images, sigma), images)
    gain = 1 + 0.08 * (2 * torch.rand(batch, 3, 1, 1, generator=generator) - 1)
    bias = 0.04 * (2 * torch.rand(batch, 3, 1, 1, generator=generator) - 1)
    noise = torch.randn(images.shape, generator=generator) * uniform(0, 0.04, batch, generator)
    return ((images - 0.5) * gain + 0.5 + bias + noise).clamp(0, 1)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur over 5 x 5 pixels with one width per image, [B, 1, 1, 1]."""
    offset = torch.arange(-2, 3).float()
    weight = torch.exp(-offset.square() / (2 * sigma.view(-1, 1).square()))
    weight = weight / weight.sum(dim=1, keepdim=True)
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    columns = (padded.unfold(3, 5, 1) * weight[:, None, None, None]).sum(-1)
    return (columns.unfold(2, 5, 1) * weight[:, None, None, None]).sum(-1)


def stripes(batch: int, generator: torch.Generator) -> Tensor:
    """[B, 1, S, S] in [0, 1]: parallel stripes, half of them with hard edges."""
    angle = uniform(0, math.pi, batch, generator)
    straight = torch.rand(batch, 1, 1, 1, generator=generator) < 0.6
    angle = torch.where(straight, (angle / (math.pi / 2)).round() * (math.pi / 2), angle)
    period = uniform(2, 9, batch, generator)
    phase = uniform(0, 2 * math.pi, batch, generator)
    pixel = torch.arange(IMAGE_SIZE).float()
    along = pixel[:, None] * angle.sin() + pixel[None, :] * angle.cos()
    wave = 0.5 + 0.5 * torch.sin(2 * math.pi * along / period + phase)
    hard = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
    return torch.where(hard, (wave > 0.6).float(), wave)


def window(batch: int, generator: torch.Generator) -> Tensor:
    """[B, 1, S, S] rectangles of at least half the image's side, or the whole image."""
    size = torch.randint(IMAGE_SIZE // 2, 2 * IMAGE_SIZE, (batch, 2), generator=generator)
    start = torch.rand(batch, 2, generator=generator) * (IMAGE_SIZE - size).clamp(min=0)
    start, end = start.floor()[..., None], (start.floor() + size)[..., None]
    pixel = torch.arange(IMAGE_SIZE)
    inside = (pixel >= start) & (pixel < end)
    return (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None].float()


def color_index(scenes: Sequence[Scene]) -> Tensor:
    names = list(COLORS)
    return torch.tensor([names.index(scene.color) for scene in scenes])


def shape_index(scenes: Sequence[Scene]) -> Tensor:
    return torch.tensor([SHAPES.index(scene.shape) for scene in scenes])
