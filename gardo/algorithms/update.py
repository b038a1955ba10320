"""What the algorithms share: an epoch's data, micro-batches, the KL's weights and the figures."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from gardo.algorithms.reference import RowVelocities
from gardo.algorithms.shaping import ShapedEpoch
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

Probe = Callable[[Tensor, "MicroBatch", int], None]


@dataclass
class EpochData:
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


class Algorithm(ABC):
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
        self._probe: Probe | None = None

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

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """The block in which rollouts are drawn, by the policy or, for some, by another one."""
        if self.sampled_by == POLICY:
            yield
            return
        self.sampler.weights = self.sampled_by
        try:
            with self.adapters.use(self.sampled_by):
                yield
        finally:
            self.sampler.weights = POLICY

    @abstractmethod
    def prepare(
        self, rollout: Rollout, shaped: ShapedEpoch, schedule: Schedule, seed: int, epoch: int
    ) -> EpochData:
        """Choose what is trained, and run all forwards that need no gradient.

        Args:
            schedule: of the rollout.
            seed: the run's; everything random is a function of it, the epoch and sample ids.
        """

    def update(self, data: EpochData, index: int, stats: UpdateStats) -> Outcome:
        """Make the epoch's optimizer step number ``index``, unless its numbers are not finite.

        Every batch is weighted by its share of the update, so that the gradient depends neither on
        the batch size nor on the number of processes (unless ``kl_reduction`` is ``microbatch``).

        Returns:
            what became of it, the same on all processes. A step that was not made leaves weights,
            optimizer and ``stats`` as they were.
        """
        self._accumulate_gradients(data, index, stats)
        accelerator = self.runtime.accelerator
        norm = whole(accelerator.clip_grad_norm_(self.parameters, self.train.max_grad_norm))
        outcome = self._outcome(stats.losses_finite(), norm)
        if outcome is Outcome.MADE:
            self.optimizer.step()
            stats.finish_update(norm, data.shaped.gated_per_update[index])
        else:
            stats.drop_update()
        self.optimizer.zero_grad(set_to_none=True)
        return outcome

    def go_through(self, data: EpochData, index: int, probe: Probe) -> None:
        """Go through the batches of an update again; ``probe`` gets each loss in place of backward.

        Nothing is updated. All processes must come here.
        """
        self._probe = probe
        try:
            self._accumulate_gradients(data, index, UpdateStats())
        finally:
            self._probe = None

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

    @abstractmethod
    def _accumulate_gradients(self, data: EpochData, index: int, stats: UpdateStats) -> None:
        """Backward through every micro-batch of an update."""

    def _backward(self, loss: Tensor, batch: MicroBatch, step_index: int) -> None:
        """Backward through a micro-batch at one trained step, or what `go_through` does instead."""
        if self._probe is not None:
            self._probe(loss, batch, step_index)
        else:
            self.runtime.accelerator.backward(loss)

    @contextmanager
    def _gradients(self, last: bool) -> Iterator[None]:
        """A forward and backward; only in an update's last are gradients reduced over processes.

        With full fine-tuning and sharded weights they are in each, because before it every process
        holds all of them, which is what sharding avoids.
        """
        kept_whole = self.runtime.sharded and isinstance(self.adapters, FullCopies)
        if last or kept_whole or self._probe is not None:
            yield
            return
        with self.runtime.accelerator.no_sync(self.sampler.model.module):
            yield

    @abstractmethod
    def contents(self, data: EpochData, batch: MicroBatch, step_index: int) -> dict[str, Tensor]:
        """What a micro-batch's loss at a trained step is made of, ``[B, ...]`` each.

        Runs the policy once, without gradients.
        """

    def finish_epoch(self, optimizer_steps: int) -> dict[str, float]:
        """After an epoch's updates; ``optimizer_steps`` counts those of the whole run.

        Returns:
            further metrics.
        """
        return {}

    def penalised(self, shaped: ShapedEpoch, plan: EpochPlan) -> ShapedEpoch:
        """The samples that carry the KL: the gated ones, or more with ``kl_when_ungated: all``.

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

    def kl_weight(self, data: EpochData, index: int, rows: slice) -> float:
        """What the KL of a penalised sample in these rows is multiplied by in its update's loss.

        Without ``kl_coef``; the mean over steps comes on top.
        """
        shaped, size = data.shaped, data.rollout.plan.update_sizes[index]
        if data.reference is None:
            return 0.0
        if self.algorithm.kl_reduction == "batch":
            return 1 / size
        if self.algorithm.kl_reduction == "gated":
            return 1 / max(shaped.gated_per_update[index], 1)
        share = (rows.stop - rows.start) / size
        return share / max(_count(shaped.gated_rows, rows), 1)


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
    """

    rows: Tensor
    size: int
    gated: int
    real: Tensor
    conditioning: Conditioning
    advantage: Tensor
    gate: Tensor

    @classmethod
    def take(cls, data: EpochData, sampler: Sampler, rows: slice, batch_size: int) -> MicroBatch:
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
        return cls(index, size, gated, real, conditioning, advantage, gate)


@dataclass
class UpdateStats:
    """Sums over an epoch's updates, kept on the device until `metrics` reads them once.

    Attributes:
        judged_by: which KL `metrics` hands to the adaptive reference: ``epoch``, the mean over the
            gated samples; ``update``, the largest KL term that an optimizer step had in its loss.
    """

    judged_by: str = "epoch"
    policy_loss: list[Tensor] = field(default_factory=list)
    total_loss: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    kl_term: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)
    samples: float = 0.0
    ratio_deviation: list[Tensor] = field(default_factory=list)
    ratio_distance: list[Tensor] = field(default_factory=list)
    grad_norm: list[Tensor] = field(default_factory=list)
    call_ends: list[int] = field(default_factory=list)
    gated: int = 0
    _samples_made: float = 0.0

    def add(
        self, policy: Tensor, total: Tensor, kl_sum: Tensor, kl_weight: float, samples: float
    ) -> None:
        """Add one kernel call.

        Args:
            policy, total: losses summed over the samples of the call.
            kl_sum: KL summed over its penalised samples.
            kl_weight: see `Algorithm.kl_weight`.
            samples: how many they are; like the sums, divided by the number of trained steps.
        """
        self.policy_loss.append(policy.detach())
        self.total_loss.append(total.detach())
        self.kl.append(kl_sum.detach())
        self.kl_term.append(kl_sum.detach() * kl_weight)
        self.samples += samples

    def add_ratio(
        self, ratio: Tensor, real: Tensor, share: float, clip_range: float | tuple[float, float]
    ) -> None:
        """Add the ratios of one call; ``share`` is 1 over the number of trained steps."""
        ratio = ratio.detach()
        distance = torch.where(real, (ratio - 1).abs(), 0.0)
        self.clipped.append((_outside(ratio, clip_range) & real).sum() * share)
        self.ratio_distance.append(distance.sum() * share)
        if not self.grad_norm:  # before the first step the policy is still the one that sampled
            self.ratio_deviation.append(distance.max())

    def finish_update(self, grad_norm: Tensor, gated: int) -> None:
        """Close an optimizer step; ``gated`` counts its gated samples over all processes."""
        self.grad_norm.append(grad_norm.detach())
        self.call_ends.append(len(self.kl))
        self.gated += gated
        self._samples_made = self.samples

    def losses_finite(self) -> Tensor:
        """Whether all losses since the last step are finite, on this process; 0-d bool."""
        return torch.stack(self.total_loss[self._calls_made :]).isfinite().all()

    def drop_update(self) -> None:
        """Forget the calls since the last step, which is not followed by another one."""
        for calls in (self.policy_loss, self.total_loss, self.kl, self.kl_term):
            del calls[self._calls_made :]
        del self.clipped[self._calls_made :], self.ratio_distance[self._calls_made :]
        if not self.grad_norm:
            self.ratio_deviation.clear()
        self.samples = self._samples_made

    @property
    def _calls_made(self) -> int:
        return self.call_ends[-1] if self.call_ends else 0

    def metrics(self, runtime: Runtime) -> tuple[dict[str, float], float | None]:
        """The epoch's figures over all processes, and the KL that the reference is judged by.

        The latter is None if no sample was gated. Updates that were left out do not count; if all
        were, the figures are NaN.
        """
        if not self.grad_norm:
            return dict.fromkeys(("loss/policy", "loss/total", "kl", "grad_norm"), math.nan), None
        starts = [0, *self.call_ends[:-1]]
        sums = [self.policy_loss, self.total_loss, self.kl, self.clipped, self.ratio_distance]
        sums += [self.kl_term[a:b] for a, b in zip(starts, self.call_ends, strict=True)]
        device = runtime.device
        none = torch.zeros(1, dtype=torch.float64, device=device)
        local = [torch.stack(some).double().sum().reshape(1) if some else none for some in sums]
        count = torch.tensor([self.samples], dtype=torch.float64, device=device)
        samples, policy, total, kl_sum, clipped, distance, *terms = runtime.sum(
            torch.cat([count, *local])
        ).tolist()
        mean = kl_sum / self.gated if self.gated else None
        figures = {
            "loss/policy": policy / samples,
            "loss/total": total / samples,
            "kl": 0.0 if mean is None else mean,
        }
        if self.ratio_deviation:
            deviation = runtime.max(torch.stack(self.ratio_deviation).max())
            figures["clip_fraction"] = clipped / samples
            figures["ratio/max_abs_dev"] = float(deviation)
            figures["ratio/mean_abs_dev"] = distance / samples
        figures["grad_norm"] = float(torch.stack(self.grad_norm).mean())
        return figures, max(terms) if mean is not None and self.judged_by == "update" else mean


def _outside(ratio: Tensor, clip_range: float | tuple[float, float]) -> Tensor:
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    return (ratio < 1 - low) | (ratio > 1 + high)
