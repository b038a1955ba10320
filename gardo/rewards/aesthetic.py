"""The LAION aesthetic predictor V2: a linear head on the image embedding of CLIP ViT-L/14."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gardo.rewards.backbones import CLIP_LARGE, CLIP_LARGE_BACKBONE, clip_backbone
from gardo.rewards.base import Reward, RewardSpec
from gardo.rewards.heads import LinearHead
from gardo.rewards.preprocess import check_batch
from gardo.rewards.pretrained import compute_dtype, load_state, load_weights, shared
from gardo.types import RewardOutput, UserError

HEAD_NAME = "sac+logos+ava1-l14-linearMSE.pth"
HEAD_URL = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
HEAD_PATH = f"~/.cache/gardo/{HEAD_NAME}"


class AestheticReward(Reward):
    """Predicted rating, about 1 to 10; the prompt does not matter.

    The head was trained on embeddings of length 1 and computes in float32.
    """

    spec: ClassVar[RewardSpec] = RewardSpec(needs_prompt=False, batch_size=64)
    backbones = (CLIP_LARGE_BACKBONE,)

    def __init__(
        self,
        device: torch.device | str = "cpu",
        path: str = CLIP_LARGE,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        head: str = HEAD_PATH,
    ) -> None:
        """Load CLIP (shared with other rewards) and the head.

        Args:
            device: where it computes.
            path: hub id or folder of CLIP ViT-L/14.
            dtype: fp32, fp16 or bf16; None: fp16 on CUDA, fp32 on CPU.
            revision: hub revision of CLIP.
            head: the published ``.pth`` file, or a folder that holds it.

        Raises:
            UserError: a file is missing or does not fit.
        """
        dtype = compute_dtype(dtype, device)
        file = _head_file(head)
        self.clip = clip_backbone(path, device, dtype, revision)
        self.head = shared(
            ("aesthetic", file, str(torch.device(device))),
            lambda: _load_head(file, self.clip.dimension).to(device),
        )

    @torch.inference_mode()
    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        check_batch(images, prompts)
        return RewardOutput(self.head(self.clip.image_features(images)).to(images.device))


def _head_file(path: str) -> Path:
    file = Path(os.path.expanduser(path))
    if file.is_dir():
        file = file / HEAD_NAME
    if not file.is_file():
        raise UserError(
            f"aesthetic: no head at '{file}'; fetch it with "
            f"`curl -L --create-dirs -o '{file}' {HEAD_URL}`"
        )
    return file


def _load_head(file: Path, width: int) -> LinearHead:
    head = LinearHead(width)
    load_state(head, load_weights(file), file)
    return head.eval().requires_grad_(False)
