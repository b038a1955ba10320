"""HPSv2 from open_clip's state dict, against a CLIP written down as open_clip computes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gardo.rewards.base import Reward
from gardo.rewards.hpsv2 import WEIGHTS_NAME
from gardo.rewards.registry import build_reward
from gardo.types import UserError
from tests.rewards import tiny_models as tm
from tools.tiny.vocabulary import clip_tokenizer

VISION, TEXT, PROJECTION, TOKENS = 160, 128, 20, 16


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


class Tower(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, VISION, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(VISION))
        self.positional_embedding = nn.Parameter(torch.zeros((tm.SIDE // 8) ** 2 + 1, VISION))
        self.ln_pre, self.ln_post = nn.LayerNorm(VISION), nn.LayerNorm(VISION)
        self.transformer = Tower(VISION, 3, 2)
        self.proj = nn.Parameter(torch.zeros(VISION, PROJECTION))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self, words: int) -> None:
        super().__init__()
        self.visual = Visual()
        self.transformer = Tower(TEXT, 2, 2)
        self.token_embedding = nn.Embedding(words, TEXT)
        self.positional_embedding = nn.Parameter(torch.zeros(TOKENS, TEXT))
        self.ln_final = nn.LayerNorm(TEXT)
        self.text_projection = nn.Parameter(torch.zeros(TEXT, PROJECTION))
        self.logit_scale = nn.Parameter(torch.zeros([]))

    def encode_text(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        mask = torch.full((n, n), -torch.inf).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding[:n]
        x = self.ln_final(self.transformer(x, mask))
        return x[:, -1] @ self.text_projection  # unpadded: the last token ends the text


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, OpenClip]:
    folder = tmp_path_factory.mktemp("hpsv2")
    words = clip_tokenizer()
    words.save_pretrained(folder / "words")
    model = OpenClip(len(words))
    tm.randomise(model, seed=4, scale=0.1)
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, folder / WEIGHTS_NAME)
    return folder / WEIGHTS_NAME, folder / "words", model.eval()


@pytest.fixture(scope="module")
def reward(published: tuple[Path, Path, OpenClip]) -> Reward:
    file, words, _ = published
    return build_reward("hpsv2", path=str(file.parent), tokenizer=str(words))


def test_the_keys_are_open_clips(published: tuple[Path, Path, OpenClip]) -> None:
    keys = set(published[2].state_dict())
    assert {
        "visual.transformer.resblocks.2.attn.in_proj_weight",
        "visual.transformer.resblocks.0.attn.out_proj.bias",
        "transformer.resblocks.1.mlp.c_fc.weight",
        "visual.proj",
        "text_projection",
        "logit_scale",
    } <= keys
    assert len(keys) == 14 + 12 * (3 + 2)


def test_scores_are_open_clips(reward: Reward, published: tuple[Path, Path, OpenClip]) -> None:
    _, folder, model = published
    words = CLIPTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": tm.SIDE}, crop_size={"height": tm.SIDE, "width": tm.SIDE}
    )
    expected = []
    with torch.no_grad():
        for picture, prompt in zip(tm.pictures(tm.images()), tm.PROMPTS, strict=True):
            seen = model.visual(processor(picture, return_tensors="pt")["pixel_values"])
            read = model.encode_text(tm.clip_words(words, prompt, TOKENS))
            expected.append(F.cosine_similarity(seen, read))
    torch.testing.assert_close(tm.score(reward), torch.cat(expected), rtol=0, atol=1e-5)


def test_any_batch(reward: Reward) -> None:
    tm.check_reward(reward)


def test_every_key_is_accounted_for(published: tuple[Path, Path, OpenClip], tmp_path: Path) -> None:
    _, words, model = published
    file = tmp_path / "changed.pt"

    def build(**changes: Tensor | None) -> None:
        state = {k: v for k, v in {**model.state_dict(), **changes}.items() if v is not None}
        torch.save({"state_dict": state}, file)
        build_reward("hpsv2", path=str(file), tokenizer=str(words))

    with pytest.raises(UserError, match="holds unknown weights: 'visual.attn_pool.query'"):
        build(**{"visual.attn_pool.query": torch.zeros(1)})
    with pytest.raises(UserError, match="unknown weights: 'transformer.resblocks.0.ls_1.gamma'"):
        build(**{"transformer.resblocks.0.ls_1.gamma": torch.zeros(TEXT)})
    with pytest.raises(UserError, match="lacks weights: 'vision_model.encoder.layers.1.layer_norm"):
        build(**{"visual.transformer.resblocks.1.ln_2.bias": None})
    with pytest.raises(UserError, match="lacks weights: 'visual.conv1.weight'"):
        build(**{"visual.conv1.weight": None})
    with pytest.raises(UserError, match="expected a tokenizer of 90 tokens"):
        build(**{"token_embedding.weight": torch.zeros(90, TEXT)})
    torch.save(model.state_dict(), file)
    with pytest.raises(UserError, match="expected a dictionary with 'state_dict'"):
        build_reward("hpsv2", path=str(file), tokenizer=str(words))
    with pytest.raises(UserError, match=f"hf download xswu/HPSv2 {WEIGHTS_NAME} --local-dir"):
        build_reward("hpsv2", path=str(tmp_path), tokenizer=str(words))
