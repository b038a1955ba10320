"""Write the HTML report of one run, or the comparison of several.

python -m gardo.report RUN [RUN ...] [--out FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gardo.argument_parser import ArgumentParser
from gardo.types import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: returns 0, or 2 after one line on standard error for a mistake of the user."""
    parser = ArgumentParser(
        prog="python -m gardo.report",
        description="Write one self-contained HTML file about a run, or comparing several.",
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="folder of a run (finished or not)"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="the HTML file; default: report.html in the run's folder, or "
        "comparison.html here for several runs",
    )
    try:
        options = parser.parse_args(arguments)
        print(_write(options.runs, options.out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _write(runs: list[Path], out: Path | None) -> Path:
    from gardo.run.report import write_report  # late: --help needs no plots

    out = out or (runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html"))
    try:
        return write_report(runs, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None


if __name__ == "__main__":
    sys.exit(main())
