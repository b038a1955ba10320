"""mPLUG-Owl2 (arXiv 2311.04257), as far as scoring needs it: one prompt, one image, one forward.

transformers has no such model, and the code that its checkpoints bring runs with transformers 4
only. Module names are those of the checkpoints' keys. Shapes: ``B`` images, ``P`` patches, ``Q``
queries, ``N`` tokens of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class VisionSizes:
    """Vision tower; the defaults are those of the published configuration class."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class AbstractorSizes:
    """Abstractor, which sums up the patches in a few tokens."""

    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    num_learnable_queries: int = 64
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class LanguageSizes:
    """LLaMA 2."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    vocab_size: int = 32000
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0


def sizes(kind: type[T], config: Mapping[str, Any]) -> T:
    """The fields of ``kind`` from a configuration; the others stay at their defaults."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{key: value for key, value in config.items() if key in names})


class MPlugOwl2(nn.Module):
    """Next-token logits after a text that contains one image."""

    def __init__(
        self, language: LanguageSizes, vision: VisionSizes, abstractor: AbstractorSizes
    ) -> None:
        """Build the model; its state dict has the published keys."""
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(language.vocab_size, language.hidden_size)
        self.model.vision_model = _Vision(vision)
        self.model.visual_abstractor = _Abstractor(abstractor, vision, language.hidden_size)
        self.model.layers = nn.ModuleList(
            _Layer(language) for _ in range(language.num_hidden_layers)
        )
        self.model.norm = nn.RMSNorm(language.hidden_size, eps=language.rms_norm_eps)
        self.lm_head = nn.Linear(language.hidden_size, language.vocab_size, bias=False)
        self.head_width = language.hidden_size // language.num_attention_heads
        self.rope_theta = language.rope_theta

    def forward(self, before: Tensor, pixels: Tensor, after: Tensor) -> Tensor:
        """Logits of the token that follows.

        Args:
            before: token ids ``[n]`` in front of the image.
            pixels: ``[B, 3, H, W]`` normalised.
            after: token ids ``[m]`` behind the image.

        Returns:
            ``[B, vocabulary]`` float32.
        """
        parts: Any = self.model
        seen = parts.visual_abstractor(parts.vision_model(pixels))
        texts = [parts.embed_tokens(ids).expand(len(seen), -1, -1) for ids in (before, after)]
        x = torch.cat([texts[0], seen, texts[1]], dim=1)
        image = slice(len(before), len(before) + seen.shape[1])
        rotation = _rotation(x.shape[1], self.head_width, self.rope_theta, x)
        for layer in parts.layers:
            x = layer(x, image, rotation)
        logits: Tensor = self.lm_head(parts.norm(x[:, -1]))
        return logits.float()


def _heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(-3, -2)


