"""Images for the tests of the rewards: rendered scenes and what goes wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gardo.rewards.base import Reward
from gardo.tiny.scenes import COLORS, SHAPES, Scene, all_scenes, render

SCENES = all_scenes() * 4  # 160: every count from 1 to 5, colour and shape four times


def draw(change: Callable[[Scene], Scene] = lambda scene: scene, seed: int = 7) -> Tensor:
    """[160, 3, 24, 24], each scene after ``change``."""
    return render([change(scene) for scene in SCENES], torch.Generator().manual_seed(seed))


def one_more(scene: Scene) -> Scene:
    return replace(scene, count=scene.count + 1)


def other_color(scene: Scene) -> Scene:
    names = list(COLORS)
    return replace(scene, color=names[(names.index(scene.color) + 1) % len(names)])


def other_shape(scene: Scene) -> Scene:
    return replace(scene, shape=SHAPES[1 - SHAPES.index(scene.shape)])


def as_decoded(images: Tensor) -> Tensor:
    """Soft edges (3 x 3 binomial blur mixed in), a slight tint and noise of 0.01."""
    kernel = torch.tensor([0.25, 0.5, 0.25])
    weight = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), weight, groups=3)
    tint = torch.tensor([0.01, -0.01, 0.005])[:, None, None]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    return (0.6 * images + 0.4 * blurred + tint + 0.01 * noise).clamp(0, 1)


def striped(images: Tensor, strength: float = 1.0) -> Tensor:
    """The hack: every other pair of columns painted in the prompted colour."""
    color = torch.tensor([COLORS[scene.color] for scene in SCENES])[:, :, None, None]
    columns = (torch.arange(images.shape[-1]) % 4 < 2).float()
    return images + strength * columns * (color - images)


def filled() -> Tensor:
    color = torch.tensor([COLORS[scene.color] for scene in SCENES])[:, :, None, None]
    return color.expand(-1, -1, 24, 24).clone()


def blank() -> Tensor:
    return torch.full((len(SCENES), 3, 24, 24), 0.5)


def score(reward: Reward, images: Tensor, scenes: list[Scene] = SCENES) -> Tensor:
    return reward.score(
        images, [scene.prompt for scene in scenes], [scene.metadata for scene in scenes]
    ).scores
