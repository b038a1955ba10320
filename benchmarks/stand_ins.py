"""What stands in for models that a benchmark does not download: rewards, features, text encoders.

The rewards are names for a recipe: ``rewards.proxy: benchmarks.stand_ins:proxy``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gardo.families import Architecture
from gardo.rewards.features import FeatureExtractor
from gardo.rng import generator, normal_rows
from gardo.types import PromptEmbeds

Metadata = Sequence[Mapping[str, Any]]


def proxy(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    """A number in [0, 1) per image that looks random: ``[B]`` float64."""
    return _scramble(images, 1.0)


def first(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    """As `proxy`, unrelated to it."""
    return _scramble(images, 2.0**0.5)


def second(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
    """As `proxy`, unrelated to it and to `first`."""
    return _scramble(images, 3.0**0.5)


def _scramble(images: Tensor, factor: float) -> Tensor:
    # the low digits of a sum over all pixels: the same for the same image in every repetition
    return (images.double().sum(dim=(1, 2, 3)) * 9973 * factor) % 1.0


class Features(FeatureExtractor):
    """Random projections of the image's 8 x 8 thumbnail, as many as DINOv3 ViT-L has features."""

    name = "stand-in"
    dimension = 1024

    def __init__(self, device: torch.device | str = "cpu") -> None:
        weights = torch.randn(192, self.dimension, generator=torch.Generator().manual_seed(0))
        self._weights = weights.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        thumbnails = torch.nn.functional.adaptive_avg_pool2d(images.float(), 8)
        return thumbnails.flatten(1).to(self._weights.device) @ self._weights


class TextEncoder:
    """Random prompt embeddings in an architecture's shapes, for `EmbeddingTable`."""

    def __init__(
        self,
        architecture: Architecture,
        max_sequence_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shapes = architecture.prompt_shapes(max_sequence_length)
        self.dtype = dtype
        self.device = device

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """The same embedding for the same text."""
        return PromptEmbeds(
            {
                name: normal_rows([generator(0, name, text) for text in prompts], shape).to(
                    self.dtype
                )
                for name, shape in self.shapes.items()
            }
        )
