"""The true reward, the proxies that stand in for it, and the auxiliary rewards."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experiments.mixture.distribution import HACK_MIDDLE, modes
from gardo.rng import generator

MODE_WIDTH = 0.6
"""Reward falls off from a mode's middle as a Gaussian of this width (two of the data's sd)."""

RING_VALUE = (0.5, 0.6, 0.7, 0.6, 0.5, 0.6, 0.7, 0.6)
"""True value of the ring's modes; the centre is worth 1."""

HACK_VALUE = 3.0
HACK_WIDTH = 0.8

SPURIOUS = 0.02
"""Range of the meaningless differences that a saturated proxy shows in the second context."""

AUX_COUNT = 2
AUX_VALUE_NOISE = 0.1
AUX_FIELD = 0.15
_FIELD_WAVES = 32
_FIELD_LENGTH = 1.5
_FEATURE_WAVES = 64
_FEATURE_LENGTH = 1.0


def mode_reward(points: Tensor, value: Tensor) -> Tensor:
    """``[N]``: each mode pays its ``value [9]``, falling to nothing off the manifold."""
    square = (points[:, None] - modes()).square().sum(dim=2)
    paid: Tensor = ((-square / (2 * MODE_WIDTH**2)).exp() * value).sum(dim=1)
    return paid


def true_reward(points: Tensor) -> Tensor:
    """``[N]`` in about [0, 1]; highest in the centre."""
    return mode_reward(points, torch.tensor([*RING_VALUE, 1.0]))


def hackable(points: Tensor) -> Tensor:
    """The true reward plus a large bump off the manifold."""
    square = (points - torch.tensor(HACK_MIDDLE)).square().sum(dim=1)
    return true_reward(points) + HACK_VALUE * (-square / (2 * HACK_WIDTH**2)).exp()


def saturated(points: Tensor) -> Tensor:
    """A proxy that no longer tells samples apart: 1 plus meaningless differences.

    They grow slowly from left to right, so that following them leads off the manifold.
    """
    return 1 + SPURIOUS / 2 * (points[:, 0] / 4).tanh()


def auxiliaries(points: Tensor) -> Tensor:
    """``[AUX_COUNT, N]`` rewards that are wrong in their own ways.

    Each values the modes with its own errors and adds a smooth random field over the whole plane.
    Both are drawn once, from a fixed seed, without regard to where a proxy is wrong: the errors
    are independent of the hack, which they neither contain nor avoid.
    """
    value = torch.tensor([*RING_VALUE, 1.0])
    rewards = []
    for index in range(AUX_COUNT):
        source = generator(0, "auxiliary", index)
        wrong = value + AUX_VALUE_NOISE * torch.randn(len(value), generator=source)
        waves = _waves(points, _FIELD_WAVES, _FIELD_LENGTH, source)
        field = waves @ torch.randn(waves.shape[1], generator=source) / math.sqrt(_FIELD_WAVES)
        rewards.append(mode_reward(points, wrong) + AUX_FIELD * field)
    return torch.stack(rewards)


def features(points: Tensor) -> Tensor:
    """``[N, 128]`` random Fourier features, in which distances are measured.

    Their cosine similarity approximates ``exp(-|difference|^2 / 2)`` (Rahimi and Recht 2007); the
    cosine of raw 2-D points would compare only their directions from the origin.
    """
    return _waves(points, _FEATURE_WAVES, _FEATURE_LENGTH, generator(0, "features"))


def _waves(points: Tensor, count: int, length: float, source: torch.Generator) -> Tensor:
    """``[N, 2 * count]``: cosines and sines of random frequencies for a Gaussian kernel."""
    phase = points @ (torch.randn(2, count, generator=source) / length)
    return torch.cat([phase.cos(), phase.sin()], dim=1)
