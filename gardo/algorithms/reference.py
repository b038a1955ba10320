"""Velocities of the reference and other policies on some rows, and the steps that are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gardo.distributed.process import Runtime
from gardo.models.adapters import REFERENCE, Adapters
from gardo.sampling.rollout import Rollout, Sampler
from gardo.sampling.steps import StepTable


@dataclass(frozen=True)
class RowVelocities:
    """Guided velocities of some rows (of the reference: the gated ones), kept for an epoch.

    Attributes:
        velocity: ``[num_trained_steps, num_rows, *latent_shape]`` float32.
        slot: ``[n]`` int64, where such a row stands in ``velocity``; 0 for the others.
    """

    velocity: Tensor
    slot: Tensor

    def rows(self, step_index: int, rows: Tensor) -> Tensor:
        """``[len(rows), ...]``; other rows hold a value that must not be used."""
        return self.velocity[step_index, self.slot[rows]]


def reference_pass(
    sampler: Sampler,
    adapters: Adapters,
    rollout: Rollout,
    gated_rows: Sequence[int],
    steps: Sequence[int],
    timesteps: Tensor | None = None,
    runtime: Runtime | None = None,
) -> RowVelocities | None:
    """Run the reference on the gated rows of an epoch, once, at every trained step.

    A gated share of f costs f of the forwards that an ungated pass would. Returns None if no row is
    gated. Arguments: see `velocity_pass`.
    """
    with adapters.use(REFERENCE):
        return velocity_pass(sampler, rollout, gated_rows, steps, timesteps, runtime)


def velocity_pass(
    sampler: Sampler,
    rollout: Rollout,
    some_rows: Sequence[int],
    steps: Sequence[int],
    timesteps: Tensor | None = None,
    runtime: Runtime | None = None,
) -> RowVelocities | None:
    """Velocities of the active policy on some rows of an epoch, at every trained step.

    All (row, step) pairs are packed into full batches. Where weights are sharded, processes with
    fewer rows join in the forwards of the others.

    Args:
        some_rows: of the rollout.
        steps: entries of the rollout's latents.
        timesteps: ``[len(steps), n]``, what the model is told of each latent; None: the schedule's.
        runtime: the processes that call this; None: this one alone.

    Returns:
        None without rows.
    """
    device, count = rollout.log_prob.device, len(some_rows)
    trained = torch.tensor(steps, device=device)

    def run(pairs: Sequence[tuple[int, int]]) -> Tensor:
        k = torch.tensor([k for k, _ in pairs], device=device)
        row = torch.tensor([r for _, r in pairs], device=device)
        told = rollout.table.timesteps[trained[k]] if timesteps is None else timesteps[k, row]
        prompts = [rollout.prompts[r] for _, r in pairs]
        return sampler.velocity(rollout.latents_at(trained[k], row), told, prompts).guided

    pairs = [(k, row) for k in range(len(steps)) for row in some_rows]
    starts = range(0, len(pairs), sampler.batch_size)
    forwards = len(starts) if runtime is None else runtime.forwards(len(starts))
    velocity = torch.empty((len(steps), count, *sampler.latent_shape), device=device)
    flat = velocity.flatten(0, 1)
    # no inference mode: weights that are brought together in it could not be trained afterwards
    with torch.no_grad():
        for start in starts:
            batch = pairs[start : start + sampler.batch_size]
            flat[start : start + len(batch)] = run(batch)
        rows = sampler.model.rows
        for _ in range(len(starts), forwards):
            run([(0, 0)])
        sampler.model.rows = rows
    if not count:
        return None
    slot = torch.zeros(len(rollout), dtype=torch.int64, device=device)
    slot[torch.tensor(some_rows, device=device)] = torch.arange(count, device=device)
    return RowVelocities(velocity, slot)


def trained_steps(table: StepTable, fraction: float, selection: str, seed: int) -> list[int]:
    """The steps of an epoch that are trained: this share of the stochastic ones, at least one.

    ``first`` takes the earliest, as the official code does; ``random`` draws them per epoch.
    """
    count = max(1, int(len(table.stochastic) * fraction + 1e-9))
    candidates = table.trainable
    if selection == "first":
        return list(candidates[:count])
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    return sorted(candidates[i] for i in order[:count].tolist())
