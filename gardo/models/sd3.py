"""Stable Diffusion 3 and 3.5 through diffusers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gardo.models.base import Schedule, Velocity, join
from gardo.models.pipeline import PipelineModel, check_resolution
from gardo.types import PromptEmbeds


class SD3Model(PipelineModel):
    """`gardo.models.base.FlowModel` of a `StableDiffusion3Pipeline`."""

    family = "sd3"

    @property
    def default_resolution(self) -> int:
        return self.transformer.config.sample_size * self.pipeline.vae_scale_factor

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        scale, config = self.pipeline.vae_scale_factor, self.transformer.config
        unit = scale * config.patch_size
        check_resolution(resolution, unit, unit * config.pos_embed_max_size)
        return (config.in_channels, resolution // scale, resolution // scale)

    def schedule(self, num_steps: int, resolution: int) -> Schedule:
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(num_steps, device="cpu")
        return Schedule(scheduler.sigmas.float().clone(), scheduler.timesteps.float().clone())

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        self.place_text_encoders()
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
        self,
        latents: Tensor,
        timesteps: Tensor,
        cond: PromptEmbeds,
        uncond: PromptEmbeds | None,
        guidance_scale: float,
    ) -> Velocity:
        if uncond is not None:
            latents, timesteps = torch.cat([latents] * 2), torch.cat([timesteps] * 2)
            cond = join(cond, uncond)
        self.rows += len(latents)
        with self.autocast():
            out = self.module(
                hidden_states=latents.to(self.dtype),
                timestep=timesteps,
                **cond.tensors,
                return_dict=False,
            )[0]
        if uncond is None:
            return Velocity(out)
        v_uncond, v_cond = out.chunk(2)
        return Velocity(v_cond, v_uncond, guidance_scale)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decode_latents(latents)
