"""GRPO's update: clipped policy loss on stored trajectories, KL to the reference where gated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import gardo_kernels as gk
from gardo.algorithms.reference import RowVelocities
from gardo.algorithms.shaping import ShapedEpoch
from gardo.config import AlgorithmConfig, TrainConfig
from gardo.models.adapters import Adapters
from gardo.runtime.process import Runtime
from gardo.sampling.plan import batches, padded_rows
from gardo.sampling.rollout import Rollout, Sampler


@dataclass
class TrainingData:
    """One epoch's samples, ready for its updates.

    Attributes:
        reference: velocities of the gated rows; None switches the KL off.
        steps: the denoising steps that are trained.
    """

    rollout: Rollout
    shaped: ShapedEpoch
    reference: RowVelocities | None
    steps: Sequence[int]


class GRPO:
    """Updates the policy from `TrainingData`."""

    def __init__(
        self,
        algorithm: AlgorithmConfig,
        train: TrainConfig,
        sampler: Sampler,
        adapters: Adapters,
        optimizer: torch.optim.Optimizer,
        runtime: Runtime,
    ) -> None:
        self.algorithm = algorithm
        self.train = train
        self.sampler = sampler
        self.parameters = list(adapters.parameters().values())
        self.optimizer = optimizer
        self.runtime = runtime

    def update(self, data: TrainingData, index: int, stats: UpdateStats) -> None:
        """Make the epoch's optimizer step number ``index``.

        Every batch is weighted by its share of the update, so that the gradient depends neither on
        the batch size nor on the number of processes.
        """
        self._accumulate_gradients(data, index, stats)
        accelerator = self.runtime.accelerator
        norm = accelerator.clip_grad_norm_(self.parameters, self.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        stats.finish_update(norm, data.shaped.gated_per_update[index])

    def _accumulate_gradients(self, data: TrainingData, index: int, stats: UpdateStats) -> None:
        plan = data.rollout.plan
        size, gated = plan.update_sizes[index], data.shaped.gated_per_update[index]
        kl_coef = self.algorithm.kl_coef if data.reference is not None else 0.0
        if self.algorithm.kl_reduction == "gated":
            # the kernel divides the KL's sum by the batch; this makes it the mean over the gated
            kl_coef *= size / max(gated, 1)
        batch_size = plan.batch_size(self.train.batch_size)
        for rows in batches(plan.updates[index], batch_size):
            batch = _Batch.take(data, rows, batch_size)
            # gradients are averaged over processes, and the kernel averages over the batch
            weight = len(batch.rows) * self.runtime.world_size / size / len(data.steps)
            for step_index in range(len(data.steps)):
                out = self._loss(data, batch, step_index, kl_coef)
                self.runtime.accelerator.backward(out.loss * weight)
                stats.add(out, batch, 1 / len(data.steps), self.algorithm.clip_range)

    def _loss(
        self, data: TrainingData, batch: _Batch, step_index: int, kl_coef: float
    ) -> gk.GRPOLoss:
        rollout, reference, rows = data.rollout, data.reference, batch.rows
        step = data.steps[step_index]
        latents = rollout.latents_at(step, rows)
        timesteps = rollout.table.timesteps[step].expand(len(rows))
        v, v_uncond = self.sampler.velocity(latents, timesteps, batch.prompts)
        return gk.grpo_loss(
            v,
            latents,
            rollout.latents_at(step + 1, rows),
            rollout.log_prob[step, rows],
            batch.advantage,
            rollout.table.coefficients[step],
            clip_range=self.algorithm.clip_range,
            adv_clip=self.algorithm.adv_clip,
            gate=None if reference is None else batch.gate,
            ref_velocity=None if reference is None else reference.rows(step_index, rows),
            kl_coef=kl_coef,
            kl_reduction="batch",
            velocity_uncond=v_uncond,
            guidance_scale=self.sampler.cfg_scale,
        )


@dataclass
class _Batch:
    """A full batch of rows; padding repeats the last sample without advantage and gate."""

    rows: Tensor
    size: int  # without the padding
    real: Tensor
    prompts: list[str]
    advantage: Tensor
    gate: Tensor

    @classmethod
    def take(cls, data: TrainingData, rows: slice, batch_size: int) -> _Batch:
        shaped, rollout = data.shaped, data.rollout
        index = padded_rows(rows, batch_size, torch.device("cpu"))
        prompts = [rollout.prompts[i] for i in index.tolist()]
        device = rollout.log_prob.device
        index = index.to(device)
        size = rows.stop - rows.start
        real = torch.arange(batch_size, device=device) < size
        advantage = torch.where(real, shaped.advantage[index], 0.0)
        return cls(index, size, real, prompts, advantage, shaped.gate[index] & real)


@dataclass
class UpdateStats:
    """Sums over an epoch's updates, kept on the device until `metrics` reads them once."""

    policy_loss: list[Tensor] = field(default_factory=list)
    total_loss: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)
    samples: float = 0.0
    ratio_deviation: list[Tensor] = field(default_factory=list)
    grad_norm: list[Tensor] = field(default_factory=list)
    gated: int = 0

    def add(
        self, out: gk.GRPOLoss, batch: _Batch, share: float, clip_range: float | tuple[float, float]
    ) -> None:
        """Add one kernel call; ``share`` is 1 over the number of trained steps."""
        # the kernel averages over all rows; padding adds nothing to a loss, so sums are exact
        size = len(batch.rows) * share
        self.policy_loss.append(out.policy_loss.detach() * size)
        self.total_loss.append(out.loss.detach() * size)
        self.kl.append(out.kl.detach() * size)
        self.clipped.append((_outside(out.ratio.detach(), clip_range) & batch.real).sum() * share)
        self.samples += batch.size * share
        if not self.grad_norm:  # before the first step the policy is still the one that sampled
            self.ratio_deviation.append(((out.ratio.detach() - 1).abs() * batch.real).max())

    def finish_update(self, grad_norm: Tensor, gated: int) -> None:
        """Close an optimizer step; ``gated`` counts its gated samples over all processes."""
        self.grad_norm.append(grad_norm.detach())
        self.gated += gated

    def metrics(self, runtime: Runtime) -> tuple[dict[str, float], float | None]:
        """The epoch's figures over all processes, and its mean KL over gated samples, if any."""
        sums = [self.policy_loss, self.total_loss, self.kl, self.clipped]
        local = torch.stack([torch.stack(values).double().sum() for values in sums])
        count = torch.tensor([self.samples], dtype=torch.float64, device=local.device)
        policy, total, kl_sum, clipped, samples = runtime.sum(torch.cat([local, count])).tolist()
        deviation = runtime.max(torch.stack(self.ratio_deviation).max())
        kl = kl_sum / self.gated if self.gated else None
        return {
            "loss/policy": policy / samples,
            "loss/total": total / samples,
            "kl": 0.0 if kl is None else kl,
            "clip_fraction": clipped / samples,
            "ratio/max_abs_dev": float(deviation),
            "grad_norm": float(torch.stack(self.grad_norm).mean()),
        }, kl


def _outside(ratio: Tensor, clip_range: float | tuple[float, float]) -> Tensor:
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    return (ratio < 1 - low) | (ratio > 1 + high)
