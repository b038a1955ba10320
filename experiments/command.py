"""The command line that the experiments share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gardo.argument_parser import ArgumentParser


@dataclass(frozen=True)
class Options:
    """What was asked for; the defaults are filled in."""

    seeds: list[int]
    jobs: int
    out: Path
    quick: bool


def parse(arguments: Sequence[str], name: str, description: str, seeds: list[int]) -> Options:
    """Read ``[--seeds N …] [--jobs N] [--out OUT] [--quick]``.

    Args:
        arguments: the words after the command.
        name: of the experiment, which results are put under.
        description: for ``--help``.
        seeds: the default; with ``--quick`` it is 0 alone.

    Raises:
        UserError: an unknown option or a value that is not as described.
    """
    parser = ArgumentParser(
        prog=f"python -m experiments.{name}",
        description=f"{description} Finished runs are kept in OUT/runs and not repeated.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help=f"default: {' '.join(map(str, seeds))}; with --quick 0",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes of one thread each (default: the number of CPU cores, %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="OUT",
        help=f"folder of the results; default: runs/{name}, with --quick runs/{name}-quick",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few epochs of everything, to see that it runs"
    )
    given = parser.parse_args(arguments)
    chosen = given.seeds or ([0] if given.quick else seeds)
    if min(chosen) < 0 or len(set(chosen)) < len(chosen):
        parser.error(f"--seeds: expected different numbers from 0, got {chosen}")
    if given.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {given.jobs}")
    out = given.out or Path(f"runs/{name}-quick" if given.quick else f"runs/{name}")
    return Options(chosen, given.jobs, out, given.quick)
