"""GRPO's update: clipped policy loss on stored trajectories, KL to the reference where gated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import gardo_kernels as gk
from gardo.algorithms.batches import EpochData, MicroBatch
from gardo.algorithms.penalty import penalised
from gardo.algorithms.reference import trained_steps
from gardo.algorithms.shaping import ShapedEpoch
from gardo.algorithms.stats import Loss
from gardo.algorithms.update import Algorithm
from gardo.config import TRAITS, Config
from gardo.models.base import Schedule
from gardo.rng import derive_seed, normal_rows
from gardo.sampling.rollout import Rollout, Transition, noise_source


@dataclass
class TrainingData(EpochData):
    """One epoch of trajectories; ``steps`` are the trained denoising steps.

    Attributes:
        noise: ``[num_trained_steps, n, *latent_shape]`` float32, what sampling added; with it the
            ratio is GRPO-Guard's.
        step_sizes: ``-dt`` of each trained step; read together with the noise.
    """

    noise: Tensor | None = field(default=None, kw_only=True)
    step_sizes: Sequence[float] = field(default=(), kw_only=True)

    def at(self, k: int, rows: Tensor) -> Transition:
        noise = None if self.noise is None else self.noise[k, rows]
        return self.rollout.transition(self.steps[k], rows, noise)


class GRPO(Algorithm[TrainingData]):
    """Updates the policy from `TrainingData`: Flow-GRPO (arXiv 2505.05470), with GARDO's KL."""

    traits = TRAITS["grpo"]

    @classmethod
    def count_trained_steps(cls, config: Config) -> int:
        """A share of the stochastic steps; which coefficients vanish is the SDE's matter."""
        sigmas, train = torch.linspace(1.0, 0.0, config.sampling.num_steps + 1), config.train
        schedule = Schedule(sigmas, sigmas[:-1] * 1000)
        table = cls.rollout_steps(config, schedule, torch.device("cpu"), epoch=0)
        return len(trained_steps(table, train.timestep_fraction, train.timestep_selection, 0))

    def prepare(
        self, rollout: Rollout, shaped: ShapedEpoch, schedule: Schedule, seed: int, epoch: int
    ) -> TrainingData:
        """Choose the steps to train and run the reference on the gated rows."""
        train = self.train
        steps = trained_steps(
            rollout.table,
            train.timestep_fraction,
            train.timestep_selection,
            derive_seed(seed, "steps", epoch),
        )
        config, runtime = self.algorithm, self.runtime
        shaped = penalised(config, train.batch_size, shaped, rollout.plan, runtime)
        data = TrainingData(rollout, shaped, None, steps)
        if self.algorithm.ratio_norm == "guard":
            sizes = (schedule.sigmas[:-1] - schedule.sigmas[1:]).tolist()
            data.step_sizes = [sizes[step] for step in steps]
            data.noise = sampling_noise(rollout, steps, self.sampler.latent_shape, seed, epoch)
        return self._with_reference(data)

    def kl_scale(self, data: TrainingData, k: int) -> Tensor:
        return data.rollout.table.coefficients[data.steps[k]].kl

    def loss(self, data: TrainingData, batch: MicroBatch, k: int) -> Loss:
        t, config = data.at(k, batch.rows), self.algorithm
        velocity = self.sampler.velocity(t.latents, t.timesteps, batch.conditioning)
        advantage, adv_clip = batch.advantage, config.adv_clip
        if t.noise is not None:
            # GRPO-Guard weighs the policy loss by 1 / step size. Unlike the KL, that loss scales
            # with the clamped advantage, which therefore carries the weight.
            advantage = advantage / data.step_sizes[k]
            adv_clip = adv_clip / data.step_sizes[k]
        return gk.grpo_loss(
            velocity.cond,
            t.latents,
            t.next_latents,
            t.old_log_prob,
            advantage,
            t.coefficients,
            clip_range=config.clip_range,
            adv_clip=adv_clip,
            gate=batch.gate,
            ref_velocity=data.ref_velocity(k, batch),
            kl_coef=self.strength.coefficient * batch.kl_weight,
            velocity_uncond=velocity.uncond,
            guidance_scale=velocity.guidance_scale,
            reduction="sum",
            noise=t.noise,
        )


@torch.no_grad()
def sampling_noise(
    rollout: Rollout, steps: Sequence[int], shape: Sequence[int], seed: int, epoch: int
) -> Tensor:
    """Draw the noise of a rollout's steps again, ``[len(steps), n, *shape]`` float32."""
    device, table = rollout.log_prob.device, rollout.table
    ids = rollout.plan.sample_ids.tolist()
    sources = [noise_source(seed, epoch, i, device) for i in ids]
    out = torch.empty((len(steps), len(ids), *shape), device=device)
    for step in table.stochastic:  # in the order of sampling
        noise = normal_rows(sources, shape)
        if step in steps:
            out[list(steps).index(step)] = noise
    return out
