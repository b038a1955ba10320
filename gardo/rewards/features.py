"""Image features, in which diversity and the distance to real images are measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from gardo.rewards.base import Backbone
from gardo.rewards.objects import check_images, finite_images
from gardo.tiny.judge import SHIPPED_JUDGE, shared_judge


class FeatureExtractor(ABC):
    """A fixed encoder of images.

    Attributes:
        name: what metrics and reports call it.
        dimension: number of features of an image.
        backbones: the models that it loads, for the planner.
    """

    name: ClassVar[str]
    dimension: int
    backbones: ClassVar[tuple[Backbone, ...]] = ()

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: ``[B, 3, H, W]`` floating point in [0, 1], on any device.

        Returns:
            ``[B, dimension]`` float32 on the device of ``images``, without gradient; a row of NaN
            for a non-finite image.
        """


class JudgeFeatures(FeatureExtractor):
    """Penultimate layer of the embedded task's judge."""

    name = "judge"

    def __init__(
        self, device: torch.device | str = "cpu", path: Path | str = SHIPPED_JUDGE
    ) -> None:
        """Load the judge from ``path``, a folder with its weights and configuration."""
        self.judge = shared_judge(path, device)
        self.device = torch.device(device)
        self.dimension = self.judge.config.features

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        safe, finite = finite_images(images.to(self.device))
        features = self.judge(safe).features
        return features.where(finite[:, None], torch.nan).to(images.device)
