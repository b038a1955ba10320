"""``python -m gardo.train [RECIPE] [--config FILE] [--KEY VALUE ...]``: run a recipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from gardo import cli
from gardo.config import Config, to_yaml

DESCRIPTION = "Fine-tune a text-to-image model with GARDO."


def main(argv: Sequence[str]) -> int:
    """Parse the arguments and train. Returns the exit code; raises UserError."""
    arguments = cli.parse(argv, "python -m gardo.train", DESCRIPTION)
    if arguments is None:
        return cli.DONE
    if arguments.print_config:
        print(to_yaml(arguments.config), end="")
        return cli.DONE
    report = train(arguments.config)
    print(f"done: open {report}", file=sys.stderr)
    return cli.DONE


def train(config: Config) -> Path:
    """Run a configuration from start to end; returns the path of the report."""
    # imported late: --help and configuration errors need no torch
    from gardo.runtime.run_folder import RunFolder

    RunFolder.check(config)
    from gardo.runtime.process import Runtime
    from gardo.runtime.report import write_report
    from gardo.trainer import Trainer

    runtime = Runtime(config.device, config.precision, config.threads)
    trainer = Trainer(config, runtime)
    folder = RunFolder.create(config)
    trainer.train(folder)
    return write_report([folder.path], folder.report)


if __name__ == "__main__":
    cli.run(main)
