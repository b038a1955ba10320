"""CLIPScore: the cosine between image and prompt under CLIP ViT-L/14."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from gardo.rewards.backbones import CLIP_LARGE, CLIP_LARGE_BACKBONE, ClipBackbone, clip_backbone
from gardo.rewards.base import Reward, RewardSpec
from gardo.rewards.preprocess import check_batch
from gardo.rewards.pretrained import compute_dtype
from gardo.types import RewardOutput


class ClipCosineReward(Reward):
    """``scale * cosine(image, prompt)`` under a CLIP model."""

    def __init__(self, clip: ClipBackbone, scale: float = 1.0) -> None:
        """Score with a loaded model; the cosine is multiplied by ``scale``."""
        self.clip = clip
        self.scale = scale

    @torch.inference_mode()
    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        check_batch(images, prompts)
        pairs = self.clip.image_features(images) * self.clip.text_features(list(prompts))
        return RewardOutput((self.scale * pairs.sum(dim=1)).to(images.device))


class CLIPScoreReward(ClipCosineReward):
    """Cosine of CLIP ViT-L/14 (Hessel et al., arXiv 2104.08718, without its clipping and factor).

    flow_grpo's ``clipscore`` is the logit over 30, that is 100/30 times this score.
    """

    spec: ClassVar[RewardSpec] = RewardSpec(value_range=(-1.0, 1.0), batch_size=64)
    backbones = (CLIP_LARGE_BACKBONE,)

    def __init__(
        self,
        device: torch.device | str = "cpu",
        path: str = CLIP_LARGE,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
    ) -> None:
        """Load CLIP from a hub id or folder; dtype is fp32, fp16 or bf16."""
        dtype = compute_dtype(dtype, device)
        super().__init__(clip_backbone(path, device, dtype, revision))
