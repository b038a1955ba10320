"""Tiny checkpoints at random weights in the formats in which the real ones are published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from gardo.rewards.base import Reward
from tools.tiny.vocabulary import FILLERS, WORDS, clip_tokenizer

PROMPTS = [
    "three red circles",
    "a photo of two blue squares",
    "some green thing " * 12,  # longer than any of the tiny models reads
    "three red circles",
    "one",
]
SIDE = 32


def images(count: int = len(PROMPTS), side: int = 48) -> Tensor:
    """Smooth random images whose values are whole bytes, as files hold them."""
    generator = torch.Generator().manual_seed(11)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    noise = 0.1 * torch.randn(fine.shape, generator=generator)
    return ((fine + noise).clamp(0, 1) * 255).round() / 255


def pictures(batch: Tensor) -> list[Image.Image]:
    pixels = (batch * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in pixels]


def randomise(model: torch.nn.Module, seed: int, scale: float = 0.15) -> None:
    """Weights large enough that every part of the model shows in the result."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "logit_scale" in name:
                parameter.fill_(2.5)
            elif "norm" in name.lower() and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(scale * noise)


def clip_folder(folder: Path, seed: int = 0, projection: int = 24) -> Path:
    """A CLIP repository: config.json, weights, tokenizer, preprocessor_config.json."""
    words = clip_tokenizer()
    tower = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=projection,
        text_config={
            **tower,
            "hidden_size": 32,
            "vocab_size": len(words),
            "max_position_embeddings": 16,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": words.pad_token_id,
        },
        vision_config={**tower, "hidden_size": 40, "image_size": SIDE, "patch_size": 8},
    )
    model = CLIPModel(config)
    randomise(model, seed)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    processor = {
        "crop_size": SIDE,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": SIDE,
    }  # as in OpenAI's repositories
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def clip_words(words: CLIPTokenizer, text: str, length: int = 16) -> Tensor:
    """Tokens ``[1, n]`` of one text, without padding."""
    return words([text], truncation=True, max_length=length, return_tensors="pt")["input_ids"]


def bert_folder(folder: Path) -> Path:
    """BERT's uncased tokenizer with a small vocabulary."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *FILLERS]
    words = BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)})
    words.save_pretrained(folder)
    return folder


def dinov3_folder(folder: Path, seed: int = 0) -> Path:
    """A DINOv3 repository with its processor file, as on the hub."""
    config = DINOv3ViTConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        patch_size=8,
        image_size=SIDE,
        num_register_tokens=4,
    )
    model = DINOv3ViTModel(config)
    randomise(model, seed)
    model.save_pretrained(folder)
    processor = {
        "crop_size": None,
        "do_center_crop": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": SIDE, "width": SIDE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def score(reward: Reward, batch: Tensor | None = None, prompts: Sequence[str] = PROMPTS) -> Tensor:
    batch = images() if batch is None else batch
    return reward.score(batch, prompts, [{}] * len(prompts)).scores


def check_reward(reward: Reward, tolerance: float = 1e-5) -> None:
    """What every reward promises: any batch, float32, NaN for broken images, bad input refused."""
    import pytest

    together = score(reward)
    assert together.dtype == torch.float32
    assert together.shape == (len(PROMPTS),)
    assert not together.requires_grad
    assert together.std() > 20 * tolerance  # different images are told apart
    for size in (1, 2):
        parts = [
            score(reward, images()[i : i + size], PROMPTS[i : i + size])
            for i in range(0, len(PROMPTS), size)
        ]
        torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=tolerance)
    order = [3, 0, 4, 2, 1]
    shuffled = score(reward, images()[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=tolerance)
    assert score(reward, images()[:0], []).shape == (0,)

    broken = images()
    broken[1, 2, 3, 4] = torch.nan
    broken[4] = torch.inf
    scores = score(reward, broken)
    assert scores.isnan().tolist() == [False, True, False, False, True]
    torch.testing.assert_close(scores[[0, 2, 3]], together[[0, 2, 3]], rtol=0, atol=tolerance)

    with pytest.raises(ValueError, match=r"images: expected shape \[B, 3, H, W\]"):
        score(reward, images()[0])
    with pytest.raises(TypeError, match="floating point"):
        score(reward, (images() * 255).to(torch.uint8))
    with pytest.raises(ValueError, match="prompts: expected 5 prompts, got 4"):
        score(reward, images(), PROMPTS[:4])
