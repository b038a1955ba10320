"""GRPO's update: clipped policy loss on stored trajectories, KL to the reference where gated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import gardo_kernels as gk
from gardo.algorithms.reference import reference_pass, trained_steps
from gardo.algorithms.shaping import ShapedEpoch
from gardo.algorithms.update import Algorithm, EpochData, MicroBatch, UpdateStats
from gardo.config import TRAITS, Config
from gardo.models.base import Schedule
from gardo.rng import derive_seed, normal_rows
from gardo.sampling.rollout import Rollout, noise_source

__all__ = ["GRPO", "RatioNorm", "TrainingData", "UpdateStats"]


@dataclass(frozen=True)
class RatioNorm:
    """What GRPO-Guard needs of the trained steps beyond GRPO.

    Attributes:
        noise: ``[num_trained_steps, n, *latent_shape]`` float32, the noise that sampling added.
        step_size: ``-dt`` of each trained step.
    """

    noise: Tensor
    step_size: Sequence[float]


@dataclass
class TrainingData(EpochData):
    """One epoch of trajectories; ``steps`` are the trained denoising steps."""

    ratio_norm: RatioNorm | None = field(default=None, kw_only=True)


class GRPO(Algorithm):
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
        shaped = self.penalised(shaped, rollout.plan)
        before = self.sampler.model.rows
        reference = reference_pass(
            self.sampler,
            self.adapters,
            rollout,
            shaped.gated_rows,
            steps,
            runtime=self.runtime,
        )
        ratio_norm = None
        if self.algorithm.ratio_norm == "guard":
            sizes = (schedule.sigmas[:-1] - schedule.sigmas[1:]).tolist()
            noise = sampling_noise(rollout, steps, self.sampler.latent_shape, seed, epoch)
            ratio_norm = RatioNorm(noise, [sizes[step] for step in steps])
        return TrainingData(
            rollout,
            shaped,
            reference,
            steps,
            reference_rows=self.sampler.model.rows - before,
            ratio_norm=ratio_norm,
        )

    def _accumulate_gradients(self, data: EpochData, index: int, stats: UpdateStats) -> None:
        plan = data.rollout.plan
        size, share = plan.update_sizes[index], 1 / len(data.steps)
        batch_size = plan.batch_size(self.train.batch_size)
        batches = plan.batches(index, batch_size)
        last = len(batches) - 1, len(data.steps) - 1
        for number, rows in enumerate(batches):
            self.runtime.stop_point()
            batch = MicroBatch.take(data, self.sampler, rows, batch_size)
            kl_weight = self.kl_weight(data, index, rows)
            # gradients are averaged over processes, and the kernel averages over the batch
            weight = len(batch.rows) * self.runtime.world_size / size * share
            for step_index in range(len(data.steps)):
                kl_coef = self.algorithm.kl_coef * kl_weight * size
                with self._gradients((number, step_index) == last):
                    out = self._loss(data, batch, step_index, kl_coef)
                    self._backward(out.loss * weight, batch, step_index)
                # padding adds nothing to a loss, so sums over the batch are those of its samples
                count = len(batch.rows) * share
                stats.add(
                    out.policy_loss * count,
                    out.loss * count,
                    out.kl * count,
                    kl_weight,
                    batch.size * share,
                )
                stats.add_ratio(out.ratio, batch.real, share, self.algorithm.clip_range)

    def _loss(
        self, data: EpochData, batch: MicroBatch, step_index: int, kl_coef: float
    ) -> gk.GRPOLoss:
        """The loss of a batch; its KL is the sum over gated samples divided by the batch size."""
        rollout, reference, rows = data.rollout, data.reference, batch.rows
        step = data.steps[step_index]
        latents, prev = rollout.latents_at(step, rows), rollout.latents_at(step + 1, rows)
        timesteps = rollout.table.timesteps[step].expand(len(rows))
        velocity = self.sampler.velocity(latents, timesteps, batch.conditioning)
        coef = rollout.table.coefficients[step]
        guard = data.ratio_norm if isinstance(data, TrainingData) else None
        out = gk.grpo_loss(
            velocity.cond,
            latents,
            prev,
            rollout.log_prob[step, rows],
            # the guarded policy loss stands below; the kernel then gives the KL alone
            batch.advantage if guard is None else torch.zeros_like(batch.advantage),
            coef,
            clip_range=self.algorithm.clip_range,
            adv_clip=self.algorithm.adv_clip,
            gate=None if reference is None else batch.gate,
            ref_velocity=None if reference is None else reference.rows(step_index, rows),
            kl_coef=kl_coef,
            kl_reduction="batch",
            velocity_uncond=velocity.uncond,
            guidance_scale=self.sampler.cfg_scale,
        )
        if guard is None:
            return out
        v = velocity.guided(self.sampler.cfg_scale)
        ratio = normalised_ratio(v, latents, prev, guard.noise[step_index, rows], coef)
        advantage = batch.advantage.clamp(-self.algorithm.adv_clip, self.algorithm.adv_clip)
        policy = clipped_loss(ratio, advantage, self.algorithm.clip_range)
        policy = policy / guard.step_size[step_index]
        return out._replace(
            loss=out.loss + policy, policy_loss=policy.detach(), ratio=ratio.detach()
        )

    @torch.no_grad()
    def contents(self, data: EpochData, batch: MicroBatch, step_index: int) -> dict[str, Tensor]:
        rollout, rows, step = data.rollout, batch.rows, data.steps[step_index]
        latents, prev = rollout.latents_at(step, rows), rollout.latents_at(step + 1, rows)
        timesteps = rollout.table.timesteps[step].expand(len(rows))
        velocity = self.sampler.velocity(latents, timesteps, batch.conditioning)
        log_prob = gk.sde_log_prob(
            velocity.cond,
            latents,
            prev,
            rollout.table.coefficients[step],
            velocity_uncond=velocity.uncond,
            guidance_scale=self.sampler.cfg_scale,
        )
        old = rollout.log_prob[step, rows]
        found = {
            "latents": latents,
            "prev_latents": prev,
            "timesteps": timesteps,
            "velocity": velocity.cond,
            "old_log_prob": old,
            "log_prob": log_prob,
            "ratio": torch.exp(log_prob - old),
            "advantage": batch.advantage,
            "gate": batch.gate,
        }
        if velocity.uncond is not None:
            found["velocity_uncond"] = velocity.uncond
        if data.reference is not None:  # meaningful where the gate holds
            found["reference_velocity"] = data.reference.rows(step_index, rows)
        return found


def normalised_ratio(
    velocity: Tensor, sample: Tensor, prev_sample: Tensor, noise: Tensor, coef: gk.SDECoefficients
) -> Tensor:
    """GRPO-Guard's importance ratio (RatioNorm, arXiv 2510.22319), ``[B]`` float32.

    It adds the shift of the mean, ``mean((m - m_old)^2) / (2 c^2)``, to the difference of the
    log-probs and multiplies by the standard deviation ``c`` of the transition, so that the ratio
    has mean 1 and the same spread at every step. With ``prev = m_old + c*z`` the squares cancel::

        log ratio = mean(z * (m - m_old)),  m = a*x + b*v

    Args:
        velocity: guided velocity of the policy, ``[B, ...]``; the ratio is differentiable in it.
        sample, prev_sample: the step of the trajectory, ``[B, ...]``.
        noise: the ``z`` that made it, ``[B, ...]``.
        coef: of the step, 0-d fields.
    """
    old_mean = prev_sample - coef.c * noise
    mean = coef.a * sample + coef.b * velocity.float()
    return torch.exp((noise * (mean - old_mean)).flatten(1).mean(1))


def clipped_loss(
    ratio: Tensor, advantage: Tensor, clip_range: float | tuple[float, float]
) -> Tensor:
    """PPO's loss averaged over the batch: ``max(-A*r, -A*clamp(r, 1-low, 1+high))``, 0-d."""
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    clipped = ratio.clamp(1 - low, 1 + high)
    return torch.maximum(-advantage * ratio, -advantage * clipped).mean()


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
