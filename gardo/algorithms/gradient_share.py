"""Measures the gradient of the KL penalty against that of the policy loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gardo.algorithms.batches import MicroBatch, count_within
from gardo.algorithms.penalty import kl_weight
from gardo.algorithms.update import Algorithm, Data
from gardo.checkpointing.state_tensors import whole
from gardo.sampling.plan import EpochPlan

PROBE = 64
"""Samples that the gradients are measured on, at most: the first of the first update."""


def measure_strength(
    algorithm: Algorithm[Data], data: Data, epoch: int, moved: bool
) -> dict[str, float]:
    """Measure an epoch's gradients before its updates, and set the weight of their KL.

    At one trained step, another one each epoch. What is measured depends neither on the batch size
    nor on the number of processes, which all call this.

    Args:
        moved: whether the policy has made a step since it last was the reference. Where it has not,
            their velocities differ by rounding alone, which would set a huge weight.

    Returns:
        metrics; none without a KL penalty. The share is NaN where samples are gated, but none of
        those that are measured on. ``forwards/probe`` counts transformer rows.
    """
    config, shaped = algorithm.algorithm, data.shaped
    if not config.has_kl or config.gate.mode == "off":
        return {}
    k, rows_before = epoch % len(data.steps), algorithm.sampler.model.rows
    policy, kl = _policy_norm(algorithm, data, k).item(), 0.0
    if moved and any(shaped.gated_per_update):
        kl = _kl_norm(algorithm, data, k)
    probed = algorithm.sampler.model.rows - rows_before
    algorithm.sampler.model.rows = rows_before
    return {**algorithm.strength.observe(policy, kl), "forwards/probe": probed}


def _policy_norm(algorithm: Algorithm[Data], data: Data, k: int) -> Tensor:
    size = data.rollout.plan.batch_size(algorithm.train.batch_size)
    mine, most = _probed(data.rollout.plan)
    for start in range(0, most, size):
        algorithm.runtime.stop_point()
        rows = slice(min(start, mine), min(start + size, mine))
        batch = MicroBatch.take(data, algorithm.sampler, rows, size, kl_weight=0.0)
        with algorithm.reduced_if(start + size >= most):
            out = algorithm.loss(data, batch, k)
            algorithm.runtime.accelerator.backward(out.loss)
    return _take_norm(algorithm)


def _kl_norm(algorithm: Algorithm[Data], data: Data, k: int) -> float:
    """At weight 1, on the gated ones alone; NaN where none of the samples is gated."""
    runtime, sampler, plan = algorithm.runtime, algorithm.sampler, data.rollout.plan
    mine, _ = _probed(plan)
    gated = list(data.shaped.gated_rows[: count_within(data.shaped.gated_rows, slice(0, mine))])
    device = data.rollout.log_prob.device
    most = int(runtime.max(torch.tensor(float(len(gated)), device=device)))
    if most == 0:
        return math.nan
    weight = kl_weight(algorithm.algorithm, data, 0, slice(0, mine)) * algorithm.kl_scale(data, k)
    size = plan.batch_size(algorithm.train.batch_size)
    for start in range(0, most, size):
        runtime.stop_point()
        index = gated[start : start + size]
        # a process without one takes part with a row that weighs nothing
        rows = torch.tensor(index or [0], device=device)
        reference = None if data.reference is None else data.reference.rows(k, rows)
        x, prompts = data.at(k, rows), [data.rollout.prompts[row] for row in index or [0]]
        with algorithm.reduced_if(start + size >= most):
            velocity = sampler.velocity(x.latents, x.timesteps, prompts).guided
            target = velocity.detach() if reference is None or not index else reference
            square = (velocity - target).square().flatten(1).mean(1)
            runtime.accelerator.backward((square * weight).sum())
    return float(_take_norm(algorithm))


def _probed(plan: EpochPlan) -> tuple[int, int]:
    """How many of the samples this process has, its first rows, and how many any has at most."""
    count = min(PROBE, plan.update_sizes[0])
    mine = int((plan.sample_ids[plan.updates[0]] < count).sum())
    return mine, -(-count // plan.world_size)


def _take_norm(algorithm: Algorithm[Data]) -> Tensor:
    """Norm of the gradients over all parameters, which are dropped; 0-d."""
    gradients = [p.grad for p in algorithm.parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    algorithm.optimizer.zero_grad(set_to_none=True)
    return norm
