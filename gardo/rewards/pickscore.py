"""PickScore: CLIP ViT-H/14 fine-tuned on choices of users."""

from __future__ import annotations

from typing import ClassVar

import torch

from gardo.rewards.backbones import clip_backbone
from gardo.rewards.base import Backbone, RewardSpec
from gardo.rewards.clipscore import ClipCosineReward
from gardo.rewards.pretrained import compute_dtype

PICKSCORE = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore's own model card names it


class PickScoreReward(ClipCosineReward):
    """``logit_scale * cosine(image, prompt)`` (Kirstain et al., arXiv 2305.01569).

    The published score, about 17 to 24 for generated images. flow_grpo divides it by 26.
    """

    spec: ClassVar[RewardSpec] = RewardSpec(value_range=(-100.0, 100.0), batch_size=32)
    backbones = (Backbone("CLIP ViT-H/14", 2 * 0.99e9),)

    def __init__(
        self,
        device: torch.device | str = "cpu",
        path: str = PICKSCORE,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        processor: str | None = None,
    ) -> None:
        """Load PickScore.

        Args:
            device: where it computes.
            path: hub id or folder of the model.
            dtype: fp32, fp16 or bf16; None: fp16 on CUDA, fp32 on CPU.
            revision: hub revision of the model.
            processor: hub id or folder of tokenizer and preprocessing; None: LAION's CLIP-H for the
                published model, or else ``path`` itself.
        """
        if processor is None and path == PICKSCORE:
            processor = PROCESSOR
        dtype = compute_dtype(dtype, device)
        clip = clip_backbone(path, device, dtype, revision, processor)
        super().__init__(clip, clip.logit_scale)
