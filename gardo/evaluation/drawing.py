"""Draws what contenders make of shared noise, and measures how far they moved from the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

import gardo_kernels as gk
from gardo.rng import generator, normal_rows
from gardo.sampling.rollout import Sampler
from gardo.sampling.steps import StepTable
from gardo.types import Prompt


class Draw(NamedTuple):
    """One image: a prompt and a seed, by their places in the evaluation's lists."""

    prompt: int
    seed: int


def shared_noise(role: str, prompts: Sequence[str], seeds: Sequence[int]) -> list[torch.Generator]:
    """A source of noise per (prompt, seed), the same whoever draws, wherever and beside whom.

    On the CPU, because each kind of device has random numbers of its own.
    """
    return [
        generator(seed, "evaluate", role, text) for text, seed in zip(prompts, seeds, strict=True)
    ]


class Painter:
    """Draws rows of (prompt, seed) in batches of one size.

    A batch that is not full is filled up with its last row, so that a row's matrix products have
    the same shape whatever was drawn before.
    """

    def __init__(
        self,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
    ) -> None:
        self.sampler = sampler
        self.prompts = prompts
        self.seeds = seeds

    def _fill(self, draws: Sequence[Draw]) -> tuple[list[str], list[int]]:
        full = [*draws, *[draws[-1]] * (self.sampler.batch_size - len(draws))]
        return [self.prompts[d.prompt].text for d in full], [self.seeds[d.seed] for d in full]

    @torch.inference_mode()
    def images(self, table: StepTable, draws: Sequence[Draw]) -> Tensor:
        """Images ``[len(draws), 3, H, W]`` in [0, 1] of at most a batch of draws."""
        texts, seeds = self._fill(draws)
        sampler = self.sampler
        latents = torch.empty(
            (table.num_steps + 1, len(texts), *sampler.latent_shape), device=sampler.model.device
        )
        sources = shared_noise("latent", texts, seeds)
        latents[0] = normal_rows(sources, sampler.latent_shape).to(latents.device)
        sampler.run(table, texts, latents)
        return sampler.model.decode(latents[-1])[: len(draws)]

    def kl(
        self,
        base: Callable[[], AbstractContextManager[Sampler]],
        table: StepTable,
        draws: Sequence[Draw],
    ) -> Tensor:
        """KL to the base, ``[len(draws)]`` float32, of at most a batch of draws."""
        texts, seeds = self._fill(draws)
        shape, device = self.sampler.latent_shape, self.sampler.model.device
        start = normal_rows(shared_noise("latent", texts, seeds), shape)
        steps = shared_noise("kl", texts, seeds)
        noise = torch.stack([normal_rows(steps, shape) for _ in range(table.num_steps)])
        kl = transition_kl(self.sampler, base, table, texts, start.to(device), noise.to(device))
        return kl[: len(draws)]


@torch.inference_mode()
def transition_kl(
    policy: Sampler,
    base: Callable[[], AbstractContextManager[Sampler]],
    table: StepTable,
    prompts: Sequence[str],
    start: Tensor,
    noise: Tensor,
) -> Tensor:
    """KL of a policy's noisy steps to the base's, on trajectories that the policy itself draws.

    At each step both are Gaussians of the same covariance around ``a*x + b*v``, so the KL is
    ``coef.kl * mean_over_latent((v - v_base)^2)`` with the exact scale ``b^2/(2 c^2)``
    (`gardo_kernels.SDECoefficients`): what training penalises, per latent dimension. Velocities
    are guided as in sampling.

    Args:
        policy: draws the trajectory.
        base: gives a sampler with the base's weights.
        table: a schedule with noise.
        prompts: ``B`` texts.
        start: ``[B, ...]`` float32, the initial latents.
        noise: ``[num_steps, B, ...]`` float32.

    Returns:
        ``[B]`` float32, the mean over the steps that are trainable (all but the last).
    """
    latents, total = start, start.new_zeros(len(start))
    condition = policy.condition(prompts)
    with base() as reference:
        reference_condition = reference.condition(prompts)
    for step in range(table.num_steps):
        timesteps = table.timesteps[step].expand(len(start))
        velocity = policy.velocity(latents, timesteps, condition)
        if step in table.trainable:
            with base() as reference:
                v_base = reference.velocity(latents, timesteps, reference_condition).guided
            difference = velocity.guided - v_base
            scale = table.coefficients[step].kl
            total = total + scale * difference.square().flatten(1).mean(1)
        latents = gk.sde_step(
            velocity.cond,
            latents,
            table.table[step],
            noise=noise[step],
            velocity_uncond=velocity.uncond,
            guidance_scale=velocity.guidance_scale,
        ).prev_sample
    return total / len(table.trainable)
