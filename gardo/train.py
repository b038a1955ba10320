"""``python -m gardo.train [RECIPE] [--config FILE] [--KEY VALUE ...]``: run a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gardo import cli
from gardo.config import Config, to_yaml

if TYPE_CHECKING:
    from gardo.checkpointing.resume import ResumePoint

DESCRIPTION = "Fine-tune a text-to-image model with GARDO."


def main(argv: Sequence[str]) -> int:
    """Parse the arguments and train. Returns the exit code; raises UserError and Stopped."""
    arguments = cli.parse(argv, "python -m gardo.train", DESCRIPTION, resumable=True)
    if arguments is None:
        return cli.DONE
    if arguments.print_config:
        print(to_yaml(arguments.config), end="")
        return cli.DONE
    report = train(arguments.config, arguments.resume_point, restart=arguments.resume)
    cli.tell(f"done: open {report}")
    return cli.DONE


def train(config: Config, resume: ResumePoint | None = None, restart: bool = False) -> Path:
    """Run a configuration from start to end; returns the path of the report.

    Args:
        config: what to run.
        resume: the checkpoint to go on from.
        restart: without a checkpoint, whether a run in ``output_dir`` is replaced.

    Raises:
        UserError: the configuration, the folder or a reward cannot be used, the disk is full, or
            the GPU's memory is too small.
        Stopped: a signal ended the run, which can be resumed.
    """
    # imported late: --help and configuration errors need no torch
    from gardo.run.folder import RunFolder
    from gardo.run.trackers import check_trackers

    check_trackers(config.trackers)
    if resume is None:
        RunFolder.check(config, replace=restart)
    from safetensors import SafetensorError

    from gardo.distributed.process import Runtime
    from gardo.run.faults import explain
    from gardo.run.report import write_report
    from gardo.trainer import Trainer

    runtime = Runtime(config.device, config.precision, config.threads)
    try:
        with runtime.stop.listening():
            trainer = Trainer(config, runtime)
            if resume is None:
                folder = RunFolder.create(config, restart, runtime.is_main)
            else:
                folder = trainer.resume(resume)
            trainer.train(folder)
        if runtime.is_main:
            write_report([folder.path], folder.report)
        runtime.close()
        return folder.report
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        explained = explain(error, config)
        if explained is None:
            raise
        raise explained from error


if __name__ == "__main__":
    cli.run(main)
