"""``python -m experiments.counting``: does counting reach beyond what was shown?"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.command import parse
from gardo import cli

DESCRIPTION = "Accuracy by count of the base, GRPO and GARDO, beyond the pretraining range."


def main(arguments: Sequence[str]) -> int:
    """Run what is missing, then write tables and the figure. Returns 0."""
    options = parse(arguments, "counting", DESCRIPTION, seeds=[0, 1, 2])

    # imported here, so that --help answers at once
    from experiments.counting.results import draw, markdown, summarize
    from experiments.counting.run import FULL, QUICK, run_all
    from experiments.tables import write

    scale = QUICK if options.quick else FULL
    summary = summarize(run_all(options.seeds, scale, options.out, options.jobs), scale)
    print(write(options.out, summary, markdown(summary)))
    draw(summary, options.out / "counting.png")
    cli.tell(f"written to {options.out}")
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
