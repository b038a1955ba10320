"""What the algorithms share: the update that they make of an epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from gardo.algorithms.batches import EpochData, MicroBatch
from gardo.algorithms.penalty import kl_weight
from gardo.algorithms.reference import reference_pass
from gardo.algorithms.shaping import ShapedEpoch
from gardo.algorithms.stats import Loss, UpdateStats
from gardo.algorithms.strength import KLStrength
from gardo.checkpointing.state_tensors import whole
from gardo.config import AlgorithmConfig, Config, TrainConfig, Traits
from gardo.distributed.process import Runtime
from gardo.models.adapters import POLICY, REFERENCE, Adapters, FullCopies
from gardo.models.base import Schedule
from gardo.run.health import Outcome
from gardo.sampling.rollout import Rollout, Sampler
from gardo.sampling.steps import StepTable, sde_window, step_table

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
        self.strength = KLStrength(algorithm)
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

        A sample's KL weighs ``strength.coefficient * batch.kl_weight``.
        """

    def kl_scale(self, data: Data, k: int) -> Tensor | float:
        """A sample's KL at a trained step, where the mean square difference of velocities is 1."""
        return 1.0

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
            with self.reduced_if(last):
                out = self.loss(data, batch, k)
                self.runtime.accelerator.backward(out.loss * weight)
            clip_range, advantage = self.algorithm.clip_range, batch.advantage
            stats.add(out, batch.size, batch.gated, batch.kl_weight, clip_range, advantage)

    def passes(self, data: Data, index: int) -> Iterator[tuple[MicroBatch, int, bool]]:
        """The micro-batches of an update at each trained step, and whether it is the last pass."""
        plan = data.rollout.plan
        size = plan.batch_size(self.train.batch_size)
        parts = plan.batches(index, size)
        for rows in parts:
            self.runtime.stop_point()
            weight = kl_weight(self.algorithm, data, index, rows)
            batch = MicroBatch.take(data, self.sampler, rows, size, weight)
            for k in range(len(data.steps)):
                yield batch, k, rows is parts[-1] and k + 1 == len(data.steps)

    def weight(self, data: Data, index: int) -> float:
        """Of a sample's loss at a step, so that the update's is a mean over both.

        Gradients are averaged over processes. They depend neither on the number of processes nor
        on the batch size, unless `kl_weight` does.
        """
        return self.runtime.world_size / (data.rollout.plan.update_sizes[index] * len(data.steps))

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

    def reduced_if(self, last: bool) -> AbstractContextManager[None]:
        """A forward and backward; only in an update's last are gradients reduced over processes.

        With full fine-tuning and sharded weights they are in each, because before it every process
        holds all of them, which is what sharding avoids.
        """
        if last or (self.runtime.sharded and isinstance(self.adapters, FullCopies)):
            return nullcontext()
        return self.runtime.accelerator.no_sync(self.sampler.model.module)
