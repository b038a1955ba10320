"""Rewards of the embedded task that a small network computes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gardo.rewards.base import Reward
from gardo.rewards.objects import prepare_images, scene_of
from gardo.tiny.scenes import NUMBERS, Scene
from gardo.types import RewardOutput


class NetworkReward(Reward):
    """A reward for prompts of the embedded grammar with counts up to nine.

    What a prompt asks for is read as `scene_of` does. A non-finite image scores NaN.

    Attributes:
        network: what messages call it.
        device: where images are scored.
    """

    network: ClassVar[str]
    device: torch.device

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
        return RewardOutput(self.measure(images, scenes).where(finite, torch.nan).to(where))

    def check_prompt(self, prompt: str, metadata: Mapping[str, Any]) -> str | None:
        try:
            count = scene_of(prompt, metadata).count
        except ValueError as error:
            return str(error)
        if count > len(NUMBERS):
            return f"prompt {prompt!r}: the {self.network} counts to {len(NUMBERS)}, got {count}"
        return None

    @abstractmethod
    def measure(self, images: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Scores ``[B]`` float32 of finite float32 images on `device`."""
