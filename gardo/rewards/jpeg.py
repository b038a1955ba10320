"""The size of an image as a JPEG file, as a reward and as a penalty.

The two rewards with which DDPO (Black et al., arXiv 2305.13301) tests fine-tuning, with the scale
of Flow-GRPO: easy to compute, easy to hack, no model needed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gardo.rewards.base import Reward, RewardSpec
from gardo.rewards.objects import finite_images
from gardo.rewards.preprocess import check_batch, to_bytes
from gardo.types import RewardOutput

QUALITY = 95


class JPEGIncompressibilityReward(Reward):
    """Size of the JPEG file in kilobytes (of 1000 bytes)."""

    spec: ClassVar[RewardSpec] = RewardSpec(value_range=(0.0, None), needs_prompt=False)

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """``device`` is ignored: Pillow compresses on the CPU."""

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        check_batch(images, prompts)
        safe, finite = finite_images(images)
        sizes = jpeg_kilobytes(safe).to(images.device)
        return RewardOutput(sizes.where(finite, torch.nan))


class JPEGCompressibilityReward(JPEGIncompressibilityReward):
    """Minus the size of the JPEG file in units of 500 kilobytes."""

    spec: ClassVar[RewardSpec] = RewardSpec(value_range=(None, 0.0), needs_prompt=False)

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        return RewardOutput(super().score(images, prompts, metadata).scores / -500)


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Sizes of the JPEG files of quality 95 that Pillow writes.

    Args:
        images: ``[B, 3, H, W]`` floating point in [0, 1], on any device.

    Returns:
        ``[B]`` float32 on the CPU, in units of 1000 bytes.
    """
    from PIL import Image

    sizes = []
    for pixels in to_bytes(images).to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=QUALITY)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)
