"""What the algorithms share: an epoch's data, its micro-batches, and the update that they make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from gardo.algorithms.reference import RowVelocities, reference_pass
from gardo.algorithms.shaping import ShapedEpoch
from gardo.algorithms.stats import Loss, UpdateStats
from gardo.checkpointing.state_tensors import whole
from gardo.config import AlgorithmConfig, Config, TrainConfig, Traits
from gardo.distributed.process import Runtime
from gardo.models.adapters import POLICY, REFERENCE, Adapters, FullCopies
from gardo.models.base import Schedule
from gardo.run.health import Outcome
from gardo.sampling.plan import EpochPlan, padded_rows
from gardo.sampling.rollout import Rollout, Sampler
from gardo.sampling.steps import StepTable, sde_window, step_table
from gardo.sampling.trajectory import Conditioning


@dataclass
class EpochData(ABC):
    """One epoch's samples, ready for its updates.

    Attributes:
        reference: velocities of the penalised rows; None switches the KL off.
        steps: the entries of the rollout's latents that are trained.
        reference_rows: transformer rows that the reference took.
    """

    rollout: Rollout
    shaped: ShapedEpoch
    reference: RowVelocities | None
    steps: Sequence[int]
    reference_rows: int = field(default=0, kw_only=True)

    @abstractmethod
    def at(self, k: int, rows: Tensor) -> Any:
        """What is trained on at the ``k``-th trained step: a dataclass of ``[B, ...]`` tensors.

        The model is given its ``latents`` and ``timesteps``.
        """

    def ref_velocity(self, k: int, batch: MicroBatch) -> Tensor | None:
        """Of the reference; what other than gated rows hold must not be used. None without any."""
        if self.reference is None or not batch.gated:
            return None
        return self.reference.rows(k, batch.rows)


Data = TypeVar("Data", bound=EpochData)


class Algorithm(ABC, Generic[Data]):
    """Turns a scored rollout into optimizer steps of the policy.

    What the trainer and the planner need to know of an algorithm, they ask its class.
    """

    #: the policy and its frozen companions
    adapter_names: ClassVar[tuple[str, ...]] = (POLICY, REFERENCE)
    #: which of them draws the rollouts
    sampled_by: ClassVar[str] = POLICY
    #: what its settings must fit, too: the kind of its steps, whether it has ratios
    traits: ClassVar[Traits]
    #: forwards of the behaviour policy per sample and trained step, before the updates
    extra_forwards: ClassVar[int] = 0

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
        self.adapters = adapters
        self.parameters = list(adapters.parameters().values())
        self.optimizer = optimizer
        self.runtime = runtime

    @classmethod
    def rollout_steps(
        cls, config: Config, schedule: Schedule, device: torch.device, epoch: int
    ) -> StepTable:
        """The steps that draw an epoch's samples."""
        sampling = config.sampling
        return step_table(
            schedule,
            device,
            kind=sampling.sde if cls.traits.noisy else "ode",
            noise_level=sampling.noise_level,
            kl_scale=config.algorithm.kl_scale,
            window=sde_window(sampling, config.seed, epoch),
            solver=sampling.solver,
        )

    @classmethod
    @abstractmethod
    def count_trained_steps(cls, config: Config) -> int:
        """How many times an epoch trains each of its samples."""

    @abstractmethod
    def prepare(
        self, rollout: Rollout, shaped: ShapedEpoch, schedule: Schedule, seed: int, epoch: int
    ) -> Data:
        """Choose what is trained, and run all forwards that need no gradient.

        Args:
            schedule: of the rollout.
            seed: the run's; everything random is a function of it, the epoch and sample ids.
        """

    @abstractmethod
    def loss(self, data: Data, batch: MicroBatch, k: int) -> Loss:
        """Summed over a micro-batch at the ``k``-th trained step; padding must add nothing.

        A sample's KL weighs ``algorithm.kl_coef * batch.kl_weight``.
        """

    def finish_epoch(self, optimizer_steps: int) -> dict[str, float]:
        """After an epoch's updates; ``optimizer_steps`` counts those of the whole run.

        Returns:
            further metrics.
        """
        return {}

    def update(self, data: Data, index: int, stats: UpdateStats) -> Outcome:
        """Make the epoch's optimizer step number ``index``, unless its numbers are not finite.

        Returns:
            what became of it, the same on all processes. A step that was not made leaves weights,
            optimizer and ``stats`` as they were.
        """
        self.accumulate_gradients(data, index, stats)
        accelerator = self.runtime.accelerator
        norm = whole(accelerator.clip_grad_norm_(self.parameters, self.train.max_grad_norm))
        outcome = self._outcome(stats.losses_finite(), norm)
        if outcome is Outcome.MADE:
            self.optimizer.step()
            stats.finish_update(norm)
        else:
            stats.drop_update()
        self.optimizer.zero_grad(set_to_none=True)
        return outcome

    def accumulate_gradients(self, data: Data, index: int, stats: UpdateStats) -> None:
        """Backward through every micro-batch of an update, at every trained step."""
        weight = self.weight(data, index)
        for batch, k, last in self.passes(data, index):
            with self._reduced_if(last):
                out = self.loss(data, batch, k)
                self.runtime.accelerator.backward(out.loss * weight)
            stats.add(out, batch.size, batch.gated, batch.kl_weight, self.algorithm.clip_range)

    def passes(self, data: Data, index: int) -> Iterator[tuple[MicroBatch, int, bool]]:
        """The micro-batches of an update at each trained step, and whether it is the last pass."""
        plan = data.rollout.plan
        size = plan.batch_size(self.train.batch_size)
        parts = plan.batches(index, size)
        for rows in parts:
            self.runtime.stop_point()
            kl_weight = self.kl_weight(data, index, rows)
            batch = MicroBatch.take(data, self.sampler, rows, size, kl_weight)
            for k in range(len(data.steps)):
                yield batch, k, rows is parts[-1] and k + 1 == len(data.steps)

    def weight(self, data: Data, index: int) -> float:
        """Of a sample's loss at a step, so that the update's is a mean over both.

        Gradients are averaged over processes. They depend neither on the number of processes nor
        on the batch size, unless ``kl_reduction`` is ``microbatch``.
        """
        return self.runtime.world_size / (data.rollout.plan.update_sizes[index] * len(data.steps))

    def kl_weight(self, data: Data, index: int, rows: slice) -> float:
        """Of a penalised sample's KL in a micro-batch, where its policy loss has weight 1."""
        gated = _count(data.shaped.gated_rows, rows)
        if data.reference is None or not gated:
            return 0.0
        if self.algorithm.kl_reduction == "gated":
            return data.rollout.plan.update_sizes[index] / data.shaped.gated_per_update[index]
        if self.algorithm.kl_reduction == "microbatch":
            return (rows.stop - rows.start) / gated
        return 1.0

    def _with_reference(self, data: Data, timesteps: Tensor | None = None) -> Data:
        """Run the reference on the penalised rows; ``timesteps`` as in `reference_pass`."""
        before = self.sampler.model.rows
        data.reference = reference_pass(
            self.sampler,
            self.adapters,
            data.rollout,
            data.shaped.gated_rows,
            data.steps,
            timesteps,
            self.runtime,
        )
        data.reference_rows = self.sampler.model.rows - before
        return data

    def _outcome(self, losses_finite: Tensor, grad_norm: Tensor) -> Outcome:
        """What becomes of accumulated gradients; costs one small transfer to the host.

        Non-finite gradients under a loss scale are the scaler's way to find the scale: it lowers it
        and goes on. Only with no scale left, below 1, are they an error like any other.
        """
        bad = torch.stack([~losses_finite, ~grad_norm.isfinite()]).float()
        loss, gradient = self.runtime.sum(bad).tolist()
        scaler = self.runtime.accelerator.scaler
        if loss:
            if scaler is not None:  # the scale is not to blame and stays
                scaler.update(scaler.get_scale())
            return Outcome.BAD_LOSS
        if gradient and scaler is not None:
            scaler.update()
            if scaler.get_scale() >= 1.0:
                return Outcome.SCALED_DOWN
        return Outcome.BAD_GRADIENT if gradient else Outcome.MADE

    def _reduced_if(self, last: bool) -> AbstractContextManager[None]:
        """A forward and backward; only in an update's last are gradients reduced over processes.

        With full fine-tuning and sharded weights they are in each, because before it every process
        holds all of them, which is what sharding avoids.
        """
        if last or (self.runtime.sharded and isinstance(self.adapters, FullCopies)):
            return nullcontext()
        return self.runtime.accelerator.no_sync(self.sampler.model.module)

    def penalised(self, shaped: ShapedEpoch, plan: EpochPlan) -> ShapedEpoch:
        """The samples that carry the KL: the gated ones, or more with ``kl_when_ungated`` all.

        Then an update without a gated sample, or with ``kl_reduction: microbatch`` a micro-batch
        without one, penalises all of its samples, as published code does for DiffusionNFT.
        """
        if self.algorithm.kl_when_ungated == "none" or shaped.mode not in ("paper", "official"):
            return shaped
        rows, per_update = list(shaped.gated_rows), list(shaped.gated_per_update)
        for index, update in enumerate(plan.updates):
            if self.algorithm.kl_reduction == "microbatch":
                parts = plan.batches(index, plan.batch_size(self.train.batch_size))
            else:
                parts = [update] if per_update[index] == 0 else []
            added = [i for p in parts if _count(shaped.gated_rows, p) == 0 for i in _rows(p)]
            rows += added
            # how many the other processes add is theirs to know
            more = torch.tensor(float(len(added)), device=shaped.gate.device)
            per_update[index] += int(self.runtime.sum(more))
        gate = torch.zeros_like(shaped.gate)
        gate[torch.tensor(rows, dtype=torch.int64, device=gate.device)] = True
        return replace(
            shaped, gate=gate, gated_rows=tuple(sorted(rows)), gated_per_update=tuple(per_update)
        )


