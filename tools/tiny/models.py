"""Tiny pipelines of the real diffusers classes, at random weights.

``build_sd3_pipeline`` is the architecture of the embedded model; ``build_flux_pipeline`` is its
counterpart for tests of the Flux family. Both are built from configuration alone, without a
network, in about a second.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from gardo.tiny.scenes import IMAGE_SIZE
from tools.tiny.vocabulary import T5_SPACE, clip_tokenizer, t5_tokenizer, word_embeddings

LATENT_CHANNELS = 4
VAE_CHANNELS = (16, 32)  # two levels: one halving of the side
CLIP_WIDTH = 32
T5_WIDTH = 64  # at least the two CLIP widths together

_Pipeline = TypeVar("_Pipeline", StableDiffusion3Pipeline, FluxPipeline)


def build_sd3_pipeline(
    seed: int = 0, num_layers: int = 4, num_heads: int = 4, head_dim: int = 32
) -> StableDiffusion3Pipeline:
    """A random ``StableDiffusion3Pipeline`` for ``IMAGE_SIZE`` images, float32, in eval mode.

    The defaults give a transformer of about 2.3 M parameters. The same seed gives the same weights,
    whatever the state of the global generator, which is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = num_heads * head_dim
        latent_size = IMAGE_SIZE // 2
        transformer = SD3Transformer2DModel(
            sample_size=latent_size,
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=num_layers,
            num_attention_heads=num_heads,
            attention_head_dim=head_dim,
            joint_attention_dim=T5_WIDTH,
            caption_projection_dim=width,
            pooled_projection_dim=2 * CLIP_WIDTH,
            pos_embed_max_size=latent_size,
            qk_norm="rms_norm",
        )
        clip, t5 = clip_tokenizer(), t5_tokenizer()
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vae(),
            text_encoder=_clip_encoder(clip, with_projection=True),
            tokenizer=clip,
            text_encoder_2=_clip_encoder(clip, with_projection=True),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=_t5_encoder(t5),
            tokenizer_3=t5,
        )
    return _in_eval_mode(pipeline)


def build_flux_pipeline(
    seed: int = 0,
    num_layers: int = 2,
    num_single_layers: int = 2,
    guidance_embeds: bool = True,
) -> FluxPipeline:
    """A random ``FluxPipeline`` for small images, float32, in eval mode.

    Same tokenizers, autoencoder and T5 as :func:`build_sd3_pipeline`; two heads of 32; dynamic
    shifting as FLUX.1-dev.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * LATENT_CHANNELS,  # the pipeline packs 2x2 latents into a token
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(8, 12, 12),
        )
        clip, t5 = clip_tokenizer(), t5_tokenizer()
        pipeline = FluxPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_vae(),
            text_encoder=_clip_encoder(clip, with_projection=False),
            tokenizer=clip,
            text_encoder_2=_t5_encoder(t5),
            tokenizer_2=t5,
        )
    return _in_eval_mode(pipeline)


def zero_initialize(transformer: SD3Transformer2DModel) -> None:
    """Zero the modulation and output layers, so that every block starts as the identity.

    The initialisation of DiT (Peebles and Xie 2023, "adaLN-Zero"), which diffusers leaves out and
    without which the model hardly trains.
    """
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and ("norm1" in name or "norm_out" in name):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)


def pipeline_modules(pipeline: StableDiffusion3Pipeline | FluxPipeline) -> dict[str, nn.Module]:
    """The pipeline's components that have weights, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def save_pipeline(pipeline: StableDiffusion3Pipeline | FluxPipeline, folder: Path) -> None:
    """Save the pipeline as float16 safetensors, leaving the given one as it is.

    Plain ``from_pretrained(folder)`` gives float32 modules throughout: diffusers does so by itself,
    transformers when the configuration says so.
    """
    halves = {
        name: copy.deepcopy(part).half() if isinstance(part, nn.Module) else part
        for name, part in pipeline.components.items()
    }
    type(pipeline)(**halves).save_pretrained(folder, safe_serialization=True)
    for config_file in folder.glob("text_encoder*/config.json"):
        config = json.loads(config_file.read_text())
        config["dtype"] = "float32"
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)  # transformers writes them readable by the owner alone


def _in_eval_mode(pipeline: _Pipeline) -> _Pipeline:
    # Freshly built modules are in train mode, where T5's dropout makes the images random.
    for module in pipeline_modules(pipeline).values():
        module.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _vae() -> AutoencoderKL:
    levels = len(VAE_CHANNELS)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def _clip_encoder(
    tokenizer: CLIPTokenizer, with_projection: bool
) -> CLIPTextModelWithProjection | CLIPTextModel:
    """A random CLIP text encoder that the pipeline can condition on without training it."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=4 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # Large enough that the words reach the pooled vector, which is read at the end token.
        initializer_factor=2.0,
    )
    encoder = CLIPTextModelWithProjection(config) if with_projection else CLIPTextModel(config)
    words = [token.removesuffix("</w>") for token in _tokens_in_order(tokenizer)]
    embeddings = encoder.get_input_embeddings()
    generator = _fork_generator()
    with torch.no_grad():
        embeddings.weight.copy_(word_embeddings(words, CLIP_WIDTH, generator))
    return encoder


def _t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A T5 encoder whose output at a token is that token's embedding, and zero at padding.

    The pipeline runs T5 without an attention mask and pads to ``max_sequence_length``, so a random
    T5 would encode a prompt differently for every length. Zero residual branches rule that out.
    """
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=16,
        d_ff=2 * T5_WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    encoder = T5EncoderModel(config)
    words = [token.removeprefix(T5_SPACE) for token in _tokens_in_order(tokenizer)]
    generator = _fork_generator()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith(("SelfAttention.o.weight", "DenseReluDense.wo.weight")):
                parameter.zero_()
        table = word_embeddings(words, T5_WIDTH, generator)
        table[tokenizer.pad_token_id] = 0
        encoder.get_input_embeddings().weight.copy_(table)
    return encoder


def _tokens_in_order(tokenizer: CLIPTokenizer | T5Tokenizer) -> list[str]:
    vocab: dict[str, int] = tokenizer.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)


def _fork_generator() -> torch.Generator:
    """A generator seeded from the global one, which the builders have seeded."""
    seed = int(torch.randint(2**31, ()).item())
    return torch.Generator().manual_seed(seed)
