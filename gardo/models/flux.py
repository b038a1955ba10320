"""FLUX.1 through diffusers: packed latents, embedded guidance, a schedule that shifts with size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gardo.models.base import Schedule, Velocity
from gardo.models.pipeline import PipelineModel, check_resolution
from gardo.types import PromptEmbeds


class FluxModel(PipelineModel):
    """`gardo.models.base.FlowModel` of a `FluxPipeline`; latents are ``[B, tokens, 4 C]``."""

    family = "flux"

    @property
    def default_resolution(self) -> int:
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        return (self._side(resolution) ** 2, self.transformer.config.in_channels)

    def _side(self, resolution: int) -> int:
        """Tokens along a side of the image; a token packs 2 x 2 latents."""
        unit = 2 * self.pipeline.vae_scale_factor
        check_resolution(resolution, unit)
        return resolution // unit

    def schedule(self, num_steps: int, resolution: int) -> Schedule:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        scheduler = self.pipeline.scheduler
        config = scheduler.config
        mu = calculate_shift(
            self._side(resolution) ** 2,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
        scheduler.set_timesteps(sigmas=sigmas, device="cpu", mu=mu)
        return Schedule(scheduler.sigmas.float().clone(), scheduler.timesteps.float().clone())

    @torch.inference_mode()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        self.place_text_encoders()
        text = list(prompts)
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=text,
            prompt_2=text,
            device=self.device,
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
            raise ValueError("uncond: expected None, because Flux takes guidance as an input")
        batch, tokens = latents.shape[:2]
        self.rows += batch
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((batch,), guidance_scale, device=latents.device)
        hidden = latents.to(self.dtype)
        text_tokens = cond.tensors["encoder_hidden_states"].shape[1]
        with self.autocast():
            out = self.module(
                hidden_states=hidden,
                timestep=timesteps.to(self.dtype) / 1000,
                guidance=guidance,
                **cond.tensors,
                txt_ids=hidden.new_zeros(text_tokens, 3),
                img_ids=self._image_ids(tokens, hidden),
                return_dict=False,
            )[0]
        return Velocity(out)

    def _image_ids(self, tokens: int, like: Tensor) -> Tensor:
        """Row and column of every token, ``[tokens, 3]``, for its rotary embedding."""
        side = round(tokens**0.5)
        place = torch.arange(tokens, device=like.device)
        ids = torch.stack([torch.zeros_like(place), place // side, place % side], dim=1)
        return ids.to(like.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        batch, tokens, channels = latents.shape
        side = round(tokens**0.5)
        grid = latents.view(batch, side, side, channels // 4, 2, 2)
        grid = grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 2 * side, 2 * side)
        return self.decode_latents(grid)