def _rows(rows: slice) -> range:
    return range(rows.start, rows.stop)


def _count(sorted_rows: Sequence[int], rows: slice) -> int:
    """How many of the sorted rows stand in a slice."""
    return bisect_left(sorted_rows, rows.stop) - bisect_left(sorted_rows, rows.start)


@dataclass
class MicroBatch:
    """A full batch of rows; padding repeats the last sample without advantage and gate.

    Attributes:
        size: rows without the padding.
        gated: how many of them carry the KL penalty.
        kl_weight: see `Algorithm.kl_weight`.
    """

    rows: Tensor
    size: int
    gated: int
    conditioning: Conditioning
    advantage: Tensor
    gate: Tensor
    kl_weight: float

    @classmethod
    def take(
        cls,
        data: EpochData,
        sampler: Sampler,
        rows: slice,
        batch_size: int,
        kl_weight: float = 0.0,
    ) -> MicroBatch:
        """Fill a batch with consecutive rows of an update; prompts are looked up once."""
        shaped, rollout = data.shaped, data.rollout
        index = padded_rows(rows, batch_size, torch.device("cpu"))
        conditioning = sampler.condition([rollout.prompts[i] for i in index.tolist()])
        device = rollout.log_prob.device
        index = index.to(device)
        size, gated = rows.stop - rows.start, _count(shaped.gated_rows, rows)
        real = torch.arange(batch_size, device=device) < size
        advantage = torch.where(real, shaped.advantage[index], 0.0)
        gate = shaped.gate[index] & real
        return cls(index, size, gated, conditioning, advantage, gate, kl_weight)
