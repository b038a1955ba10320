"""ImageReward: BLIP with a linear head, its published state dict run by transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gardo.rewards.base import Backbone, Reward, RewardSpec
from gardo.rewards.heads import LinearHead
from gardo.rewards.objects import finite_images
from gardo.rewards.preprocess import ImageTransform, check_batch
from gardo.rewards.pretrained import (
    compute_dtype,
    load_file,
    load_part,
    load_state,
    load_weights,
    shared,
)
from gardo.types import RewardOutput, UserError

IMAGEREWARD = "THUDM/ImageReward"
WEIGHTS_NAME = "ImageReward.pt"
BERT = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the scores in training
MAX_TOKENS = 35
HEAD_WIDTH = 64  # of the attention heads in both towers; no weight tells it

# In the file, but not in the score: projections of BLIP's contrastive loss.
UNUSED = ("vision_proj.weight", "vision_proj.bias", "text_proj.weight", "text_proj.bias")


class ImageRewardReward(Reward):
    """Human preference for the image given the prompt (Xu et al., arXiv 2304.05977).

    Standardised over the training set: about -2 to 2, mean 0.
    """

    spec: ClassVar[RewardSpec] = RewardSpec(batch_size=32)
    backbones = (Backbone("BLIP-L", 2 * 0.45e9),)

    def __init__(
        self,
        device: torch.device | str = "cpu",
        path: str = IMAGEREWARD,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        tokenizer: str = BERT,
    ) -> None:
        """Load ImageReward.

        Args:
            device: where it computes.
            path: hub id, folder that holds ``ImageReward.pt``, or a file of that format.
            dtype: fp32, fp16 or bf16; None: fp16 on CUDA, fp32 on CPU. The head is in fp32.
            revision: hub revision.
            tokenizer: hub id or folder of BERT's uncased tokenizer.

        Raises:
            UserError: a file is missing, or its weights are not those of the model, each of them.
        """
        compute = compute_dtype(dtype, device)
        self.device = torch.device(device)

        def load() -> tuple[ImageRewardModel, Any]:
            file = load_file(path, IMAGEREWARD, WEIGHTS_NAME, revision)
            model = load_image_reward(load_weights(file), file).to(compute)
            model.mlp.float()
            vocabulary = model.text.config.vocab_size
            words = load_part("BertTokenizer", tokenizer)
            if len(words) not in (vocabulary, vocabulary - 2):  # BLIP adds [DEC] and [ENC]
                raise UserError(
                    f"'{tokenizer}': expected a tokenizer of {vocabulary - 2} tokens, as "
                    f"ImageReward's text encoder has, got {len(words)}"
                )
            return model.to(device).eval().requires_grad_(False), words

        key = ("imagereward", path, revision, tokenizer, str(self.device), compute)
        self.model, self.tokenizer = shared(key, load)
        side = self.model.vision.config.image_size
        self.transform = ImageTransform(size=side, crop=(side, side))

    @torch.inference_mode()
    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> RewardOutput:
        check_batch(images, prompts)
        if not len(images):
            return RewardOutput(torch.zeros(0, device=images.device))
        safe, finite = finite_images(images.to(self.device))
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(self.device)
        scores = self.model(self.transform(safe), tokens["input_ids"], tokens["attention_mask"])
        return RewardOutput(scores.where(finite, torch.nan).to(images.device))


class ImageRewardModel(nn.Module):
    """BLIP's vision tower, its text encoder with cross attention to it, and the head.

    Attributes:
        vision: transformers' ``BlipVisionModel``.
        text: transformers' ``BlipTextModel``.
        mlp: `LinearHead` on the first token.
    """

    def __init__(self, vision: dict[str, Any], text: dict[str, Any]) -> None:
        """Build the towers from arguments of ``BlipVisionConfig`` and ``BlipTextConfig``."""
        super().__init__()
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        self.vision: Any = BlipVisionModel(BlipVisionConfig(**vision))
        self.text: Any = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        self.mlp = LinearHead(text["hidden_size"])

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Standardised scores ``[B]`` float32 of normalised pixels and tokens."""
        seen = self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
        read = self.text(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen
        ).last_hidden_state
        return (self.mlp(read[:, 0].float()) - MEAN) / STD


def load_image_reward(state: dict[str, Tensor], file: Path) -> ImageRewardModel:
    """The model from the published state dict; sizes come from the shapes.

    Raises:
        UserError: unknown or missing keys, or shapes that do not fit each other.
    """
    positions = state.get("blip.text_encoder.embeddings.position_ids")
    if positions is not None and not torch.equal(positions[0], torch.arange(positions.shape[1])):
        raise UserError(f"'{file}': position_ids: expected 0, 1, 2, ..., got another order")
    weights = {
        key: tensor
        for key, tensor in state.items()
        if key.removeprefix("blip.") not in (*UNUSED, "text_encoder.embeddings.position_ids")
    }
    model = ImageRewardModel(**_sizes(weights, file))
    load_state(model, transformers_keys(weights), file)
    return model


def transformers_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published keys to those of `ImageRewardModel`; unknown ones stay as is."""
    renamed = {}
    for key, tensor in state.items():
        new = key.replace("blip.text_encoder.", "text.")
        for pattern, replacement in _VISION:
            new = re.sub(f"^blip\\.visual_encoder\\.{pattern}", f"vision.{replacement}", new)
        renamed[new] = tensor
    return renamed


_VISION = (
    (r"cls_token$", "embeddings.class_embedding"),
    (r"pos_embed$", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"norm\.", "post_layernorm."),
    (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.fc([12])\.", r"encoder.layers.\1.mlp.fc\2."),
)


def _sizes(state: dict[str, Tensor], file: Path) -> dict[str, dict[str, Any]]:
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    try:
        width, _, patch, _ = state[vision + "patch_embed.proj.weight"].shape
        places = state[vision + "pos_embed"].shape[1] - 1
        vision_mlp = len(state[vision + "blocks.0.mlp.fc1.weight"])
        vocabulary, text_width = state[text + "embeddings.word_embeddings.weight"].shape
        tokens = len(state[text + "embeddings.position_embeddings.weight"])
        text_mlp = len(state[text + "encoder.layer.0.intermediate.dense.weight"])
    except KeyError as error:
        raise UserError(f"'{file}' lacks weights: {error}; expected {WEIGHTS_NAME}") from None

    def layers(pattern: str) -> int:
        return len({match[1] for match in (re.match(pattern, key) for key in state) if match})

    return {
        "vision": {
            "hidden_size": width,
            "intermediate_size": vision_mlp,
            "num_hidden_layers": layers(r"blip\.visual_encoder\.blocks\.(\d+)\."),
            "num_attention_heads": max(width // HEAD_WIDTH, 1),
            "image_size": math.isqrt(places) * patch,
            "patch_size": patch,
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
        },
        "text": {
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "encoder_hidden_size": width,
            "intermediate_size": text_mlp,
            "num_hidden_layers": layers(r"blip\.text_encoder\.encoder\.layer\.(\d+)\."),
            "num_attention_heads": max(text_width // HEAD_WIDTH, 1),
            "max_position_embeddings": tokens,
            "layer_norm_eps": 1e-12,
            "hidden_act": "gelu",
            "pad_token_id": 0,
            "is_decoder": True,  # what gives the layers their cross attention; it is not causal
        },
    }
