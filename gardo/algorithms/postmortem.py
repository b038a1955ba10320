"""After too many updates that were not finite: find the batch to blame and dump it.

The update is gone through once more for it; in a healthy run nothing here runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gardo.algorithms.batches import MicroBatch
from gardo.algorithms.dump import write_dump
from gardo.algorithms.stats import Loss
from gardo.algorithms.update import Algorithm, Data
from gardo.distributed.process import Runtime
from gardo.run.health import Health, Outcome

_NAMED = 50
"""Parameters that a dump names at most."""


def write_postmortem(
    algorithm: Algorithm[Data],
    health: Health,
    outcome: Outcome,
    epoch: int,
    data: Data,
    index: int,
) -> str:
    """Dump the batch to blame, from the process of lowest rank that has one.

    All processes come here. Nothing is updated.

    Returns:
        where the dump is, in a sentence without its full stop.
    """
    runtime = algorithm.runtime
    suspect = look_again(algorithm, data, index)
    # no process may leave before all have taken part in this
    tensors = contents(algorithm, data, suspect)
    blamed = _lowest(runtime, suspect.own)
    if blamed is None:
        blamed = _lowest(runtime, suspect.bad)
    found, blamed = blamed is not None, blamed or 0
    path = health.folder / "failures" / f"epoch_{epoch:04d}_update_{index}_rank_{blamed}"
    lost = 0.0
    if runtime.rank == blamed:
        facts = {
            "epoch": epoch,
            "update": index,
            "rank": runtime.rank,
            "world_size": runtime.world_size,
            "cause": outcome.value,
            "found_again": found,
            "step": data.steps[suspect.k],
            "loss": str(suspect.loss),
            "parameters_not_finite": len(suspect.parameters),
            "first_parameters_not_finite": suspect.parameters[:_NAMED],
        }
        try:
            _write(path, data, suspect.batch, tensors, facts)
        except OSError as error:
            lost = 1.0
            health.say(f"no dump could be written: {error}")
    failed = bool(runtime.max(torch.tensor(lost, device=runtime.device)))
    dump = (
        f"Its batch could not be written to '{path}.safetensors'"
        if failed
        else f"Its batch is in '{path}.safetensors', what is known of it in '{path.name}.json'"
    )
    if not found:
        dump += " (going through it again gave finite numbers: suspect the hardware)"
    return dump


def _lowest(runtime: Runtime, mine: bool) -> int | None:
    """The lowest rank of the processes for which it holds."""
    size = runtime.world_size
    value = float(size - runtime.rank if mine else 0)
    highest = int(runtime.max(torch.tensor(value, device=runtime.device)))
    return size - highest if highest else None


def _write(
    path: Path,
    data: Data,
    batch: MicroBatch,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    count = batch.size or len(batch.rows)  # without the padding, if there is anything else
    index = batch.rows[:count].tolist()
    ids = data.rollout.plan.sample_ids[batch.rows[:count].cpu()].tolist()
    rows = {"sample_ids": ids, "prompts": [data.rollout.prompts[i] for i in index]}
    write_dump(path, {name: t[:count] for name, t in tensors.items()}, rows, facts)


@dataclass
class Suspect:
    """A micro-batch at its ``k``-th trained step.

    Attributes:
        loss: weighted, as it entered the gradient.
        out: what the algorithm's loss gave.
        parameters: those with a gradient that is not finite, in the order of the backward pass.
        shared: whether that is known only of gradients that all processes have added to.
    """

    batch: MicroBatch
    k: int
    loss: float
    out: Loss
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


def look_again(algorithm: Algorithm[Data], data: Data, index: int) -> Suspect:
    """Go through the backwards of an update again, one by one, and drop their gradients.

    Returns:
        the first that is not finite, if possible on this process; else the first of all.
    """
    parameters = algorithm.adapters.parameters()
    module = algorithm.sampler.model.transformer if algorithm.runtime.sharded else None
    weight = algorithm.weight(data, index)
    suspects: list[Suspect] = []
    with _gradients_seen(parameters, module) as seen:
        for batch, k, _ in algorithm.passes(data, index):
            out = algorithm.loss(data, batch, k)
            loss = out.loss * weight
            seen.clear()
            loss.backward()
            suspect = Suspect(batch, k, float(loss.detach()), out)
            suspect.parameters = [name for name, finite in seen if not finite]
            if not suspect.bad:
                suspect.parameters = [n for n, p in parameters.items() if not _is_finite(p)]
                suspect.shared = True
            if suspect.bad or not suspects:
                suspects.append(suspect)
            for parameter in parameters.values():
                parameter.grad = None
    own, bad = (s for s in suspects if s.own), (s for s in suspects if s.bad)
    found = next(own, None) or next(bad, None) or next(iter(suspects), None)
    if found is None:
        raise ValueError("expected an update of at least one batch")
    return found


@torch.no_grad()
def contents(algorithm: Algorithm[Data], data: Data, suspect: Suspect) -> dict[str, Tensor]:
    """What a micro-batch's loss is made of and what it gave per sample, ``[B, ...]`` each.

    Runs the policy once.
    """
    batch = suspect.batch
    x = data.at(suspect.k, batch.rows)
    velocity = algorithm.sampler.velocity(x.latents, x.timesteps, batch.conditioning)
    found = {
        **vars(x),
        "velocity": velocity.cond,
        "velocity_uncond": velocity.uncond,
        **suspect.out._asdict(),
        "advantage": batch.advantage,
        "gate": batch.gate,
        # meaningful where the gate holds
        "reference_velocity": data.ref_velocity(suspect.k, batch),
    }
    return {n: t for n, t in found.items() if isinstance(t, Tensor) and t.dim() > 0}


@contextmanager
def _gradients_seen(
    parameters: Mapping[str, nn.Parameter], sharded: nn.Module | None
) -> Iterator[list[tuple[str, Tensor]]]:
    """Collect, as they come, whose gradients are finite.

    Where parameters are sharded, those of the layers of the module that has them: a sharded
    parameter's gradient is a mean over processes, what its layer gets is not.
    """
    seen: list[tuple[str, Tensor]] = []

    def look(name: str, gradient: Tensor) -> None:
        seen.append((name, gradient.isfinite().all()))

    def look_at_layer(name: str, layer: nn.Module, to: Any, came: Any) -> None:
        gradients = [g for g in (*to, *came) if g is not None]
        if gradients:
            seen.append((name, torch.stack([g.isfinite().all() for g in gradients]).all()))

    hooks = [p.register_hook(partial(look, n)) for n, p in parameters.items()]
    for name, module in () if sharded is None else sharded.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            hooks.append(module.register_full_backward_hook(partial(look_at_layer, name)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _is_finite(parameter: nn.Parameter) -> bool:
    gradient = parameter.grad
    if gradient is None:
        return True
    local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return bool(local.isfinite().all())
