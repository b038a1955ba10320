"""The plan as text of 80 columns and as JSON."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from gardo.config import Config
from gardo.families import Architecture
from gardo.models.architectures import Counts
from gardo.planning.advice import Advice
from gardo.planning.counts import EpochCounts
from gardo.planning.estimate import Rates, TimeEstimate
from gardo.planning.memory import GIB, MemoryEstimate

WIDTH = 80


@dataclass(frozen=True)
class Plan:
    """Everything that `python -m gardo.plan` found out.

    Attributes:
        gpu: what the plan is for, in words.
        limit: bytes of memory of one GPU.
        advice: changes to make it fit, and `advised`, its memory with them; None if it fits.
        prompts: distinct prompts; None where they cannot be read.
    """

    config: Config
    architecture: Architecture
    parameters: Counts
    trainable: int
    gpu: str
    limit: float
    counts: EpochCounts
    memory: MemoryEstimate
    rates: Rates
    time: TimeEstimate
    advice: Advice | None
    advised: MemoryEstimate | None
    prompts: int | None


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values; sizes in bytes, times in seconds."""
    memory, advice = plan.memory, plan.advice
    return {
        "recipe": plan.config.recipe,
        "model": plan.architecture.name,
        "parameters": {**asdict(plan.parameters), "trainable": plan.trainable},
        "gpu": plan.gpu,
        "counts": asdict(plan.counts),
        "prompts": plan.prompts,
        "memory": {
            "limit": plan.limit,
            "fits": memory.peak <= plan.limit,
            "peak": memory.peak,
            "stages": memory.stages,
            "items": {item.name: item.bytes for item in memory.items},
        },
        "time": {"epoch": plan.time.epoch, "stages": plan.time.stages, **asdict(plan.rates)},
        "changes": [asdict(change) for change in advice.changes] if advice else [],
        "fits_with_changes": advice.fits if advice else None,
    }


def as_text(plan: Plan) -> str:
    """The plan for reading, at most 80 columns wide."""
    c = plan.counts
    lines = [
        f"Plan of {plan.config.recipe} on {plan.gpu}",
        *_wrap(
            "Memory and time are estimates. Rows and batches are exact for the expected share of "
            "gated samples."
        ),
        "",
        "EPOCH",
        _row("samples", c.samples, f"{c.prompts} prompts x {c.group_size}"),
        _row("optimizer steps", c.updates, f"of {c.samples / c.updates:g} samples"),
        _row(
            "samples per process",
            c.samples_per_process,
            _plural(c.processes, "process", "processes"),
        ),
        _row(
            "rollout batches",
            c.rollout_batches,
            f"of {c.rollout_batch} per process{_padding(c.padded_rollout)}",
        ),
        _row(
            "training batches",
            c.train_batches,
            f"of {c.train_batch} per process{_padding(c.padded_train)}",
        ),
        "",
        "TRANSFORMER ROWS PER EPOCH, all processes",
        _row("rollout", c.rollout_rows, f"{c.num_steps} steps{_guidance(c)}"),
        *(
            [_row("behaviour policy", c.behaviour_rows, f"{c.trained_steps} noise levels")]
            if c.behaviour_rows
            else []
        ),
        _row(
            "reference",
            c.reference_rows,
            f"{c.trained_steps} steps, {c.gated_share:.1%} gated (expected)",
        ),
        _row("training", c.train_rows, f"{c.trained_steps} steps, forward and backward"),
        "",
        *_memory(plan),
        "",
        "TIME PER EPOCH, without rewards, communication and saving",
        *(_row(name, _seconds(s)) for name, s in plan.time.stages.items()),
        _row("epoch", _seconds(plan.time.epoch)),
        *_wrap(f"Rates: {plan.rates.source}."),
        "",
        *_changes(plan),
    ]
    return "\n".join(lines)


def _memory(plan: Plan) -> list[str]:
    p, memory = plan.parameters, plan.memory
    total = p.transformer + p.buffers
    lines = [
        "MEMORY PER GPU, GiB",
        *(_row(item.name, _gib(item.bytes)) for item in memory.items),
        "  at the highest point of",
        *(_row(f"  {name}", _gib(size)) for name, size in memory.stages.items()),
    ]
    free = plan.limit - memory.peak
    verdict = f"{_gib(free)} GiB free" if free >= 0 else f"{_gib(-free)} GiB too much"
    lines.append(_row("GPU", _gib(plan.limit), verdict))
    lines += _wrap(
        f"{plan.architecture.name}: {_count(total)} parameters, {_count(plan.trainable)} trained. "
        "Highest points include 1 GiB for the CUDA context and 5% for fragmentation, both assumed."
    )
    if plan.prompts is None:
        lines += _wrap(
            "The prompts cannot be read here; only the embeddings of one epoch's are counted, at "
            f"{memory.embedding_bytes / 2**20:.2f} MiB per prompt."
        )
    return lines


def _changes(plan: Plan) -> list[str]:
    advice = plan.advice
    if advice is None or plan.advised is None:
        return ["FITS"]
    lines = ["DOES NOT FIT"]
    if advice.fits:
        lines[0] += "; it does with"
        lines += [f"  {change!s:<44}{change.reason}" for change in advice.changes]
        lines.append(f"  which needs {_gib(plan.advised.peak)} GiB.")
        return lines
    lines += _wrap(
        f"With every change known here it still needs {_gib(plan.advised.peak)} GiB, at "
        f"'{plan.advised.worst_stage}'. Use a larger GPU or a smaller model."
    )
    return lines


def _row(name: str, value: Any, remark: str = "") -> str:
    return f"  {name:<32}{value:>9}  {remark}".rstrip()


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH - 2, initial_indent="  ", subsequent_indent="  ")


def _padding(padded: int) -> str:
    return f", {padded} padded" if padded else ""


def _guidance(counts: EpochCounts) -> str:
    return ", with the empty prompt" if counts.rows_per_sample == 2 else ""


def _plural(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
