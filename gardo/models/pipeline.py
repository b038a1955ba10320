"""What the families share: a frozen diffusers pipeline with a counter of transformer rows."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor

from gardo.families import FAMILIES
from gardo.types import UserError


class PipelineModel:
    """Base of the families; see `gardo.models.base.FlowModel` for the interface."""

    family: ClassVar[str]

    def __init__(self, pipeline: Any, device: torch.device, max_sequence_length: int) -> None:
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval()
        self.pipeline = pipeline
        self.transformer = pipeline.transformer
        self.module: Any = pipeline.transformer
        self.device = device
        self.max_sequence_length = max_sequence_length
        self.dtype: torch.dtype = pipeline.transformer.dtype
        self.rows = 0

    def autocast(self) -> AbstractContextManager[None]:
        """float32 LoRA parameters and master weights work in the frozen parts' precision."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def place(self, transformer: bool = True) -> None:
        """Bring transformer and VAE to the device."""
        if transformer:
            self.transformer.to(self.device)
        self.pipeline.vae.to(self.device)

    def place_text_encoders(self) -> None:
        """Bring the text encoders to the device, where they need room for a while only.

        Raises:
            RuntimeError: `release_text_encoders` was called.
        """
        for name in FAMILIES[self.family].text_encoders:
            encoder = getattr(self.pipeline, name)
            if encoder is None:
                raise RuntimeError(
                    "the text encoders were released before all prompts were encoded"
                )
            encoder.to(self.device)

    def release_text_encoders(self, place_transformer: bool = True) -> None:
        for name in FAMILIES[self.family].text_encoders:
            setattr(self.pipeline, name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.place(place_transformer)

    def compile_blocks(self) -> None:
        """torch.compile each transformer block, which compiles once for all blocks of a kind."""
        for name in FAMILIES[self.family].blocks:
            for block in getattr(self.transformer, name):
                block.compile()

    @torch.inference_mode()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode ``[B, C, h, w]`` latents to images in [0, 1], float32."""
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        images = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def save_lora(self, folder: str, weights: dict[str, Tensor], lora_config: dict) -> None:
        self.pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=weights,
            # without it a loader takes alpha = rank and the images differ
            transformer_lora_adapter_metadata=lora_config,
        )


def check_resolution(resolution: int, unit: int, largest: int | None = None) -> None:
    """Raise UserError unless the image side is a multiple of ``unit`` up to ``largest``."""
    if resolution % unit or (largest is not None and resolution > largest):
        limit = "" if largest is None else f" up to {largest}"
        raise UserError(
            f"sampling.resolution: expected a multiple of {unit}{limit} for this model, "
            f"got {resolution}"
        )
