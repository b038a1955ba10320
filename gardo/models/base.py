"""What an algorithm needs of a text-to-image flow model. Families implement it in a file each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gardo.types import PromptEmbeds


@dataclass(frozen=True)
class Schedule:
    """A descending noise schedule, as the pipeline's own scheduler makes it.

    Attributes:
        sigmas: ``[num_steps + 1]`` float32 on the CPU, the last one 0.
        timesteps: ``[num_steps]`` float32, what the transformer is told at each step.
    """

    sigmas: Tensor
    timesteps: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


class Velocity(NamedTuple):
    """Velocities of the prompt and, with classifier-free guidance, of the empty prompt.

    The kernels take the three as they are; ``guidance_scale`` counts only beside ``uncond``.
    """

    cond: Tensor
    uncond: Tensor | None = None
    guidance_scale: float = 1.0

    @property
    def guided(self) -> Tensor:
        """``uncond + guidance_scale * (cond - uncond)``, or ``cond`` alone; float32."""
        if self.uncond is None:
            return self.cond.float()
        uncond = self.uncond.float()
        return uncond + self.guidance_scale * (self.cond.float() - uncond)


class FlowModel(Protocol):
    """A frozen text-to-image pipeline around one trainable transformer.

    Latents are float32 ``[B, *latent_shape]`` at every border of this interface; the model casts
    to its own precision inside.
    """

    family: str  # a key of `gardo.families.FAMILIES`
    transformer: nn.Module
    module: nn.Module  # what `velocity` calls: the transformer, or what wraps it to share the work
    device: torch.device
    default_resolution: int
    rows: int  # transformer rows run so far

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """Shape of one sample's latent. UserError if the resolution does not suit the model."""
        ...

    def schedule(self, num_steps: int, resolution: int) -> Schedule:
        """The pipeline's schedule."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Encode prompt texts; not cached, see `EmbeddingCache`."""
        ...

    def velocity(
        self,
        latents: Tensor,
        timesteps: Tensor,
        cond: PromptEmbeds,
        uncond: PromptEmbeds | None,
        guidance_scale: float,
    ) -> Velocity:
        """Predict velocities ``[B, *latent_shape]`` at ``timesteps`` ``[B]``.

        With ``uncond`` both predictions come from one forward of ``2 B`` rows, for
        ``guidance_scale`` to combine; a model with embedded guidance is told the scale itself.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images ``[B, 3, H, W]`` float32 in [0, 1]."""
        ...

    def release_text_encoders(self, place_transformer: bool = True) -> None:
        """Free the text encoders and bring what is left to the device.

        The transformer can stay where it is, to be brought there in shards.

        `encode_prompts` cannot be called afterwards, `velocity` and `decode` not before.
        """
        ...

    def save_lora(self, folder: str, weights: dict[str, Tensor], lora_config: dict) -> None:
        """Write ``pytorch_lora_weights.safetensors`` that the plain pipeline loads."""
        ...


def join(cond: PromptEmbeds, uncond: PromptEmbeds) -> PromptEmbeds:
    """Stack unconditional rows before conditional ones, the order of diffusers' pipelines."""
    return PromptEmbeds(
        {name: torch.cat([uncond.tensors[name], t]) for name, t in cond.tensors.items()}
    )
