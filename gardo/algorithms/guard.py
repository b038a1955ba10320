"""Updates that are left out when their numbers are not finite; too many in a row end the run.

The batch to blame is looked for only then, by going through the update once more: in a healthy run
it costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gardo.algorithms.update import Algorithm, EpochData, MicroBatch, UpdateStats
from gardo.run.dump import write_dump
from gardo.run.health import Health, Outcome
from gardo.types import UserError

_NAMED = 50
"""Parameters that a dump names at most."""


class GuardedUpdates:
    """The updates of a run, counted by its health."""

    def __init__(self, algorithm: Algorithm, health: Health) -> None:
        self.algorithm, self.health = algorithm, health
        self.runtime = algorithm.runtime

    def __call__(self, epoch: int, data: EpochData, index: int, stats: UpdateStats) -> bool:
        """Make update ``index`` of an epoch; returns whether it was made.

        Raises:
            UserError: too many in a row were not, on all processes; the batch to blame is dumped.
        """
        outcome = self.algorithm.update(data, index, stats)
        if self.health.count(outcome, epoch, index):
            raise UserError(self._explain(outcome, epoch, data, index))
        return outcome is Outcome.MADE

    def _explain(self, outcome: Outcome, epoch: int, data: EpochData, index: int) -> str:
        """Dump the batch to blame, from the process of lowest rank that has one; the message."""
        suspect = self._look_again(data, index)
        runtime = self.runtime
        # no process may leave before all have taken part in this
        tensors = self.algorithm.contents(data, suspect.batch, suspect.step_index)
        blamed = self._lowest(suspect.own)
        if blamed is None:
            blamed = self._lowest(suspect.bad)
        found, blamed = blamed is not None, blamed or 0
        path = self.health.folder / "failures" / f"epoch_{epoch:04d}_update_{index}_rank_{blamed}"
        lost = 0.0
        if runtime.rank == blamed:
            facts = {
                "epoch": epoch,
                "update": index,
                "rank": runtime.rank,
                "world_size": runtime.world_size,
                "cause": outcome.value,
                "found_again": found,
                **suspect.facts(data),
            }
            try:
                self._write(path, data, suspect, tensors, facts)
            except OSError as error:
                lost = 1.0
                self.health.say(f"no dump could be written: {error}")
        failed = bool(runtime.max(torch.tensor(lost, device=runtime.device)))
        dump = (
            f"Its batch could not be written to '{path}.safetensors'"
            if failed
            else f"Its batch is in '{path}.safetensors', what is known of it in '{path.name}.json'"
        )
        if not found:
            dump += " (going through it again gave finite numbers: suspect the hardware)"
        count = self.health.skipped_in_a_row
        updates = "1 update was" if count == 1 else f"{count} updates in a row were"
        return (
            f"{updates} left out, the last one "
            f"(epoch {epoch}, update {index}) for {outcome.value}. {dump}. Weights and earlier "
            "checkpoints are as they were. Try a smaller train.learning_rate or "
            "algorithm.adv_clip, precision bf16 or fp32 instead of fp16, from an earlier "
            "checkpoint if it keeps happening; health.max_skipped_in_a_row is "
            f"{self.health.config.max_skipped_in_a_row}"
        )

    def _lowest(self, mine: bool) -> int | None:
        """The lowest rank of the processes for which it holds."""
        size = self.runtime.world_size
        value = float(size - self.runtime.rank if mine else 0)
        highest = int(self.runtime.max(torch.tensor(value, device=self.runtime.device)))
        return size - highest if highest else None

    def _look_again(self, data: EpochData, index: int) -> Suspect:
        module = self.algorithm.sampler.model.transformer if self.runtime.sharded else None
        probe = _Probe(self.algorithm.adapters.parameters(), module)
        with probe.watching():
            self.algorithm.go_through(data, index, probe)
        return probe.suspect()

    def _write(
        self,
        path: Any,
        data: EpochData,
        suspect: Suspect,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
    ) -> None:
        batch, rollout = suspect.batch, data.rollout
        count = batch.size or len(batch.rows)  # without the padding, if there is anything else
        index = batch.rows[:count].tolist()
        ids = rollout.plan.sample_ids[batch.rows[:count].cpu()].tolist()
        rows = {"sample_ids": ids, "prompts": [rollout.prompts[i] for i in index]}
        write_dump(path, {name: t[:count] for name, t in tensors.items()}, rows, facts)


@dataclass
class Suspect:
    """A micro-batch at one trained step.

    Attributes:
        loss: weighted, as it entered the gradient.
        parameters: those with a gradient that is not finite, in the order of the backward pass.
        shared: whether that is known only of gradients that all processes have added to.
    """

    batch: MicroBatch
    step_index: int
    loss: float
    parameters: list[str] = field(default_factory=list)
    shared: bool = False

    @property
    def bad(self) -> bool:
        """Whether the loss or a gradient is not finite."""
        return not math.isfinite(self.loss) or bool(self.parameters)

    @property
    def own(self) -> bool:
        """Whether that is so on this process."""
        return not math.isfinite(self.loss) or bool(self.parameters and not self.shared)

    def facts(self, data: EpochData) -> dict[str, Any]:
        return {
            "step": data.steps[self.step_index],
            "loss": str(self.loss),
            "parameters_not_finite": len(self.parameters),
            "first_parameters_not_finite": self.parameters[:_NAMED],
        }


class _Probe:
    """Goes through the backwards of an update one by one and keeps the first that is not finite."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], sharded: nn.Module | None) -> None:
        """Watch parameters or, where they are sharded, the layers of the module that has them."""
        self.parameters, self.sharded = parameters, sharded
        self._all: list[Suspect] = []
        self._seen: list[tuple[str, Tensor]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = [p.register_hook(partial(self._look, n)) for n, p in self.parameters.items()]
        for name, module in () if self.sharded is None else self.sharded.named_modules():
            # a sharded parameter's gradient is a mean over processes; what its layer gets is not
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                hooks.append(module.register_full_backward_hook(partial(self._look_at_layer, name)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self, loss: Tensor, batch: MicroBatch, step_index: int) -> None:
        """Backward through a loss, whose gradient is then dropped."""
        self._seen = []
        loss.backward()
        suspect = Suspect(batch, step_index, float(loss.detach()))
        suspect.parameters = [name for name, finite in self._seen if not finite]
        if not suspect.bad:
            suspect.parameters = [n for n, p in self.parameters.items() if not _is_finite(p)]
            suspect.shared = True
        if suspect.bad or not self._all:
            self._all.append(suspect)
        for parameter in self.parameters.values():
            parameter.grad = None

    def suspect(self) -> Suspect:
        """The first that is not finite, if possible on this process; else the first of all."""
        own, bad = (s for s in self._all if s.own), (s for s in self._all if s.bad)
        found = next(own, None) or next(bad, None) or next(iter(self._all), None)
        if found is None:
            raise ValueError("expected an update of at least one batch")
        return found

    def _look(self, name: str, gradient: Tensor) -> None:
        self._seen.append((name, gradient.isfinite().all()))

    def _look_at_layer(self, name: str, layer: nn.Module, to: Any, came: Any) -> None:
        gradients = [g for g in (*to, *came) if g is not None]
        if gradients:
            self._seen.append((name, torch.stack([g.isfinite().all() for g in gradients]).all()))


def _is_finite(parameter: nn.Parameter) -> bool:
    gradient = parameter.grad
    if gradient is None:
        return True
    local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return bool(local.isfinite().all())
