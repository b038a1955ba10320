"""ImageReward from its published state dict, against BLIP written down as published."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gardo.rewards.base import Reward
from gardo.rewards.imagereward import WEIGHTS_NAME
from gardo.rewards.registry import build_reward
from gardo.types import UserError
from tests.rewards import tiny_models as tm

VISION, TEXT = 64, 128  # one and two heads of 64


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention over heads of 64; ``mask`` [B, keys] is 0 at padding."""
    heads = [x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v)]
    weights = heads[0] @ heads[1].transpose(-1, -2) / 8
    if mask is not None:
        weights = weights + (1.0 - mask[:, None, None].float()) * -10000.0
    return (weights.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)


def modules(**parts: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


class VisionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(VISION, eps=1e-6) for _ in range(2))
        self.attn = modules(qkv=nn.Linear(VISION, 3 * VISION), proj=nn.Linear(VISION, VISION))
        self.mlp = modules(fc1=nn.Linear(VISION, 96), fc2=nn.Linear(96, VISION))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn.proj(attend(*self.attn.qkv(self.norm1(x)).chunk(3, dim=-1)))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class VisualEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = modules(proj=nn.Conv2d(3, VISION, 8, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, VISION))
        self.pos_embed = nn.Parameter(torch.zeros(1, (tm.SIDE // 8) ** 2 + 1, VISION))
        self.blocks = nn.ModuleList(VisionBlock() for _ in range(2))
        self.norm = nn.LayerNorm(VISION, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Attention(nn.Module):
    def __init__(self, source: int) -> None:
        super().__init__()
        self.self = modules(
            query=nn.Linear(TEXT, TEXT), key=nn.Linear(source, TEXT), value=nn.Linear(source, TEXT)
        )
        self.output = modules(dense=nn.Linear(TEXT, TEXT), LayerNorm=nn.LayerNorm(TEXT, eps=1e-12))

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        read = attend(self.self.query(x), self.self.key(source), self.self.value(source), mask)
        return self.output.LayerNorm(self.output.dense(read) + x)


class TextLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.crossattention = Attention(TEXT), Attention(VISION)
        self.intermediate = modules(dense=nn.Linear(TEXT, 80))
        self.output = modules(dense=nn.Linear(80, TEXT), LayerNorm=nn.LayerNorm(TEXT, eps=1e-12))

    def forward(self, x: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, x, mask), seen, None)
        return self.output.LayerNorm(self.output.dense(F.gelu(self.intermediate.dense(x))) + x)


class Blip(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.visual_encoder = VisualEncoder()
        self.text_encoder = modules(
            embeddings=modules(
                word_embeddings=nn.Embedding(words, TEXT),
                position_embeddings=nn.Embedding(40, TEXT),
                LayerNorm=nn.LayerNorm(TEXT, eps=1e-12),
            ),
            encoder=modules(layer=nn.ModuleList(TextLayer() for _ in range(2))),
        )
        self.text_encoder.embeddings.register_buffer("position_ids", torch.arange(40)[None])
        self.vision_proj, self.text_proj = nn.Linear(VISION, 6), nn.Linear(TEXT, 6)


class Published(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.blip = Blip(words)
        sizes = [(TEXT, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)]
        layers = {str(i): nn.Linear(*s) for i, s in zip((0, 2, 4, 6, 7), sizes, strict=True)}
        self.mlp = modules(layers=nn.ModuleDict(layers))

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        seen, text = self.blip.visual_encoder(pixels), self.blip.text_encoder
        places = text.embeddings.position_embeddings.weight[: tokens.shape[1]]
        x = text.embeddings.LayerNorm(text.embeddings.word_embeddings(tokens) + places)
        for layer in text.encoder.layer:
            x = layer(x, mask, seen)
        x = x[:, 0]
        for layer in self.mlp.layers.values():
            x = layer(x)
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Published]:
    folder = tmp_path_factory.mktemp("imagereward")
    words = tm.bert_folder(folder / "words")
    model = Published(len(BertTokenizer.from_pretrained(words)) + 2)  # and [DEC], [ENC]
    tm.randomise(model.blip, seed=8)
    torch.save(model.state_dict(), folder / WEIGHTS_NAME)
    return folder / WEIGHTS_NAME, words, model.eval()


@pytest.fixture(scope="module")
def reward(published: tuple[Path, Path, Published]) -> Reward:
    return build_reward("imagereward", path=str(published[0]), tokenizer=str(published[1]))


def test_the_keys_are_the_published_ones(published: tuple[Path, Path, Published]) -> None:
    keys = set(torch.load(published[0], weights_only=True))
    assert {
        "blip.visual_encoder.blocks.1.attn.qkv.weight",
        "blip.visual_encoder.patch_embed.proj.bias",
        "blip.text_encoder.embeddings.position_ids",
        "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight",
        "blip.text_encoder.encoder.layer.1.output.LayerNorm.bias",
        "blip.vision_proj.weight",
        "mlp.layers.7.weight",
    } <= keys


def test_scores_are_the_published_ones(
    reward: Reward, published: tuple[Path, Path, Published]
) -> None:
    _, folder, model = published
    words = BertTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": tm.SIDE}, crop_size={"height": tm.SIDE, "width": tm.SIDE}
    )
    expected = []
    with torch.no_grad():
        for picture, prompt in zip(tm.pictures(tm.images()), tm.PROMPTS, strict=True):
            tokens = words(
                prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
            )
            pixels = processor(picture, return_tensors="pt")["pixel_values"]
            expected.append(model(pixels, tokens["input_ids"], tokens["attention_mask"]))
    torch.testing.assert_close(tm.score(reward), torch.cat(expected), rtol=0, atol=2e-5)


def test_any_batch(reward: Reward) -> None:
    tm.check_reward(reward)


def test_the_prompt_matters(reward: Reward) -> None:
    batch = tm.images(1).expand(2, -1, -1, -1)
    first, second = tm.score(reward, batch, ["three red circles", "two blue squares"]).tolist()
    assert not math.isclose(first, second, abs_tol=1e-4)


def test_every_key_is_accounted_for(
    published: tuple[Path, Path, Published], tmp_path: Path
) -> None:
    _, words, model = published
    file = tmp_path / "changed.pt"

    def build(**changes: Tensor | None) -> None:
        state = {k: v for k, v in {**model.state_dict(), **changes}.items() if v is not None}
        torch.save(state, file)
        build_reward("imagereward", path=str(file), tokenizer=str(words))

    with pytest.raises(UserError, match="holds unknown weights: 'blip.itm_head.weight'"):
        build(**{"blip.itm_head.weight": torch.zeros(2, TEXT)})
    with pytest.raises(UserError, match="lacks weights: 'text.encoder.layer.1.crossattention"):
        build(**{"blip.text_encoder.encoder.layer.1.crossattention.self.key.bias": None})
    with pytest.raises(UserError, match="lacks weights: 'blip.visual_encoder.pos_embed'"):
        build(**{"blip.visual_encoder.pos_embed": None})
    with pytest.raises(UserError, match="lacks weights: 'mlp.layers.0.weight'"):
        build(**{"mlp.layers.0.weight": None})
    with pytest.raises(UserError, match="position_ids: expected 0, 1, 2"):
        build(**{"blip.text_encoder.embeddings.position_ids": torch.ones(1, 40, dtype=torch.long)})
    with pytest.raises(UserError, match="hf download THUDM/ImageReward ImageReward.pt"):
        build_reward("imagereward", path=str(tmp_path), tokenizer=str(words))
    more = torch.zeros(500, TEXT)
    with pytest.raises(UserError, match="expected a tokenizer of 498 tokens"):
        build(**{"blip.text_encoder.embeddings.word_embeddings.weight": more})
