"""Architectures as configurations: what a model is made of, without downloading its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gardo.config import ModelConfig
from gardo.models.loading import FAMILIES, pipeline_class, resolve_path
from gardo.types import UserError

TRANSFORMERS = {"sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}


@dataclass(frozen=True)
class Architecture:
    """The parts of a pipeline as diffusers and transformers configure them.

    Attributes:
        name: short name, such as sd35-medium.
        family: sd3 or flux.
        transformer: arguments of the transformer's class.
        vae: arguments of `diffusers.AutoencoderKL`.
        scheduler: arguments of `diffusers.FlowMatchEulerDiscreteScheduler`.
        text_encoders: component -> class name and arguments of its transformers configuration.
    """

    name: str
    family: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    text_encoders: Mapping[str, tuple[str, Mapping[str, Any]]]

    @property
    def model_class(self) -> Any:
        """The family's `gardo.models.base.FlowModel`."""
        return FAMILIES[self.family][1]

    @property
    def vae_scale(self) -> int:
        """Pixels along a latent's side."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def text_tokens(self) -> int:
        """CLIP tokens in the text sequence that T5's are appended to; 0 for flux."""
        if self.family == "flux":
            return 0
        return int(self.text_encoders["text_encoder"][1].get("max_position_embeddings", 77))


def architecture_names() -> list[str]:
    """Names of the tabulated architectures."""
    return sorted(_HUB)


def architecture(name: str) -> Architecture:
    """A tabulated architecture by name, or the embedded ``tiny`` from its own files."""
    if name == "tiny":
        return read_architecture(Path(resolve_path("builtin:tiny")), name)
    if name not in _HUB:
        raise UserError(
            f"unknown architecture '{name}' (known: {', '.join(architecture_names())}, tiny)"
        )
    return deepcopy(_TABLE[name])


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture that ``model.path`` names, without a download.

    Raises:
        UserError: neither a folder nor a hub id in the table.
    """
    for name, hub_id in _HUB.items():
        if config.path == hub_id:
            return architecture(name)
    on_hub = config.path.count("/") == 1 and not config.path.startswith((".", "/", "~"))
    if on_hub and not Path(config.path).is_dir():
        raise UserError(
            f"model.path '{config.path}': its architecture is not tabulated (known: "
            f"{', '.join(_HUB.values())}); download it and give the folder"
        )
    folder = Path(resolve_path(config.path))
    pipeline_class(str(folder), config)  # one clear message if this is no pipeline
    return read_architecture(folder, "tiny" if config.path == "builtin:tiny" else folder.name)


def read_architecture(folder: Path, name: str) -> Architecture:
    """Read the configurations in a diffusers pipeline folder.

    Raises:
        UserError: a configuration is missing or malformed, or the pipeline is of another class.
    """
    index = _read(folder / "model_index.json")
    family = next((f for f, (c, _) in FAMILIES.items() if c == index.get("_class_name")), None)
    if family is None:
        raise UserError(
            f"model.path '{folder}': expected {' or '.join(c for c, _ in FAMILIES.values())}, "
            f"got a {index.get('_class_name')}"
        )
    encoders = {}
    model_class: Any = FAMILIES[family][1]
    for component in model_class.text_encoders:
        config = _read(folder / component / "config.json")
        encoders[component] = (str(index[component][1]), config)
    return Architecture(
        name=name,
        family=family,
        transformer=_read(folder / "transformer" / "config.json"),
        vae=_read(folder / "vae" / "config.json"),
        scheduler=_read(folder / "scheduler" / "scheduler_config.json"),
        text_encoders=encoders,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model file '{path}' cannot be read: {error}") from None


def build_transformer(architecture: Architecture) -> nn.Module:
    """The transformer with random weights in torch's default dtype and on its default device."""
    import diffusers

    kind: Any = getattr(diffusers, TRANSFORMERS[architecture.family])
    return cast(nn.Module, kind.from_config(dict(architecture.transformer)))


def build_vae(architecture: Architecture) -> nn.Module:
    """The image autoencoder with random weights."""
    from diffusers import AutoencoderKL

    return cast(nn.Module, AutoencoderKL.from_config(dict(architecture.vae)))


def build_text_encoder(architecture: Architecture, component: str) -> nn.Module:
    """A text encoder with random weights, by the pipeline's name of it."""
    import transformers

    class_name, config = architecture.text_encoders[component]
    kind: Any = getattr(transformers, class_name)
    return cast(nn.Module, kind(kind.config_class(**config)))


@dataclass(frozen=True)
class Counts:
    """Numbers of a pipeline's parameters.

    Attributes:
        transformer: parameters of the transformer.
        buffers: what its checkpoint holds besides, such as SD3's table of positions.
        vae: parameters of the autoencoder.
        text_encoders: parameters of all text encoders together.
    """

    transformer: int
    buffers: int
    vae: int
    text_encoders: int


def count_parameters(architecture: Architecture) -> Counts:
    """Count parameters by building every part on the meta device, where nothing is allocated."""
    with torch.device("meta"):
        transformer = build_transformer(architecture)
        vae = build_vae(architecture)
        encoders = [build_text_encoder(architecture, c) for c in architecture.text_encoders]
    return Counts(
        transformer=parameter_count(transformer),
        buffers=sum(t.numel() for t in transformer.state_dict().values())
        - parameter_count(transformer),
        vae=parameter_count(vae),
        text_encoders=sum(parameter_count(encoder) for encoder in encoders),
    )


def parameter_count(module: nn.Module) -> int:
    """Parameters of a module, shared ones once, without buffers."""
    return sum(parameter.numel() for parameter in module.parameters())


# --- the table -----------------------------------------------------------------------------------
# Facts from the models' published config.json files.

_HUB = {
    "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd35-large": "stabilityai/stable-diffusion-3.5-large",
    "flux1-dev": "black-forest-labs/FLUX.1-dev",
}

_CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
_CLIP_BIG_G: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
}
_T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_SD3_ENCODERS = {
    "text_encoder": ("CLIPTextModelWithProjection", _CLIP_L),
    "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_BIG_G),
    "text_encoder_3": ("T5EncoderModel", _T5_XXL),
}
_FLUX_ENCODERS = {
    "text_encoder": ("CLIPTextModel", _CLIP_L),
    "text_encoder_2": ("T5EncoderModel", _T5_XXL),
}


def _vae(scaling_factor: float, shift_factor: float) -> dict[str, Any]:
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 16,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "force_upcast": True,
    }


def _sd3(name: str, layers: int, heads: int, positions: int, dual: int) -> Architecture:
    """SD3.5: heads of 64; the first ``dual`` blocks attend to the image a second time."""
    return Architecture(
        name=name,
        family="sd3",
        transformer={
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": layers,
            "attention_head_dim": 64,
            "num_attention_heads": heads,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 64 * heads,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": positions,
            "dual_attention_layers": tuple(range(dual)),
            "qk_norm": "rms_norm",
        },
        vae=_vae(1.5305, 0.0609),
        scheduler={"num_train_timesteps": 1000, "shift": 3.0},
        text_encoders=_SD3_ENCODERS,
    )


_TABLE = {
    "sd35-medium": _sd3("sd35-medium", layers=24, heads=24, positions=384, dual=13),
    "sd35-large": _sd3("sd35-large", layers=38, heads=38, positions=192, dual=0),
    "flux1-dev": Architecture(
        name="flux1-dev",
        family="flux",
        transformer={
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        },
        vae=_vae(0.3611, 0.1159),
        scheduler={
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        },
        text_encoders=_FLUX_ENCODERS,
    ),
}
