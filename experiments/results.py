"""``python -m experiments.results``: one page that says which claims hold."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.claims import CLAIMS
from gardo import cli
from gardo.argument_parser import ArgumentParser
from gardo.types import UserError

EXPERIMENTS = ("mixture", "ablation", "counting")


def main(arguments: Sequence[str]) -> int:
    """Read the experiments' results and write the page. Returns 0."""
    parser = ArgumentParser(
        prog="python -m experiments.results",
        description="Write which claims of the method hold, from the results.json of the "
        "experiments in DIR/mixture, DIR/ablation and DIR/counting.",
        allow_abbrev=False,
    )
    parser.add_argument("--dir", type=Path, default=Path("docs/experiments"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), metavar="FILE")
    options = parser.parse_args(arguments)
    text = page(options.dir)
    try:
        options.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: cannot be written: {error}") from error
    cli.tell(f"written to {options.out}")
    return cli.DONE


def page(folder: Path) -> str:
    """The page as Markdown.

    Raises:
        UserError: an experiment's results or the discussion are missing or cannot be read.
    """
    results = {name: _results(folder / name / "results.json") for name in EXPERIMENTS}
    why = _discussion(folder / "discussion.md")
    lines = [
        "# Which claims hold at this scale",
        "",
        "Written by `python -m experiments.results` from the results of",
        "`python -m experiments.mixture`, `ablation` and `counting`; protocols and details:",
        "[mixture](experiments/mixture.md), [ablation](experiments/ablation.md),",
        "[counting](experiments/counting.md). A claim *holds* where every seed shows it, *does",
        "not hold* where none does, and is *undecided* else; figures are means over the seeds,",
        "with the seeds in brackets. Where several KL coefficients were run, a method's middle one",
        "is taken. These are a 2-D mixture and 24-pixel images on a CPU: what holds here need not",
        "hold for SD3.5 or FLUX.1, nor the reverse.",
        "",
        "| claim | here | figures |",
        "|---|---|---|",
    ]
    verdicts = {claim.name: claim.judge(results[claim.experiment]) for claim in CLAIMS}
    for claim in CLAIMS:
        verdict, figures = verdicts[claim.name]
        lines.append(f"| {claim.text} | **{verdict}** | {figures} |")
    seeds = "; ".join(f"{n}: {', '.join(map(str, results[n]['seeds']))}" for n in EXPERIMENTS)
    lines += ["", f"Seeds: {seeds}.", "", "## Why we think so", ""]
    for claim in CLAIMS:
        if claim.name in why:
            lines += [f"**{claim.text}: {verdicts[claim.name][0]}.** {why[claim.name]}", ""]
    tables = [f"[{n}](experiments/{n}/results.md)" for n in EXPERIMENTS]
    lines += [f"Every figure and seed: {', '.join(tables)}.", ""]
    lines += [
        "![Proxy against held-out accuracy, every method and KL coefficient]"
        "(experiments/ablation/frontier.png)",
        "",
        "![Accuracy by count](experiments/counting/counting.png)",
    ]
    return "\n".join(lines) + "\n"


def _results(path: Path) -> dict[str, Any]:
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run the experiment") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: expected JSON, got {error}") from error
    return results


def _discussion(path: Path) -> dict[str, str]:
    """Paragraphs by the claim that their heading names; UserError for a name without a claim."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    parts = re.split(r"^## +(\S+) *$", text, flags=re.MULTILINE)
    paragraphs = {
        name: " ".join(body.split()) for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }
    unknown = set(paragraphs) - {claim.name for claim in CLAIMS}
    if unknown:
        raise UserError(f"{path}: no claim is called {', '.join(sorted(unknown))}")
    return paragraphs


if __name__ == "__main__":
    cli.run(main)
