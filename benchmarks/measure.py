"""Builds a workload, verifies it and times an epoch of it, ours and the baseline's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.clock import STAGES, StageClock
from benchmarks.official_epoch import OfficialEpoch, check_supported
from benchmarks.our_epoch import OurEpoch
from benchmarks.sampling import baseline_batch, our_batch, time_in_turns, time_variants
from benchmarks.verify import verify
from benchmarks.workload import Workload, build_workload, store_weights
from gardo.config import Config
from gardo.distributed.process import Runtime
from gardo.models.architectures import Architecture
from gardo.models.loading import configure
from gardo.types import UserError

MIB = 2**20
SUMS = ("rollout", "training", "epoch")


@dataclass
class Repeated:
    """Epochs of one way of running them."""

    name: str
    epoch: Callable[[StageClock], dict[str, float]]
    clocks: list[StageClock] = field(default_factory=list)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def once(self, device: torch.device, memory: bool = False) -> StageClock:
        """Run one epoch. Raises UserError if its loss is not a number."""
        clock = StageClock(device, memory)
        metrics = self.epoch(clock)
        broken = [name for name, value in metrics.items() if value != value]
        if broken:
            raise UserError(f"{self.name}: not a number: {', '.join(broken)}")
        return clock

    def as_json(self) -> dict[str, Any]:
        """Median seconds per stage and in sum, and peak memory per stage."""
        seconds = {name: median(c.seconds[name] for c in self.clocks) for name in STAGES}
        seconds |= {name: median(getattr(c, name) for c in self.clocks) for name in SUMS}
        return {
            "seconds": seconds,
            "epochs": [clock.epoch for clock in self.clocks],
            "peak_mib": {name: size / MIB for name, size in self.peak_bytes.items()},
        }


def measure(
    config: Config,
    model: str,
    arch: Architecture | None,
    *,
    baseline: bool,
    warmup: int,
    repeats: int,
) -> dict[str, Any]:
    """Time an epoch.

    Args:
        config: of `benchmarks.workload.settings`.
        model: its name.
        arch: built with random weights; None: ``model.path`` is loaded.
        baseline: verify and time the published way, too.
        warmup, repeats: epochs of each way that are not timed, and that are.

    Returns:
        all that is reported, as JSON values.

    Raises:
        UserError: a setting that does not fit.
        VerificationFailed: baseline and library compute different numbers.
    """
    runtime = Runtime(config.device, config.precision, config.threads)
    say(f"building {model}")
    work = build_workload(config, runtime, arch, model)
    errors = None
    if baseline:
        check_supported(work)
        say("verifying that baseline and library compute the same numbers")
        errors = verify(work)
    work.model.module = runtime.accelerator.prepare(work.model.transformer)
    official = OfficialEpoch(work) if baseline else None
    if official is not None and _in_turns(work):
        runs, ours, sampling = _both_in_turns(work, official, warmup, repeats)
    else:
        runs, ours, sampling = _one_by_one(work, official, warmup, repeats)
    result = {
        **_settings(work, model, arch is not None),
        "trained_steps": ours.trained_steps,
        "gated_share": ours.gated_share,
        "cuda_graph": ours.sampler.graphs is not None,
        "repeats": repeats,
        "errors": errors,
        "reference_rows": ours.reference_rows,
        "sampling": sampling,
        **{run.name: run.as_json() for run in runs},
    }
    if official is not None:
        result["baseline_reference_rows"] = official.reference_rows
        theirs = result["baseline"]["seconds"]
        result["ratio"] = {
            name: theirs[name] / seconds
            for name, seconds in result["ours"]["seconds"].items()
            if seconds and theirs[name] and name not in ("reference", "update")
        }
    return result


def _in_turns(work: Workload) -> bool:
    """Whether both ways can use the model as it is, so that they may take turns."""
    model = work.config.model
    plain = not model.compile and model.attention_backend is None
    return plain and work.dtype == torch.float32 and work.device.type == "cpu"


_Measured = tuple[list[Repeated], OurEpoch, list[dict[str, Any]]]


def _both_in_turns(work: Workload, official: OfficialEpoch, warmup: int, repeats: int) -> _Measured:
    """Alternate, so that what else the machine does meets both alike."""
    ours = OurEpoch(work)
    runs = [Repeated("baseline", official.run), Repeated("ours", ours.run)]
    _repeat(runs, work, warmup, repeats)
    batches = {"baseline": baseline_batch(work, official), "eager": our_batch(work, graph=False)}
    return runs, ours, time_in_turns(work, repeats, batches)


def _one_by_one(
    work: Workload, official: OfficialEpoch | None, warmup: int, repeats: int
) -> _Measured:
    """The baseline on float32 weights first; then the model is made ready for ours, for good."""
    model, wanted, sampling = work.model, work.config.model, []
    runs = []
    if official is not None:
        runs.append(Repeated("baseline", official.run))
        _repeat(runs, work, warmup, repeats)
        sampling += time_in_turns(work, repeats, {"baseline": baseline_batch(work, official)})
        official.forget()
    model.release_text_encoders()
    store_weights(model.transformer, work.dtype)
    sampling += time_variants(work, repeats, "eager")
    configure(model, wanted)
    ours = OurEpoch(work)
    runs.append(Repeated("ours", ours.run))
    _repeat(runs[-1:], work, warmup, repeats)
    if work.device.type == "cuda":
        if not wanted.compile:
            model.compile_blocks()
        say("sampling with compiled transformer blocks")
        sampling += time_variants(work, repeats, "compiled")
    return runs, ours, sampling


def _repeat(runs: list[Repeated], work: Workload, warmup: int, repeats: int) -> None:
    """Run the epochs; memory is measured in one more that is not timed."""
    for number in range(warmup + repeats):
        for each in runs:
            clock = each.once(work.device)
            if number >= warmup:
                each.clocks.append(clock)
            what = "timed" if number >= warmup else "warming up"
            say(f"{each.name}, epoch {number + 1} ({what}): {clock.epoch:.2f} s")
    for each in runs:
        each.peak_bytes = each.once(work.device, memory=True).peak_bytes


def _settings(work: Workload, model: str, random_weights: bool) -> dict[str, Any]:
    config = work.config
    return {
        "model": model,
        "weights": "random" if random_weights else "loaded",
        "recipe": config.recipe,
        "hardware": work.runtime.hardware(),
        "device": work.device.type,
        "torch": torch.__version__,
        "precision": config.precision,
        "samples": len(work.plan.sample_ids),
        "prompts": config.prompts.per_epoch,
        "group_size": config.prompts.group_size,
        "batch_size": work.plan.batch_size(config.sampling.batch_size),
        "resolution": work.resolution,
        "num_steps": work.table.num_steps,
        "guidance_scale": config.sampling.guidance_scale,
        "updates": config.train.updates_per_epoch,
        "rewards": work.rewards.training_names,
        "compile": config.model.compile,
        "attention_backend": config.model.attention_backend,
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "text_encoders": work.encodes,
        "encode_once_seconds": work.encode_seconds,
    }


def say(text: str) -> None:
    """Report progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)
