"""CLIP, shared by the rewards that use it: each checkpoint is loaded once."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gardo.rewards.base import Backbone
from gardo.rewards.objects import check_images, finite_images
from gardo.rewards.preprocess import ImageTransform
from gardo.rewards.pretrained import (
    compute_dtype,
    load_part,
    load_pretrained,
    load_transform,
    shared,
)
from gardo.types import UserError

CLIP_LARGE = "openai/clip-vit-large-patch14"
CLIP_LARGE_BACKBONE = Backbone("CLIP ViT-L/14", 2 * 0.43e9)
MAX_CACHED_TEXTS = 20_000


class ClipBackbone:
    """A CLIP model with its tokenizer and image preprocessing, frozen, in eval mode.

    Safe to call from several threads.

    Attributes:
        model: transformers' ``CLIPModel``.
        device, dtype: where and in what precision it computes.
        logit_scale: the factor that CLIP's logits put on cosines (about 100).
        dimension: ``D``, width of the common embedding space.
    """

    def __init__(
        self, model: Any, tokenizer: Any, transform: ImageTransform, device: torch.device | str
    ) -> None:
        """Take over a loaded ``CLIPModel``; ``tokenizer`` is a ``CLIPTokenizer``."""
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.transform = transform
        self.device = torch.device(device)
        self.dtype: torch.dtype = model.dtype
        self.logit_scale = float(model.logit_scale.float().exp())
        self.dimension: int = model.config.projection_dim
        self._texts: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    @torch.inference_mode()
    def image_features(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: ``[B, 3, H, W]`` floating point in [0, 1], on any device.

        Returns:
            ``[B, D]`` float32 of length 1, on this backbone's device; NaN for a non-finite image.

        Raises:
            TypeError: the images are not floating point.
            ValueError: another shape.
        """
        check_images(images)
        safe, finite = finite_images(images.to(self.device))
        if not len(safe):
            return safe.new_zeros(0, self.dimension)
        pixels = self.transform(safe).to(self.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        features = F.normalize(self.model.visual_projection(pooled).float(), dim=-1)
        return features.where(finite[:, None], torch.nan)

    @torch.inference_mode()
    def text_features(self, texts: list[str]) -> Tensor:
        """Embed texts; each distinct text is encoded once and remembered.

        Longer texts are cut at the model's number of tokens (77).

        Returns:
            ``[B, D]`` float32 of length 1, on this backbone's device.
        """
        if not texts:
            return torch.zeros(0, self.dimension, device=self.device)
        with self._lock:
            new = [text for text in dict.fromkeys(texts) if text not in self._texts]
            if new and len(self._texts) + len(new) > MAX_CACHED_TEXTS:
                self._texts.clear()
                new = list(dict.fromkeys(texts))
            # one at a time: in a batch the last bits depend on the neighbours, and a resumed run,
            # which starts with nothing remembered, would not repeat the scores of the first
            self._texts.update((text, self._encode(text)) for text in new)
            return torch.stack([self._texts[text] for text in texts])

    def _encode(self, text: str) -> Tensor:
        tokens = self.tokenizer(
            [text],
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        pooled = self.model.text_model(input_ids=tokens["input_ids"]).pooler_output
        return F.normalize(self.model.text_projection(pooled)[0].float(), dim=-1)


def clip_backbone(
    path: str = CLIP_LARGE,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    processor: str | None = None,
) -> ClipBackbone:
    """Load a CLIP checkpoint, or return the instance that is loaded already.

    Args:
        path: hub id or folder with ``config.json``, weights, tokenizer and
            ``preprocessor_config.json``.
        device: where it computes.
        dtype: a torch dtype or fp32, fp16, bf16; None: see `compute_dtype`.
        revision: hub revision.
        processor: hub id or folder of the tokenizer and the preprocessing, where ``path`` has none.

    Raises:
        UserError: a missing folder or file, a gated repository, another architecture, unknown
            dtype.
    """
    dtype = compute_dtype(dtype, device)

    def load() -> ClipBackbone:
        model = load_pretrained("CLIPModel", "clip", path, dtype, revision)
        files = processor or path
        at = None if processor else revision
        tokenizer = load_clip_tokenizer(files, model.config.text_config.vocab_size, at)
        return ClipBackbone(model, tokenizer, load_transform(files, at), device)

    return shared(("clip", path, revision, str(torch.device(device)), dtype, processor), load)


def load_clip_tokenizer(path: str, vocabulary: int, revision: str | None = None) -> Any:
    """A ``CLIPTokenizer`` of as many tokens as the model has.

    Raises:
        UserError: a missing folder or file, or another number of tokens.
    """
    tokenizer = load_part("CLIPTokenizer", path, revision)
    if len(tokenizer) != vocabulary:  # transformers makes an empty one where its files are missing
        raise UserError(
            f"'{path}': expected a tokenizer of {vocabulary} tokens, as the model has, got "
            f"{len(tokenizer)}; are tokenizer.json or vocab.json and merges.txt there?"
        )
    return tokenizer
