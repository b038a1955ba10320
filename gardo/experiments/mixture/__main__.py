"""``python -m gardo.experiments.mixture``: the 2-D mixture experiment."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from gardo.types import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def main(arguments: Sequence[str]) -> int:
    """Run what is missing, then write the table, the figures and the plot. Returns 0."""
    parser = _Parser(
        prog="python -m gardo.experiments.mixture",
        description="Compare the parts of GARDO on a 2-D mixture. Finished runs are kept in "
        "OUT/runs and not repeated.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="default: 0 1 2 3 4; with --quick 0"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="processes of one thread each (default: the number of CPU cores, %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="OUT",
        help="folder of the results; default: runs/mixture, with --quick runs/mixture-quick",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few epochs of everything, to see that it runs"
    )
    options = parser.parse_args(arguments)
    seeds = options.seeds or ([0] if options.quick else [0, 1, 2, 3, 4])
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        parser.error(f"--seeds: expected different numbers from 0, got {seeds}")
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    out = options.out or Path("runs/mixture-quick" if options.quick else "runs/mixture")

    # imported here, so that --help answers at once
    from gardo.experiments.mixture.plots import draw
    from gardo.experiments.mixture.run import QUICK, run_all
    from gardo.experiments.mixture.tables import summarize, write
    from gardo.experiments.mixture.training import Settings

    settings = QUICK if options.quick else Settings()
    records = run_all(seeds, settings, out, options.jobs or 1)
    print(write(out, summarize(records, settings)))
    draw(records, out / "mixture.png")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
