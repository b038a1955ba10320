"""``python -m benchmarks.epoch --model sd35-medium --random-weights --baseline``: a whole epoch.

Rollout, shaping, reference pass and updates with a recipe's settings, timed stage by stage; with
``--baseline`` also the way published trainers run them, after both were found to compute the same.
See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from gardo import cli
from gardo.types import UserError

# option -> configuration keys that it sets
OVERRIDES = {
    "prompts": ["prompts.per_epoch"],
    "group_size": ["prompts.group_size"],
    "batch_size": ["sampling.batch_size", "train.batch_size"],
    "steps": ["sampling.num_steps"],
    "resolution": ["sampling.resolution"],
    "guidance": ["sampling.guidance_scale"],
    "updates": ["train.updates_per_epoch"],
    "precision": ["precision"],
    "cuda_graph": ["sampling.cuda_graph"],
    "attention_backend": ["model.attention_backend"],
    "compile": ["model.compile"],
    "gradient_checkpointing": ["model.gradient_checkpointing"],
    "device": ["device"],
    "threads": ["threads"],
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print its table. Returns the exit code; raises UserError."""
    options = _parser().parse_args(argv)
    for name, least in (("repeats", 1), ("warmup", 0)):
        if getattr(options, name) < least:
            raise UserError(
                f"--{name}: expected a number of at least {least}, got {getattr(options, name)}"
            )
    # kineto, which measures memory on a CPU, tells of every start and stop; read when torch loads
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from benchmarks.measure import measure
    from benchmarks.verify import VerificationFailed
    from benchmarks.workload import settings
    from gardo.models.architectures import architecture

    config = settings(
        options.model,
        random_weights=options.random_weights,
        gated=options.gated,
        overrides=[
            (key, str(getattr(options, name)))
            for name, keys in OVERRIDES.items()
            for key in keys
            if getattr(options, name) is not None
        ],
    )
    try:
        result = measure(
            config,
            options.model,
            architecture(options.model) if options.random_weights else None,
            baseline=options.baseline,
            warmup=options.warmup,
            repeats=options.repeats,
        )
    except VerificationFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return cli.FAILED
    print(json.dumps(result, indent=2) if options.json else as_text(result))
    return cli.DONE


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m benchmarks.epoch",
        description="Time a training epoch, stage by stage. What is not given is the recipe's.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="sd35-medium, flux1-dev or tiny")
    add("--random-weights", action="store_true", help="build the architecture, download nothing")
    add("--baseline", action="store_true", help="also run it the published way, and compare")
    add("--gated", type=float, default=0.1, metavar="F", help="share with a KL (default: 0.1)")
    for name, meaning in (
        ("prompts", "prompts of the epoch (default: 3; tiny: 8)"),
        ("group-size", "samples per prompt (default: 12; flux1-dev: 8, tiny: 16)"),
        ("batch-size", "samples per forward, in rollout and training "),
        ("steps", "denoising steps"),
        ("resolution", "image side in pixels"),
        ("updates", "optimizer steps"),
        ("threads", "CPU threads"),
    ):
        add(f"--{name}", type=int, metavar="N", help=meaning)
    add("--guidance", type=float, metavar="X", help="guidance scale")
    add("--precision", metavar="NAME", help="fp32 or bf16")
    add("--device", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    add("--cuda-graph", metavar="MODE", help="auto, on or off (default: auto)")
    add("--attention-backend", metavar="NAME", help="of ours, as model.attention_backend")
    for name, meaning in (
        ("compile", "compile the transformer blocks of ours"),
        ("gradient-checkpointing", "in both"),
    ):
        add(f"--{name}", action="store_const", const="true", help=meaning)
    add("--repeats", type=int, default=3, metavar="N", help="epochs timed (default: 3)")
    add("--warmup", type=int, default=1, metavar="N", help="epochs before them (default: 1)")
    add("--json", action="store_true", help="print JSON")
    return parser


def as_text(result: dict[str, Any]) -> str:
    """The result as a few lines and a Markdown table."""
    r = result
    lines = [
        f"{r['model']} ({r['weights']} weights, recipe {r['recipe']}) on {r['hardware']}, "
        f"torch {r['torch']}, {r['precision']}",
        f"{r['samples']} samples ({r['prompts']} prompts x {r['group_size']}), {r['resolution']} "
        f"px, {r['num_steps']} steps of which {r['trained_steps']} are trained, batch "
        f"{r['batch_size']}, guidance {r['guidance_scale']:g}, {r['updates']} updates, "
        f"{r['gated_share']:.1%} gated; epochs timed: {r['repeats']}",
        f"ours: CUDA graph {_on(r['cuda_graph'])}, compile {_on(r['compile'])}, attention "
        f"{r['attention_backend'] or 'default'}; prompts encoded once per run in "
        f"{r['encode_once_seconds']:.2f} s, not part of an epoch",
    ]
    if not r["text_encoders"]:
        lines.append("text encoders left out: prompt embeddings are random numbers")
    if r["errors"]:
        shown = ", ".join(f"{name} {error:.0e}" for name, error in r["errors"].items())
        lines.append(f"verified in float32, largest relative errors: {shown}")
    lines += ["", *_stage_table(r), "", *_sampling_table(r)]
    return "\n".join(lines)


def _stage_table(r: dict[str, Any]) -> list[str]:
    names = [name for name in ("baseline", "ours") if name in r]
    head = " | ".join(f"{name}, s | peak MiB" for name in names)
    lines = [f"| stage | {head} |" + (" ratio |" if len(names) == 2 else "")]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    for stage in r["ours"]["seconds"]:
        cells = []
        for name in names:
            seconds, peak = r[name]["seconds"][stage], r[name]["peak_mib"].get(stage)
            inside = stage == "reference" and name == "baseline"
            cells.append("in update" if inside else f"{seconds:.3f}")
            cells.append("" if peak is None or inside else f"{peak:.0f}")
        if len(names) == 2:
            ratio = r["ratio"].get(stage)
            cells.append(
                "" if ratio is None or stage in ("reference", "update") else f"{ratio:.2f}x"
            )
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return lines


def _sampling_table(r: dict[str, Any]) -> list[str]:
    lines = ["| sampling alone, one batch | s | images/s |", "|---|---|---|"]
    for entry in r["sampling"]:
        if "seconds" in entry:
            rate = entry["images"] / entry["seconds"]
            lines.append(f"| {entry['variant']} | {entry['seconds']:.3f} | {rate:.2f} |")
        else:
            lines.append(f"| {entry['variant']} | not available | {entry['problem']} |")
    if r["device"] == "cpu":
        lines += [
            "",
            "On a CPU sampling alone is timed eagerly: graphs and attention kernels need a GPU,",
            "and compiled blocks are compared there.",
        ]
    return lines


def _on(value: bool) -> str:
    return "on" if value else "off"


if __name__ == "__main__":
    cli.run(main)
