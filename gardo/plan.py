"""``python -m gardo.plan [RECIPE] [--gpus N --memory GB] [--KEY VALUE]``: the costs of an epoch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gardo import cli
from gardo.argument_parser import ArgumentParser
from gardo.config import Config, to_yaml
from gardo.types import UserError

if TYPE_CHECKING:
    from gardo.planning.report import Plan

DESCRIPTION = "Estimate samples, forwards, memory and time of an epoch, without running it."


def main(argv: Sequence[str]) -> int:
    """Parse the arguments and print the plan. Returns the exit code; raises UserError."""
    parser = _options()
    options, rest = parser.parse_known_args(argv)
    arguments = cli.parse(rest, "python -m gardo.plan", f"{DESCRIPTION}\n\n{_help(parser)}")
    if arguments is None:
        return cli.DONE
    if arguments.print_config:
        print(to_yaml(arguments.config), end="")
        return cli.DONE
    from gardo.planning.report import as_json, as_text  # late: --help needs no torch

    made = plan(
        arguments.config,
        gpus=options.gpus,
        memory=options.memory,
        gpu=options.gpu,
        utilization=options.utilization,
        measure=options.measure,
    )
    print(json.dumps(as_json(made), indent=2) if options.json else as_text(made))
    return cli.DONE


def _options() -> argparse.ArgumentParser:
    parser = ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument("--gpus", type=_positive_int, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--memory", type=_positive, metavar="GB", help="of each GPU; default: the GPU's own"
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="such as h100, a100-80gb, rtx4090; default: by --memory"
    )
    parser.add_argument(
        "--utilization",
        type=_share,
        metavar="F",
        help="share of the GPU's peak that is assumed to be reached (default: 0.4)",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="load the model and time a few rows on this machine, instead of the table",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _help(parser: argparse.ArgumentParser) -> str:
    text = parser.format_help().strip()
    return "plan " + text if text.startswith("options:") else text


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got '{text}'")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"expected a share of at most 1, got '{text}'")
    return value


def plan(
    config: Config,
    gpus: int = 1,
    memory: float | None = None,
    gpu: str | None = None,
    utilization: float | None = None,
    measure: bool = False,
) -> Plan:
    """Estimate an epoch of a configuration.

    Args:
        gpus: processes, one per GPU.
        memory: GB of each GPU; None takes the GPU's own.
        gpu: name of a tabulated GPU; None chooses one by its memory.
        utilization: share of the GPU's peak assumed to be reached; None takes the default.
        measure: time the model on this machine instead of using the table.

    Raises:
        UserError: unknown GPU or architecture, more processes than samples in an update, or a
            model that cannot be measured here.
    """
    from gardo.planning.advice import advise
    from gardo.planning.estimate import Planner
    from gardo.planning.measure import measure_rates
    from gardo.planning.memory import GIB
    from gardo.planning.rates import UTILIZATION, find_gpu
    from gardo.planning.report import Plan

    smallest = (
        config.prompts.per_epoch * config.prompts.group_size // config.train.updates_per_epoch
    )
    if gpus > smallest:
        raise UserError(f"--gpus: expected at most the {smallest} samples of an update, got {gpus}")
    device = find_gpu(gpu, memory)
    size = memory or device.memory
    planner = Planner(config, gpus)
    counts, estimate = planner.counts(config), planner.memory(config)
    rates = (
        measure_rates(config, counts)
        if measure
        else planner.tabulated_rates(device, utilization or UTILIZATION)
    )
    advice = None
    if estimate.peak > size * GIB:
        advice = advise(config, lambda c: planner.memory(c).stages, size * GIB)
    return Plan(
        config=config,
        architecture=planner.architecture,
        parameters=planner.parameters,
        trainable=planner.sample.trainable,
        gpu=f"{gpus} x {'GPU' if measure else device.name} of {size:g} GB",
        limit=size * GIB,
        counts=counts,
        memory=estimate,
        rates=rates,
        time=planner.time(rates),
        advice=advice,
        advised=planner.memory(advice.config) if advice else None,
        prompts=planner.prompts if planner.prompts_known else None,
    )


if __name__ == "__main__":
    cli.run(main)
