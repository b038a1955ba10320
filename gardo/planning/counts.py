"""How many samples and transformer rows an epoch takes, and how they split over processes."""

from __future__ import annotations

from dataclasses import dataclass

from gardo.algorithms.registry import ALGORITHMS
from gardo.config import Config
from gardo.families import Family
from gardo.sampling.plan import EpochPlan, batches, plan_epoch

# U = w(proxy) - mean w(aux) has mean 0, so about half of the samples stand in the set with U >= 0
# that the gate takes its fraction of.
SHARE_OVERRATED = 0.5


@dataclass(frozen=True)
class EpochCounts:
    """One epoch in numbers. A row is one sample of a transformer's batch.

    Attributes:
        samples: images per epoch over all processes.
        rows_per_sample: 2 with classifier-free guidance, else 1.
        trained_steps: how many times each sample is trained.
        gated_share: share of the samples that is expected to carry the KL penalty.
        rollout_rows, behaviour_rows, reference_rows, train_rows: rows per epoch over all
            processes, padding included; the reference's at ``gated_share``.
        samples_per_process: of the process with the most.
        rollout_batch, train_batch: samples per batch of the first process, padding included.
        rollout_batches, train_batches: its batches per epoch.
        padded_rollout, padded_train: samples over all processes that only fill batches.
        updates: optimizer steps per epoch.
    """

    samples: int
    processes: int
    prompts: int
    group_size: int
    updates: int
    num_steps: int
    trained_steps: int
    rows_per_sample: int
    gated_share: float
    rollout_rows: int
    behaviour_rows: int
    reference_rows: int
    train_rows: int
    samples_per_process: int
    rollout_batch: int
    train_batch: int
    rollout_batches: int
    train_batches: int
    padded_rollout: int
    padded_train: int


def count_epoch(config: Config, processes: int, family: Family) -> EpochCounts:
    """Count an epoch with the same functions that run it.

    Args:
        processes: processes, one per GPU.
        family: of the model, which decides whether guidance takes rows of its own.
    """
    prompts, sampling, train = config.prompts, config.sampling, config.train
    rows = 2 if family.guided(sampling.guidance_scale) else 1
    plans = [
        plan_epoch(prompts.per_epoch, prompts.group_size, train.updates_per_epoch, r, processes)
        for r in range(processes)
    ]
    rollout = [_batches(plan, sampling.batch_size) for plan in plans]
    training = [_batches(plan, train.batch_size) for plan in plans]
    algorithm = ALGORITHMS[config.algorithm.name]
    steps = algorithm.count_trained_steps(config)
    samples = prompts.per_epoch * prompts.group_size
    gated = expected_gated_share(config)
    padded_rollout = sum(size * count for size, count in rollout) - samples
    padded_train = sum(size * count for size, count in training) - samples
    return EpochCounts(
        samples=samples,
        processes=processes,
        prompts=prompts.per_epoch,
        group_size=prompts.group_size,
        updates=train.updates_per_epoch,
        num_steps=sampling.num_steps,
        trained_steps=steps,
        rows_per_sample=rows,
        gated_share=gated,
        rollout_rows=(samples + padded_rollout) * sampling.num_steps * rows,
        behaviour_rows=samples * steps * algorithm.extra_forwards,
        reference_rows=round(samples * gated) * steps * rows,
        train_rows=(samples + padded_train) * steps * rows,
        samples_per_process=max(len(plan.sample_ids) for plan in plans),
        rollout_batch=rollout[0][0],
        train_batch=training[0][0],
        rollout_batches=rollout[0][1],
        train_batches=training[0][1],
        padded_rollout=padded_rollout,
        padded_train=padded_train,
    )


def _batches(plan: EpochPlan, largest: int) -> tuple[int, int]:
    """Size of a process's batches, all padded to it, and how many there are in an epoch."""
    size = plan.batch_size(largest)
    return size, sum(len(batches(update, size)) for update in plan.updates)


def expected_gated_share(config: Config) -> float:
    """Share of the samples that the reference is expected to run on."""
    algorithm = config.algorithm
    if not algorithm.has_kl or algorithm.gate.mode == "off":
        return 0.0
    if algorithm.gate.mode == "all":
        return 1.0
    of_all = algorithm.gate.share_of == "all" or algorithm.gate.anchor == "base"
    return algorithm.gate.fraction * (1.0 if of_all else SHARE_OVERRATED)
