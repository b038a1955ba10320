"""One batch from noise to final latents: the part of sampling that a CUDA graph captures.

`sample_trajectory` works on the buffers alone: everything that changes from batch to batch is
copied into them beforehand, so that it needs no host synchronisation, no random numbers and no
memory whose size depends on data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import gardo_kernels as gk
from gardo.models.base import FlowModel
from gardo.sampling.steps import StepTable
from gardo.types import PromptEmbeds


@dataclass(frozen=True)
class Conditioning:
    """Prompt embeddings of a batch and, with classifier-free guidance, of the empty prompt."""

    cond: PromptEmbeds
    uncond: PromptEmbeds | None


@dataclass(frozen=True)
class Trajectory:
    """The buffers of a batch of ``B`` rows.

    Attributes:
        latents: ``[num_steps + 1, B, ...]`` float32; the first entry is the initial noise, the
            others are written.
        log_prob: ``[num_steps, B]`` float32, written; NaN where a step has no noise.
        noise: ``[num_steps, B, ...]`` float32, zeros where a step has none; None for an ODE.
        conditioning: of the ``B`` rows.
        steps: the schedule.
    """

    latents: Tensor
    log_prob: Tensor
    noise: Tensor | None
    conditioning: Conditioning
    steps: StepTable


def sample_trajectory(model: FlowModel, trajectory: Trajectory, guidance_scale: float) -> None:
    """Run all denoising steps; writes ``latents[1:]`` and ``log_prob``."""
    latents, steps = trajectory.latents, trajectory.steps
    cond, uncond = trajectory.conditioning.cond, trajectory.conditioning.uncond
    batch, multistep, before = latents.shape[1], steps.multistep, None
    for step in range(steps.num_steps):
        timesteps = steps.timesteps[step].expand(batch)
        velocity = model.velocity(latents[step], timesteps, cond, uncond, guidance_scale)
        if multistep is not None:
            following, before = multistep.step(step, latents[step], velocity.guided, before)
            latents[step + 1].copy_(following)
            continue
        out = gk.sde_step(
            velocity.cond,
            latents[step],
            steps.table[step],
            noise=None if trajectory.noise is None else trajectory.noise[step],
            velocity_uncond=velocity.uncond,
            guidance_scale=velocity.guidance_scale,
        )
        latents[step + 1].copy_(out.prev_sample)
        trajectory.log_prob[step].copy_(out.log_prob)


def like(trajectory: Trajectory) -> Trajectory:
    """Buffers of the same shapes with memory of their own."""

    def copies(embeds: PromptEmbeds | None) -> PromptEmbeds | None:
        if embeds is None:
            return None
        return PromptEmbeds({name: t.clone() for name, t in embeds.tensors.items()})

    cond, steps = copies(trajectory.conditioning.cond), trajectory.steps
    if cond is None:
        raise ValueError("conditioning: expected prompt embeddings, got None")
    return Trajectory(
        latents=trajectory.latents.clone(),
        log_prob=trajectory.log_prob.clone(),
        noise=None if trajectory.noise is None else trajectory.noise.clone(),
        conditioning=Conditioning(cond, copies(trajectory.conditioning.uncond)),
        steps=StepTable(
            timesteps=steps.timesteps.clone(),
            coefficients=steps.coefficients,
            table=steps.table.map(torch.clone),
            stochastic=steps.stochastic,
            trainable=steps.trainable,
            multistep=None if steps.multistep is None else steps.multistep.clone(),
        ),
    )


def inputs(trajectory: Trajectory) -> dict[str, Tensor]:
    """Every tensor that `sample_trajectory` reads and does not write first, by name."""
    tensors = {"latents": trajectory.latents[0], "timesteps": trajectory.steps.timesteps}
    if trajectory.noise is not None:
        tensors["noise"] = trajectory.noise
    for name, tensor in trajectory.steps.table.tensors().items():
        tensors[f"coefficients.{name}"] = tensor
    if trajectory.steps.multistep is not None:
        for name, tensor in trajectory.steps.multistep.tensors().items():
            tensors[f"multistep.{name}"] = tensor
    embeds = {"cond": trajectory.conditioning.cond, "uncond": trajectory.conditioning.uncond}
    for which, some in embeds.items():
        for name, tensor in ({} if some is None else some.tensors).items():
            tensors[f"{which}.{name}"] = tensor
    return tensors