class _VisionAttention(nn.Module):
    def __init__(self, s: VisionSizes) -> None:
        super().__init__()
        self.count = s.num_attention_heads
        self.query_key_value = nn.Linear(s.hidden_size, 3 * s.hidden_size)
        self.dense = nn.Linear(s.hidden_size, s.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # in each head's part of the projection lie its query, key and value
        mixed = self.query_key_value(x).unflatten(-1, (self.count, 3, -1)).movedim(-2, 0)
        query, key, value = mixed.transpose(2, 3)
        read = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.dense(read.transpose(1, 2).flatten(2))
        return out


class _VisionLayer(nn.Module):
    def __init__(self, s: VisionSizes) -> None:
        super().__init__()
        self.self_attn = _VisionAttention(s)
        self.input_layernorm = nn.LayerNorm(s.hidden_size, eps=s.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(s.hidden_size, eps=s.layer_norm_eps)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(s.hidden_size, s.intermediate_size)
        self.mlp.fc2 = nn.Linear(s.intermediate_size, s.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        mlp: Any = self.mlp
        x = x + self.self_attn(self.input_layernorm(x))
        wide = mlp.fc1(self.post_attention_layernorm(x))
        out: Tensor = x + mlp.fc2(wide * torch.sigmoid(1.702 * wide))
        return out


class _Vision(nn.Module):
    def __init__(self, s: VisionSizes) -> None:
        super().__init__()
        places = (s.image_size // s.patch_size) ** 2 + 1
        self.embeddings = nn.Module()
        self.embeddings.cls_token = nn.Parameter(torch.zeros(1, 1, s.hidden_size))
        self.embeddings.position_embedding = nn.Parameter(torch.zeros(1, places, s.hidden_size))
        self.embeddings.patch_embed = nn.Conv2d(
            3, s.hidden_size, s.patch_size, s.patch_size, bias=False
        )
        self.embeddings.pre_layernorm = nn.LayerNorm(s.hidden_size, eps=s.layer_norm_eps)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(_VisionLayer(s) for _ in range(s.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(s.hidden_size, eps=s.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, P + 1, hidden]``: class token and patches."""
        first: Any = self.embeddings
        encoder: Any = self.encoder
        patches = first.patch_embed(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([first.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        x = first.pre_layernorm(x + first.position_embedding)
        for layer in encoder.layers:
            x = layer(x)
        out: Tensor = self.post_layernorm(x)
        return out


class _AbstractorAttention(nn.Module):
    """Queries attend to themselves and to the patches, whose positions are added to the keys."""

    def __init__(self, s: AbstractorSizes, vision: VisionSizes) -> None:
        super().__init__()
        self.count = s.num_attention_heads
        places = (vision.image_size // vision.patch_size) ** 2 + 1
        self.query = nn.Linear(s.hidden_size, s.hidden_size)
        self.key = nn.Linear(vision.hidden_size, s.hidden_size)
        self.value = nn.Linear(vision.hidden_size, s.hidden_size)
        self.q_pos_embed: Tensor
        self.k_pos_embed: Tensor
        self.register_buffer("q_pos_embed", torch.zeros(s.num_learnable_queries, s.hidden_size))
        self.register_buffer("k_pos_embed", torch.zeros(places, s.hidden_size))

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        source = torch.cat([queries, patches], dim=1)
        query = self.query(queries + self.q_pos_embed)
        key = self.key(source + torch.cat([self.q_pos_embed, self.k_pos_embed]))
        query, key, value = (_heads(x, self.count) for x in (query, key, self.value(source)))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class _AbstractorLayer(nn.Module):
    def __init__(self, s: AbstractorSizes, vision: VisionSizes) -> None:
        super().__init__()
        cross = self.crossattention = nn.Module()
        cross.attention = _AbstractorAttention(s, vision)
        cross.norm1 = nn.LayerNorm(s.hidden_size)
        cross.normk = nn.LayerNorm(vision.hidden_size)
        output = cross.output = nn.Module()
        output.out_proj = nn.Linear(s.hidden_size, s.hidden_size)
        output.norm2 = nn.LayerNorm(s.hidden_size)
        mlp = output.mlp = nn.Module()
        mlp.w1 = nn.Linear(s.hidden_size, s.intermediate_size)
        mlp.w2 = nn.Linear(s.intermediate_size, s.hidden_size)
        mlp.w3 = nn.Linear(s.hidden_size, s.intermediate_size)
        mlp.ffn_ln = nn.LayerNorm(s.intermediate_size, eps=s.layer_norm_eps)

    def forward(self, x: Tensor, patches: Tensor) -> Tensor:
        cross: Any = self.crossattention
        output, mlp = cross.output, cross.output.mlp
        x = cross.norm1(x)  # the residual runs from here
        x = x + output.out_proj(cross.attention(x, cross.normk(patches)))
        y = output.norm2(x)
        out: Tensor = x + mlp.w2(mlp.ffn_ln(F.silu(mlp.w1(y)) * mlp.w3(y)))
        return out


class _Abstractor(nn.Module):
    def __init__(self, s: AbstractorSizes, vision: VisionSizes, width: int) -> None:
        super().__init__()
        self.query_embeds = nn.Parameter(torch.zeros(1, s.num_learnable_queries, s.hidden_size))
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, width))
        self.visual_fc = nn.Linear(s.hidden_size, width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            _AbstractorLayer(s, vision) for _ in range(s.num_hidden_layers)
        )

    def forward(self, patches: Tensor) -> Tensor:
        """``[B, Q + 1, width of the language model]``: the queries and an end."""
        encoder: Any = self.encoder
        x: Tensor = self.query_embeds.expand(len(patches), -1, -1)
        for layer in encoder.layers:
            x = layer(x, patches)
        return torch.cat([self.visual_fc(x), self.vit_eos.expand(len(x), -1, -1)], dim=1)


class _ByModality(nn.Module):
    """One module for text (0), one for the tokens of the image (1)."""

    def __init__(self, text: nn.Module, image: nn.Module) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([text, image])

    def forward(self, x: Tensor, image: slice) -> Tensor:
        text, seen = self.multiway
        parts = (
            text(x[:, : image.start]),
            seen(x[:, image.start : image.stop]),
            text(x[:, image.stop :]),
        )
        return torch.cat(parts, dim=1)


class _Layer(nn.Module):
    def __init__(self, s: LanguageSizes) -> None:
        super().__init__()
        self.count = s.num_attention_heads
        self.kv_count = s.num_key_value_heads or s.num_attention_heads
        kv_width = s.hidden_size // self.count * self.kv_count

        def norms() -> _ByModality:
            pair = (nn.RMSNorm(s.hidden_size, eps=s.rms_norm_eps) for _ in range(2))
            return _ByModality(*pair)

        def projections() -> _ByModality:
            return _ByModality(*(nn.Linear(s.hidden_size, kv_width, bias=False) for _ in range(2)))

        self.input_layernorm, self.post_attention_layernorm = norms(), norms()
        attention = self.self_attn = nn.Module()
        attention.q_proj = nn.Linear(s.hidden_size, s.hidden_size, bias=False)
        attention.k_proj, attention.v_proj = projections(), projections()
        attention.o_proj = nn.Linear(s.hidden_size, s.hidden_size, bias=False)
        mlp = self.mlp = nn.Module()
        mlp.gate_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        mlp.up_proj = nn.Linear(s.hidden_size, s.intermediate_size, bias=False)
        mlp.down_proj = nn.Linear(s.intermediate_size, s.hidden_size, bias=False)

    def forward(self, x: Tensor, image: slice, rotation: tuple[Tensor, Tensor]) -> Tensor:
        attention: Any = self.self_attn
        mlp: Any = self.mlp
        y = self.input_layernorm(x, image)
        query = _rotate(_heads(attention.q_proj(y), self.count), rotation)
        key = _rotate(_heads(attention.k_proj(y, image), self.kv_count), rotation)
        value = _heads(attention.v_proj(y, image), self.kv_count)
        read = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=self.kv_count != self.count
        )
        x = x + attention.o_proj(read.transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x, image)
        out: Tensor = x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
        return out


def _rotation(length: int, width: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[length, width]`` of the rotary embedding, the halves alike."""
    frequencies = theta ** -(torch.arange(0, width, 2, device=like.device).float() / width)
    angles = torch.arange(length, device=like.device).float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * rotation[0] + torch.cat([-second, first], dim=-1) * rotation[1]
