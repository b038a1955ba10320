"""``python -m gardo.evaluate --runs A B ...``: compare fine-tuned models with their base."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from gardo import cli
from gardo.argument_parser import ArgumentParser
from gardo.evaluation.request import Request, parse_seeds, split_names
from gardo.types import UserError

DESCRIPTION = """\
Draw the same prompts from the same noise with several models, score the images with held-out
rewards, and write a table: evaluation.html (images side by side), evaluation.md, evaluation.json.

What is left out is taken from the first run's config.yaml. A killed evaluation goes on where it
stopped when the same command is given again."""


def main(argv: Sequence[str]) -> int:
    """Parse the arguments and evaluate. Returns the exit code; raises UserError and Stopped."""
    page = evaluate(_request(argv))
    cli.tell(f"done: open {page}")
    return cli.DONE


def evaluate(request: Request) -> Path:
    """Run an evaluation from start to end; prints its table and returns the path of its page.

    Raises:
        UserError: something asked for cannot be used, a reward fails, or memory or disk are full.
        Stopped: a signal came; the same request goes on.
    """
    # imported late: --help and mistakes in arguments need no torch
    from gardo.evaluation.comparison import compare
    from gardo.evaluation.comparison_report import as_markdown, write_comparison
    from gardo.evaluation.workflow import Evaluation

    evaluation = Evaluation(request)
    comparison = compare(evaluation, evaluation.run())
    page = write_comparison(comparison, request.out.expanduser(), request.rows)
    print(as_markdown(comparison), end="")
    return page


def _request(argv: Sequence[str]) -> Request:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.no_base and options.base is not None:
        raise UserError("--base, --no_base: expected one of them, got both")
    return Request(
        runs=options.runs,
        names=options.names,
        base=options.base or None,
        with_base=not options.no_base,
        recipe=options.recipe,
        prompts=options.prompts,
        split=options.split,
        max_prompts=options.max_prompts,
        seeds=None if options.seeds is None else parse_seeds(options.seeds),
        rewards=None if options.rewards is None else split_names(options.rewards),
        features=options.features,
        steps=options.steps,
        guidance=options.guidance,
        resolution=options.resolution,
        precision=options.precision,
        batch_size=options.batch_size,
        device=options.device,
        kl_seeds=0 if options.no_kl else options.kl_seeds,
        resamples=options.resamples,
        out=options.out,
        cache=options.cache,
        rescore=options.rescore,
        rows=options.rows,
    )


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m gardo.evaluate",
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("what is compared").add_argument
    add(
        "--runs",
        nargs="+",
        required=True,
        metavar="PATH",
        help="run folders (runs/x), LoRA exports, pipeline folders, hub ids (org/name[@revision]), "
        "or builtin:tiny",
    )
    add("--names", nargs="+", metavar="NAME", help="what tables call them (default: their folders)")
    add(
        "--base",
        nargs="?",
        const="",
        metavar="PATH",
        help="the base model, which is the reference of win rates, gap and KL; PATH says where it "
        "is (default: what the first run was trained from)",
    )
    add("--no_base", action="store_true", help="leave the base out, and what is compared with it")
    add("--recipe", metavar="NAME|FILE", help="settings in place of the first run's")

    add = parser.add_argument_group("what is drawn").add_argument
    add("--prompts", type=Path, metavar="FILE", help=".txt or .jsonl file, or a folder by split")
    add("--split", metavar="NAME", help="part of a folder or data set (folder of --prompts: test)")
    add("--max_prompts", type=_whole(1), metavar="N", help="at most so many, the first ones")
    add("--seeds", nargs="+", metavar="N", help="such as 0 1 2 3 or 0-7: images of a prompt")
    add("--steps", type=_whole(2), metavar="N", help="denoising steps of an image, without noise")
    add("--guidance", type=_number, metavar="G", help="guidance scale")
    add("--resolution", type=_whole(1), metavar="PX", help="side of an image")

    add = parser.add_argument_group("what is measured").add_argument
    add(
        "--rewards",
        nargs="+",
        metavar="NAME",
        help="what scores beside the rewards that were trained on (default: the run's others)",
    )
    add("--features", metavar="NAME", help="extractor for diversity; none: no diversity")
    add("--kl_seeds", type=_whole(1), default=1, metavar="N", help="seeds for the KL (default: 1)")
    add("--no_kl", action="store_true", help="no KL to the base, which costs most after the images")
    add(
        "--resamples", type=_whole(100), default=2000, metavar="N", help="bootstrap (default: 2000)"
    )

    add = parser.add_argument_group("how it runs").add_argument
    add("--batch_size", type=_whole(1), metavar="N", help="images at a time")
    add("--precision", choices=("fp32", "fp16", "bf16"))
    add("--device", choices=("auto", "cpu", "cuda"))
    add(
        "--out",
        type=Path,
        default=Path("evaluation"),
        metavar="DIR",
        help="folder of the tables (default: evaluation)",
    )
    add(
        "--cache", type=Path, metavar="DIR", help="folder of images and scores (default: OUT/cache)"
    )
    add("--rescore", action="store_true", help="score again what is in the cache")
    add("--rows", type=_whole(0), default=80, metavar="N", help="rows of images (default: 80)")
    return parser


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or int(text[:10]) < least or len(text) > 9:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, got '{text}'"
            )
        return int(text)

    return parse


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got '{text}'")
    return value


if __name__ == "__main__":
    cli.run(main)
