"""The classifier of the embedded task as a held-out reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gardo.rewards.base import Reward, RewardSpec
from gardo.rewards.objects import prepare_images, scene_of
from gardo.tiny.judge import SHIPPED_JUDGE, shared_judge
from gardo.tiny.scenes import COLORS, NUMBERS, SHAPES
from gardo.types import RewardOutput


class JudgeReward(Reward):
    """Probability of the prompted count, colour and shape under the judge (their product).

    Held out: the judge never saw an image of the trained model. A non-finite image scores NaN.
    """

    spec: ClassVar[RewardSpec] = RewardSpec(value_range=(0.0, 1.0))

    def __init__(
        self, device: torch.device | str = "cpu", path: Path | str = SHIPPED_JUDGE
    ) -> None:
        """Load the judge from ``path``, a folder with its weights and configuration."""
        self.judge = shared_judge(path, device)
        self.device = torch.device(device)

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        where = images.device
        images, finite = prepare_images(images.to(self.device), prompts)
        problems = (self.check_prompt(*pair) for pair in zip(prompts, metadata, strict=True))
        for problem in problems:
            if problem:
                raise ValueError(problem)
        scenes = [scene_of(*pair) for pair in zip(prompts, metadata, strict=True)]
        colors = list(COLORS)
        output = self.judge(images)

        def probability(logits: Tensor, classes: list[int]) -> Tensor:
            index = torch.tensor(classes, device=logits.device, dtype=torch.int64)
            chosen = logits.softmax(dim=1).gather(1, index[:, None])[:, 0]
            return chosen.where(finite, torch.nan).to(where)

        count = probability(output.count, [scene.count for scene in scenes])
        color = probability(output.color, [colors.index(scene.color) for scene in scenes])
        shape = probability(output.shape, [SHAPES.index(scene.shape) for scene in scenes])
        return RewardOutput(count * color * shape)

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> str | None:
        try:
            count = scene_of(prompt, metadata).count
        except ValueError as error:
            return str(error)
        if count > len(NUMBERS):
            return f"prompt {prompt!r}: the judge counts to {len(NUMBERS)}, got {count}"
        return None
