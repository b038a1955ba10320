"""Write the HTML report of one run, or the comparison of several.

python -m gardo.report RUN [RUN ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: returns 0, or 2 after one line on standard error for a mistake of the user."""
    parser = argparse.ArgumentParser(
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
    options = parser.parse_args(arguments)
    runs: list[Path] = options.runs
    out = options.out or (runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html"))

    from gardo.runtime.report import ReportError, write_report

    try:
        path = write_report(runs, out)
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {out}: {error.strerror or error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
