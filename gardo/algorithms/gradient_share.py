"""Measures the gradient of the KL penalty against that of the policy loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gardo.algorithms.batches import EpochData, MicroBatch
from gardo.algorithms.penalty import kl_weight
from gardo.algorithms.update import Algorithm, Data
from gardo.checkpointing.state_tensors import whole

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
        metrics; none without a KL penalty. ``forwards/probe`` counts transformer rows.
    """
    if not algorithm.algorithm.has_kl:
        return {}
    k, rows_before = epoch % len(data.steps), algorithm.sampler.model.rows
    policy = _policy_norm(algorithm, data, k)
    kl = _kl_norm(algorithm, data, k) if moved else torch.zeros_like(policy)
    norms = torch.stack([policy, kl]).tolist()
    probed = algorithm.sampler.model.rows - rows_before
    algorithm.sampler.model.rows = rows_before
    return {**algorithm.strength.observe(*norms), "forwards/probe": probed}


def _policy_norm(algorithm: Algorithm[Data], data: Data, k: int) -> Tensor:
    for batch, last in _probe(algorithm, data):
        with algorithm.reduced_if(last):
            out = algorithm.loss(data, replace(batch, kl_weight=0.0), k)
            algorithm.runtime.accelerator.backward(out.loss)
    return _take_norm(algorithm)


def _kl_norm(algorithm: Algorithm[Data], data: Data, k: int) -> Tensor:
    for batch, last in _probe(algorithm, data):
        with algorithm.reduced_if(last):
            x = data.at(k, batch.rows)
            velocity = algorithm.sampler.velocity(x.latents, x.timesteps, batch.conditioning).guided
            reference = data.ref_velocity(k, batch)
            gate = batch.gate.view(-1, *[1] * (velocity.dim() - 1))
            # rows outside the gate may hold anything
            target = velocity if reference is None else torch.where(gate, reference, velocity)
            square = (velocity - target.detach()).square().flatten(1).mean(1)
            loss = (square * algorithm.kl_scale(data, k)).sum() * batch.kl_weight
            algorithm.runtime.accelerator.backward(loss)
    return _take_norm(algorithm)


def _probe(algorithm: Algorithm[Data], data: EpochData) -> Iterator[tuple[MicroBatch, bool]]:
    """The micro-batches of the samples to measure on, and whether it is the last of them."""
    plan, first = data.rollout.plan, data.rollout.plan.updates[0]
    size = plan.batch_size(algorithm.train.batch_size)
    count = min(PROBE, plan.update_sizes[0])
    mine = int((plan.sample_ids[first] < count).sum())
    most = -(-count // plan.world_size)  # of any process, since their gradients are summed
    for start in range(0, most, size):
        algorithm.runtime.stop_point()
        rows = slice(min(start, mine), min(start + size, mine))
        weight = kl_weight(algorithm.algorithm, data, 0, rows)
        batch = MicroBatch.take(data, algorithm.sampler, rows, size, weight)
        yield batch, start + size >= most


def _take_norm(algorithm: Algorithm[Data]) -> Tensor:
    """Norm of the gradients over all parameters, which are dropped; 0-d float64."""
    gradients = [p.grad for p in algorithm.parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients)).double()
    algorithm.optimizer.zero_grad(set_to_none=True)
    return norm
