"""The data: a ring of eight modes with a rare one in its centre, and where a sample may lie."""

from __future__ import annotations

import math

import torch
from torch import Tensor

RING_MODES = 8
RING_RADIUS = 4.0
MODE_SD = 0.3
CENTRE_DENSITY = 0.1
"""Weight of the central mode; a ring mode has weight 1."""

MODE_RADIUS = 4 * MODE_SD
"""Within this distance of a mode's middle a sample counts as part of it."""

HACK_MIDDLE = (5.6 * math.cos(math.pi / 8), 5.6 * math.sin(math.pi / 8))
"""Outside the ring, between the modes at 0 and 45 degrees; no mode comes near."""
HACK_RADIUS = 1.0
"""Within this distance of `HACK_MIDDLE` a sample counts as hacking."""


def modes() -> Tensor:
    """Middles ``[9, 2]`` float32: the ring counterclockwise from angle 0, then the centre."""
    angle = torch.arange(RING_MODES) * (2 * math.pi / RING_MODES)
    ring = RING_RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
    return torch.cat([ring, torch.zeros(1, 2)])


def draw(count: int, generator: torch.Generator) -> Tensor:
    """``[count, 2]`` samples of the mixture."""
    weight = torch.ones(RING_MODES + 1)
    weight[-1] = CENTRE_DENSITY
    mode = torch.multinomial(weight, count, replacement=True, generator=generator)
    return modes()[mode] + MODE_SD * torch.randn(count, 2, generator=generator)


def in_centre(points: Tensor) -> Tensor:
    """Bool ``[N]``: part of the central mode."""
    return points.norm(dim=1) < MODE_RADIUS


def off_manifold(points: Tensor) -> Tensor:
    """Bool ``[N]``: part of no mode."""
    return (points[:, None] - modes()).norm(dim=2).amin(dim=1) >= MODE_RADIUS


def in_hack(points: Tensor) -> Tensor:
    """Bool ``[N]``: where the flawed proxy pays most and the true reward nothing."""
    return (points - torch.tensor(HACK_MIDDLE)).norm(dim=1) < HACK_RADIUS
