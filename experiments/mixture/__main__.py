"""``python -m experiments.mixture``: the 2-D mixture experiment."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.command import parse
from gardo import cli


def main(arguments: Sequence[str]) -> int:
    """Run what is missing, then write the table, the figures and the plot. Returns 0."""
    options = parse(
        arguments, "mixture", "Compare the parts of GARDO on a 2-D mixture.", seeds=[0, 1, 2, 3, 4]
    )

    # imported here, so that --help answers at once
    from experiments.mixture.plots import draw
    from experiments.mixture.run import QUICK, run_all
    from experiments.mixture.tables import markdown, summarize
    from experiments.mixture.training import Settings
    from experiments.tables import write

    settings = QUICK if options.quick else Settings()
    records = run_all(options.seeds, settings, options.out, options.jobs)
    summary = summarize(records, settings)
    print(write(options.out, summary, markdown(summary)))
    draw(records, options.out / "mixture.png")
    cli.tell(f"written to {options.out}")
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
