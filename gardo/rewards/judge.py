"""The classifier of the embedded task as a held-out reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from gardo.rewards.base import RewardSpec
from gardo.rewards.networks import NetworkReward
from gardo.tiny.judge import SHIPPED_JUDGE, shared_judge
from gardo.tiny.scenes import COLORS, SHAPES, Scene


class JudgeReward(NetworkReward):
    """Probability of the prompted count, colour and shape under the judge (their product).

    Held out: the judge never saw an image of the trained model.
    """

    spec: ClassVar[RewardSpec] = RewardSpec(value_range=(0.0, 1.0))
    network = "judge"

    def __init__(
        self, device: torch.device | str = "cpu", path: Path | str = SHIPPED_JUDGE
    ) -> None:
        """Load the judge from ``path``, a folder with its weights and configuration."""
        self.judge = shared_judge(path, device)
        self.device = torch.device(device)

    def measure(self, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
        colors = list(COLORS)
        output = self.judge(images)

        def probability(logits: Tensor, classes: list[int]) -> Tensor:
            index = torch.tensor(classes, device=logits.device, dtype=torch.int64)
            return logits.softmax(dim=1).gather(1, index[:, None])[:, 0]

        count = probability(output.count, [scene.count for scene in scenes])
        color = probability(output.color, [colors.index(scene.color) for scene in scenes])
        shape = probability(output.shape, [SHAPES.index(scene.shape) for scene in scenes])
        return count * color * shape
