"""``python -m experiments.ablation``: every method on the embedded image task."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.command import parse
from gardo import cli

DESCRIPTION = (
    "Compare GARDO, its baselines and GARDO with each part off, over seeds and KL coefficients."
)


def main(arguments: Sequence[str]) -> int:
    """Run what is missing, then write tables, figures and the report. Returns 0."""
    options = parse(arguments, "ablation", DESCRIPTION, seeds=[0, 1, 2])

    # imported here, so that --help answers at once
    from experiments.ablation.plots import draw_curves, draw_frontier
    from experiments.ablation.report import write_report
    from experiments.ablation.results import markdown, summarize
    from experiments.ablation.run import FULL, QUICK, run_all
    from experiments.tables import write

    scale = QUICK if options.quick else FULL
    records = run_all(options.seeds, scale, options.out, options.jobs)
    summary = summarize(records)
    print(write(options.out, summary, markdown(summary)))
    draw_frontier(summary, options.out / "frontier.png")
    draw_curves(records, options.out / "curves.png")
    cli.tell(f"done: open {write_report(options.out, records, summary)}")
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)
