"""The model families, a descriptor each: loading, planning, model cards and tests ask it.

Plain data, readable without torch. How a family computes stands in ``gardo/models/<family>.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Architecture:
    """The parts of a pipeline as diffusers and transformers configure them.

    Attributes:
        name: short name, such as sd35-medium.
        family: a key of `FAMILIES`.
        transformer: arguments of the transformer's class.
        vae: arguments of `diffusers.AutoencoderKL`.
        scheduler: arguments of `diffusers.FlowMatchEulerDiscreteScheduler`.
        text_encoders: component -> class name and arguments of its transformers configuration.
        hub: id of the model on the hub; empty for a folder.
    """

    name: str
    family: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    text_encoders: Mapping[str, tuple[str, Mapping[str, Any]]]
    hub: str = ""

    @property
    def vae_scale(self) -> int:
        """Pixels along a latent's side."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    def inputs(self, rows: int, resolution: int, max_sequence_length: int) -> Shapes:
        """Shapes of the transformer's inputs, as `Family.inputs` gives them."""
        return FAMILIES[self.family].inputs(self, rows, resolution, max_sequence_length)

    def prompt_shapes(self, max_sequence_length: int) -> Shapes:
        """Shapes of one prompt's embeddings."""
        shapes = self.inputs(1, 0, max_sequence_length)  # they do not depend on the resolution
        return {name: shapes[name][1:] for name in FAMILIES[self.family].prompt_inputs}


Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """What the models of a family have in common.

    Attributes:
        name: what ``model.family`` calls it.
        model: ``module:class`` of its `gardo.models.base.FlowModel`.
        pipeline: the pipeline's class in diffusers, as ``model_index.json`` names it.
        transformer: the transformer's class in diffusers.
        blocks: the transformer's lists of blocks.
        text_encoders: the pipeline's components that encode prompts.
        prompt_inputs: the inputs of the transformer that depend on the prompt alone.
        guidance: ``classifier-free``: by a second row for the empty prompt; ``embedded``: the
            transformer is told the scale.
        lora_targets: the modules that get LoRA where a recipe names none.
        inputs: the transformer's inputs by name, from an architecture, the number of rows, the
            side of the images in pixels and ``model.max_sequence_length``.
        architectures: models that can be planned without a download, by their published
            ``config.json`` files.
    """

    name: str
    model: str
    pipeline: str
    transformer: str
    blocks: tuple[str, ...]
    text_encoders: tuple[str, ...]
    prompt_inputs: tuple[str, ...]
    guidance: Literal["classifier-free", "embedded"]
    lora_targets: tuple[str, ...]
    inputs: Callable[[Architecture, int, int, int], Shapes]
    architectures: tuple[Architecture, ...]

    def guided(self, guidance_scale: float) -> bool:
        """Whether a sample takes a second row of the transformer, for the empty prompt."""
        return self.guidance == "classifier-free" and guidance_scale > 1.0


# --- parts that several families share

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


# --- Stable Diffusion 3


def _sd3(name: str, hub: str, layers: int, heads: int, positions: int, dual: int) -> Architecture:
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
        text_encoders={
            "text_encoder": ("CLIPTextModelWithProjection", _CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_BIG_G),
            "text_encoder_3": ("T5EncoderModel", _T5_XXL),
        },
        hub=hub,
    )


def _sd3_inputs(model: Architecture, rows: int, resolution: int, tokens: int) -> Shapes:
    config, side = model.transformer, resolution // model.vae_scale
    # T5's tokens are appended to CLIP's
    tokens += model.text_encoders["text_encoder"][1].get("max_position_embeddings", 77)
    return {
        "hidden_states": (rows, config["in_channels"], side, side),
        "encoder_hidden_states": (rows, tokens, config["joint_attention_dim"]),
        "pooled_projections": (rows, config["pooled_projection_dim"]),
        "timestep": (rows,),
    }


_SD3 = Family(
    name="sd3",
    model="gardo.models.sd3:SD3Model",
    pipeline="StableDiffusion3Pipeline",
    transformer="SD3Transformer2DModel",
    blocks=("transformer_blocks",),
    text_encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
    prompt_inputs=("encoder_hidden_states", "pooled_projections"),
    guidance="classifier-free",
    # the attention projections of the official recipes; the last block has no to_add_out
    lora_targets=(
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    ),
    inputs=_sd3_inputs,
    architectures=(
        _sd3(
            "sd35-medium",
            "stabilityai/stable-diffusion-3.5-medium",
            layers=24,
            heads=24,
            positions=384,
            dual=13,
        ),
        _sd3(
            "sd35-large",
            "stabilityai/stable-diffusion-3.5-large",
            layers=38,
            heads=38,
            positions=192,
            dual=0,
        ),
    ),
)


# --- FLUX.1

_FLUX1_DEV = Architecture(
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
    text_encoders={
        "text_encoder": ("CLIPTextModel", _CLIP_L),
        "text_encoder_2": ("T5EncoderModel", _T5_XXL),
    },
    hub="black-forest-labs/FLUX.1-dev",
)


def _flux_inputs(model: Architecture, rows: int, resolution: int, tokens: int) -> Shapes:
    config = model.transformer
    packed = (resolution // model.vae_scale // 2) ** 2  # a token packs 2 x 2 latents
    shapes: Shapes = {
        "hidden_states": (rows, packed, config["in_channels"]),
        "encoder_hidden_states": (rows, tokens, config["joint_attention_dim"]),
        "pooled_projections": (rows, config["pooled_projection_dim"]),
        "timestep": (rows,),
        "txt_ids": (tokens, 3),
        "img_ids": (packed, 3),
    }
    return shapes | ({"guidance": (rows,)} if config.get("guidance_embeds") else {})


_FLUX = Family(
    name="flux",
    model="gardo.models.flux:FluxModel",
    pipeline="FluxPipeline",
    transformer="FluxTransformer2DModel",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    text_encoders=("text_encoder", "text_encoder_2"),
    prompt_inputs=("encoder_hidden_states", "pooled_projections"),
    guidance="embedded",
    # attention and feed-forward, as the official recipes; single blocks have attention alone
    lora_targets=(
        *_SD3.lora_targets,
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ),
    inputs=_flux_inputs,
    architectures=(_FLUX1_DEV,),
)

FAMILIES = {family.name: family for family in (_SD3, _FLUX)}
