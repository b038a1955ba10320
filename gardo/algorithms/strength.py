"""How strong the KL penalty is: its gradient's share of the policy's, measured and, if asked, held.

``kl_coef`` has no unit that methods and rewards share; the ratio of the two gradients has.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gardo.algorithms.batches import EpochData, MicroBatch
from gardo.algorithms.penalty import kl_weight
from gardo.checkpointing.state_tensors import whole
from gardo.config import AlgorithmConfig

if TYPE_CHECKING:
    from gardo.algorithms.update import Algorithm, Data

PROBE = 64
"""Samples that the gradients are measured on, at most: the first of the first update."""

_WINDOW = 5


class KLStrength:
    """The weight of the KL penalty: a fixed one, or one that holds its gradient's share.

    For a share it is ``target / (mean ratio of the last epochs)``, where a ratio is the norm of the
    KL's gradient at weight 1 over that of the policy's. It is 0 where the policy is the reference
    or no sample is gated; until one is above 0, the weight is 0.

    Attributes:
        coefficient: the weight.
    """

    def __init__(self, config: AlgorithmConfig) -> None:
        self.target = config.kl_target
        fixed = config.kl_coef
        self.coefficient = fixed if isinstance(fixed, float) else 0.0
        self._ratios: deque[float] = deque(maxlen=_WINDOW)

    def observe(self, policy: float, kl: float) -> dict[str, float]:
        """Take in an epoch's norms: of the policy's gradient, and of the KL's at weight 1.

        Returns:
            metrics of the weight that holds from now on; the share is NaN where it has no meaning.
        """
        ratio = kl / policy if policy > 0 else math.nan
        if self.target is not None:
            if math.isfinite(ratio):
                self._ratios.append(ratio)
            self._set()
        metrics = {"kl/gradient_share": self.coefficient * ratio}
        return metrics if self.target is None else {**metrics, "kl/coef": self.coefficient}

    def _set(self) -> None:
        mean = sum(self._ratios) / max(len(self._ratios), 1)
        if self.target is not None and mean > 0:
            self.coefficient = self.target / mean

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers (JSON-able)."""
        return {"ratios": list(self._ratios)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; the target stays that of this object."""
        self._ratios = deque(map(float, state["ratios"]), maxlen=_WINDOW)
        self._set()


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
