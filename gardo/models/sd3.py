"""Stable Diffusion 3 and 3.5 through diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gardo.models.base import Schedule, Velocity, join
from gardo.types import PromptEmbeds, UserError

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline


class SD3Model:
    """`gardo.models.base.FlowModel` of a `StableDiffusion3Pipeline`."""

    family = "sd3"
    # the attention projections of the official recipes; the last block has no to_add_out
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    def __init__(
        self, pipeline: StableDiffusion3Pipeline, device: torch.device, max_sequence_length: int
    ) -> None:
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval()
        self.pipeline: Any = pipeline.to(device)
        self.transformer = pipeline.transformer
        self.device = device
        self.max_sequence_length = max_sequence_length
        self.dtype = pipeline.transformer.dtype
        self.rows = 0

    @property
    def default_resolution(self) -> int:
        return self.transformer.config.sample_size * self.pipeline.vae_scale_factor

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        scale, config = self.pipeline.vae_scale_factor, self.transformer.config
        unit, largest = scale * config.patch_size, scale * config.pos_embed_max_size
        largest *= config.patch_size
        if resolution % unit or resolution > largest:
            raise UserError(
                f"sampling.resolution: expected a multiple of {unit} up to {largest} for this "
                f"model, got {resolution}"
            )
        return (config.in_channels, resolution // scale, resolution // scale)

    def schedule(self, num_steps: int, resolution: int) -> Schedule:
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(num_steps, device="cpu")
        return Schedule(scheduler.sigmas.float().clone(), scheduler.timesteps.float().clone())

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        if self.pipeline.text_encoder is None:
            raise RuntimeError("the text encoders were released before all prompts were encoded")
        text = list(prompts)
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=text,
            prompt_2=text,
            prompt_3=text,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return PromptEmbeds({"encoder_hidden_states": embeds, "pooled_projections": pooled})

    def velocity(
        self, latents: Tensor, timesteps: Tensor, cond: PromptEmbeds, uncond: PromptEmbeds | None
    ) -> Velocity:
        if uncond is not None:
            latents, timesteps = torch.cat([latents] * 2), torch.cat([timesteps] * 2)
            cond = join(cond, uncond)
        self.rows += len(latents)
        # float32 LoRA parameters (or float32 master weights) work in the frozen parts' precision
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.transformer(
                hidden_states=latents.to(self.dtype),
                timestep=timesteps,
                **cond.tensors,
                return_dict=False,
            )[0]
        if uncond is None:
            return Velocity(out, None)
        v_uncond, v_cond = out.chunk(2)
        return Velocity(v_cond, v_uncond)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        images = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def release_text_encoders(self) -> None:
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            setattr(self.pipeline, name, None)

    def save_lora(self, folder: str, weights: dict[str, Tensor], lora_config: dict) -> None:
        self.pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=weights,
            # without it a loader takes alpha = rank and the images differ
            transformer_lora_adapter_metadata=lora_config,
        )
