"""DINOv3 features, in which the diversity of a prompt group is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from gardo.rewards.base import Backbone
from gardo.rewards.features import FeatureExtractor
from gardo.rewards.objects import check_images, finite_images
from gardo.rewards.pretrained import compute_dtype, load_pretrained, load_transform, shared

DINOV3 = "facebook/dinov3-vitl16-pretrain-lvd1689m"


class DINOv3Features(FeatureExtractor):
    """Global feature of a DINOv3 vision transformer (Siméoni et al., arXiv 2508.10104)."""

    name = "dinov3"
    backbones = (Backbone("DINOv3 ViT-L/16", 2 * 0.30e9),)

    def __init__(
        self,
        device: torch.device | str = "cpu",
        path: str = DINOV3,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        pooling: Literal["cls", "mean"] = "cls",
        size: int | None = None,
        batch_size: int = 64,
    ) -> None:
        """Load the model.

        Args:
            device: where it computes.
            path: hub id or folder of a DINOv3 ViT.
            dtype: fp32, fp16 or bf16; None: bf16 on CUDA, fp32 on CPU.
            revision: hub revision.
            pooling: ``cls``, the class token, which DINOv3 is trained for; ``mean`` of the patch
                tokens, which the official GARDO code takes (timm's default for this model).
            size: side in pixels that images are resized to; None: the model's own (224).
            batch_size: largest number of images in one forward.

        Raises:
            UserError: a missing folder or file, a gated repository, another architecture.
            ValueError: another pooling, or a size that is no multiple of the patch.
        """
        if pooling not in ("cls", "mean"):
            raise ValueError(f"pooling: expected cls or mean, got {pooling!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        compute = compute_dtype(dtype, device, "bf16")
        self.device, self.pooling, self.batch_size = torch.device(device), pooling, batch_size
        self.model = shared(
            ("dinov3", path, revision, str(self.device), compute),
            lambda: (
                load_pretrained("DINOv3ViTModel", "dinov3_vit", path, compute, revision)
                .to(device)
                .eval()
                .requires_grad_(False)
            ),
        )
        self.transform = load_transform(path, revision, as_bytes=False)
        patch = self.model.config.patch_size
        if size is not None:
            if size < 1 or size % patch:
                raise ValueError(f"size: expected a multiple of the patch side {patch}, got {size}")
            self.transform = replace(self.transform, size=(size, size), crop=None)
        self.dimension = int(self.model.config.hidden_size)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        parts = (
            [self._encode(part) for part in images.split(self.batch_size)] if len(images) else []
        )
        empty = torch.zeros(0, self.dimension, device=images.device)
        return torch.cat([empty, *parts])

    def _encode(self, images: Tensor) -> Tensor:
        safe, finite = finite_images(images.to(self.device))
        output = self.model(pixel_values=self.transform(safe).to(self.model.dtype))
        if self.pooling == "cls":
            features = output.pooler_output
        else:
            others = 1 + self.model.config.num_register_tokens
            features = output.last_hidden_state[:, others:].mean(dim=1)
        return features.float().where(finite[:, None], torch.nan).to(images.device)
