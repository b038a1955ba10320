"""Human Preference Score v2.1: CLIP ViT-H/14 in open_clip's format, run by transformers."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from gardo.rewards.backbones import CLIP_LARGE, ClipBackbone, load_clip_tokenizer
from gardo.rewards.base import Backbone, RewardSpec
from gardo.rewards.clipscore import ClipCosineReward
from gardo.rewards.preprocess import ImageTransform
from gardo.rewards.pretrained import (
    compute_dtype,
    load_file,
    load_state,
    load_weights,
    shared,
)
from gardo.types import UserError

HPSV2 = "xswu/HPSv2"
WEIGHTS_NAME = "HPS_v2.1_compressed.pt"
VISION_HEAD_WIDTH, TEXT_HEAD_WIDTH = 80, 64  # of open_clip's ViT-H-14; no weight tells them


class HPSv2Reward(ClipCosineReward):
    """Cosine of image and prompt (Wu et al., arXiv 2306.09341), about 0.2 to 0.35.

    The published score, without the logit scale.
    """

    spec: ClassVar[RewardSpec] = RewardSpec(value_range=(-1.0, 1.0), batch_size=32)
    backbones = (Backbone("HPSv2 ViT-H/14", 2 * 0.99e9),)

    def __init__(
        self,
        device: torch.device | str = "cpu",
        path: str = HPSV2,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        tokenizer: str = CLIP_LARGE,
    ) -> None:
        """Load HPSv2.

        Args:
            device: where it computes.
            path: hub id, folder that holds ``HPS_v2.1_compressed.pt``, or a file of that format
                (v2.0 as well).
            dtype: fp32, fp16 or bf16; None: fp16 on CUDA, fp32 on CPU.
            revision: hub revision.
            tokenizer: hub id or folder of CLIP's tokenizer.

        Raises:
            UserError: a file is missing, or its weights are not those of the model, each of them.
        """
        compute = compute_dtype(dtype, device)

        def load() -> ClipBackbone:
            file = load_file(path, HPSV2, WEIGHTS_NAME, revision)
            state = load_weights(file)
            if not isinstance(state.get("state_dict"), dict):
                raise UserError(f"'{file}': expected a dictionary with 'state_dict', got another")
            return open_clip_backbone(state["state_dict"], file, tokenizer, device, compute)

        key = ("hpsv2", path, revision, tokenizer, str(torch.device(device)), compute)
        super().__init__(shared(key, load))


def open_clip_backbone(
    state: dict[str, Tensor],
    file: Path,
    tokenizer: str,
    device: torch.device | str,
    dtype: torch.dtype,
) -> ClipBackbone:
    """A `ClipBackbone` from the state dict of open_clip's ViT-H-14; sizes come from the shapes.

    Raises:
        UserError: unknown or missing keys, or shapes that do not fit each other.
    """
    from transformers import CLIPConfig, CLIPModel

    for key in ("visual.conv1.weight", "visual.positional_embedding", "token_embedding.weight"):
        if key not in state:
            raise UserError(f"'{file}' lacks weights: '{key}'; expected open_clip's ViT-H-14")
    words = load_clip_tokenizer(tokenizer, len(state["token_embedding.weight"]))
    config = CLIPConfig(**_sizes(state, words))
    with torch.device("meta"):
        model: Any = CLIPModel(config)
    model = model.to_empty(device="cpu")
    for module in model.modules():  # the only buffers; they are in no checkpoint
        if hasattr(module, "position_ids"):
            module.position_ids.copy_(torch.arange(module.position_ids.shape[1])[None])
    load_state(model, transformers_keys(state), file)
    side = config.vision_config.image_size
    transform = ImageTransform(size=side, crop=(side, side))
    return ClipBackbone(model.to(dtype), words, transform, device)


def transformers_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename open_clip's keys to those of transformers' ``CLIPModel``; unknown ones stay as is."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        tower, name = (
            ("vision_model", key[7:]) if key.startswith("visual.") else ("text_model", key)
        )
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        if key in _TOP:
            new, transposed = _TOP[key]
            renamed[new] = tensor.T if transposed else tensor
        elif block and block[2].startswith("attn.in_proj_"):
            kind = block[2].removeprefix("attn.in_proj_")  # weight or bias of q, k, v in one
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{tower}.encoder.layers.{block[1]}.self_attn.{letter}_proj.{kind}"] = part
        elif block and block[2].rpartition(".")[0] in _BLOCK:
            module, _, kind = block[2].rpartition(".")
            renamed[f"{tower}.encoder.layers.{block[1]}.{_BLOCK[module]}.{kind}"] = tensor
        else:
            renamed[key] = tensor
    return {key: tensor.contiguous() for key, tensor in renamed.items()}


# open_clip -> (transformers, transposed): projections multiply from the right there
_TOP: dict[str, tuple[str, bool]] = {
    "logit_scale": ("logit_scale", False),
    "text_projection": ("text_projection.weight", True),
    "visual.proj": ("visual_projection.weight", True),
    "positional_embedding": ("text_model.embeddings.position_embedding.weight", False),
    "token_embedding.weight": ("text_model.embeddings.token_embedding.weight", False),
    "ln_final.weight": ("text_model.final_layer_norm.weight", False),
    "ln_final.bias": ("text_model.final_layer_norm.bias", False),
    "visual.class_embedding": ("vision_model.embeddings.class_embedding", False),
    "visual.positional_embedding": ("vision_model.embeddings.position_embedding.weight", False),
    "visual.conv1.weight": ("vision_model.embeddings.patch_embedding.weight", False),
    "visual.ln_pre.weight": ("vision_model.pre_layrnorm.weight", False),
    "visual.ln_pre.bias": ("vision_model.pre_layrnorm.bias", False),
    "visual.ln_post.weight": ("vision_model.post_layernorm.weight", False),
    "visual.ln_post.bias": ("vision_model.post_layernorm.bias", False),
}
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _sizes(state: dict[str, Tensor], tokenizer: Any) -> dict[str, Any]:
    """Arguments of ``CLIPConfig``, from the shapes of the weights."""

    def tower(prefix: str, width: int, head_width: int) -> dict[str, Any]:
        pattern = re.compile(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
        numbers = {int(match[1]) for match in map(pattern.match, state) if match}
        mlp = state.get(f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")
        return {
            "hidden_size": width,
            "num_hidden_layers": len(numbers),
            "num_attention_heads": max(width // head_width, 1),
            "intermediate_size": 4 * width if mlp is None else len(mlp),
            "hidden_act": "gelu",
        }

    vocabulary, text_width = state["token_embedding.weight"].shape
    vision_width, _, patch, _ = state["visual.conv1.weight"].shape
    places = len(state["visual.positional_embedding"]) - 1
    projection = state.get("visual.proj")
    return {
        "projection_dim": vision_width if projection is None else projection.shape[1],
        "text_config": {
            **tower("", text_width, TEXT_HEAD_WIDTH),
            "vocab_size": vocabulary,
            "max_position_embeddings": len(state.get("positional_embedding", torch.empty(77))),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        "vision_config": {
            **tower("visual.", vision_width, VISION_HEAD_WIDTH),
            "image_size": math.isqrt(places) * patch,
            "patch_size": patch,
        },
    }
