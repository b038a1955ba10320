"""Image features, in which diversity and the distance to real images are measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gardo.rewards.base import load_factory
from gardo.rewards.objects import check_images, finite_images
from gardo.tiny.judge import SHIPPED_JUDGE, shared_judge
from gardo.types import UserError


class FeatureExtractor(ABC):
    """A fixed encoder of images.

    Attributes:
        name: what metrics and reports call it.
        dimension: number of features of an image.
    """

    name: ClassVar[str]
    dimension: int

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


# name -> "module:class"; a class is imported only when a recipe asks for it.
_REGISTRY: dict[str, str] = {
    "judge": "gardo.rewards.features:JudgeFeatures",
    "dinov3": "gardo.rewards.dinov3:DINOv3Features",
}


def feature_names() -> list[str]:
    """Names of the built-in feature extractors."""
    return sorted(_REGISTRY)


def build_features(
    name: str, device: torch.device | str = "cpu", **parameters: Any
) -> FeatureExtractor:
    """Build a feature extractor by name or by Python path ``module:attribute``.

    The attribute is called with ``device`` and the recipe's parameters.

    Raises:
        UserError: unknown name, module or attribute, a refused parameter value, or a result that
            is no `FeatureExtractor`.
    """
    factory = load_factory("feature extractor", name, _REGISTRY)
    try:
        features = factory(device=device, **parameters)
    except ValueError as error:
        raise UserError(f"feature extractor '{name}': {error}") from error
    if not isinstance(features, FeatureExtractor):
        raise UserError(
            f"feature extractor '{name}': expected a gardo.rewards.features.FeatureExtractor, "
            f"got {type(features).__name__}"
        )
    return features
