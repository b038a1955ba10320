"""Finds what a run is resumed from, and whether it may go on with the settings asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gardo.checkpointing.checkpoint import Checkpoint, CheckpointFolder
from gardo.config import Config, iter_keys, load_config, on_resume
from gardo.run.folder import RunFolder, check_writable
from gardo.types import UserError

if TYPE_CHECKING:
    from gardo.checkpointing.parts import Stateful
    from gardo.distributed.process import Runtime


@dataclass(frozen=True)
class ResumePoint:
    """A run with a checkpoint to go on from.

    Attributes:
        folder: of the run.
        checkpoint: verified.
        config: the run's settings as the checkpoint has them.
    """

    folder: Path
    checkpoint: Checkpoint
    config: Config


def find_resume_point(path: Path, told: Callable[[str], None]) -> ResumePoint:
    """The newest whole checkpoint of a run folder, or the given checkpoint of a run.

    Args:
        path: a run folder, or a folder in its ``checkpoints``.
        told: is called with a sentence about each damaged checkpoint that is skipped.

    Raises:
        UserError: there is none, it is damaged or of another version, or the run folder cannot be
            written.
    """
    folder = path.absolute().parent.parent
    if path.absolute().parent.name == "checkpoints" and (folder / "config.yaml").is_file():
        checkpoint: Checkpoint | None = _verified(path)
    elif (path / "manifest.json").is_file():
        raise UserError(
            f"--resume '{path}': expected a checkpoint in the 'checkpoints' of a run folder, with "
            "whose metrics the run goes on; this one lies elsewhere"
        )
    elif path.is_dir():
        folder, checkpoint = path, CheckpointFolder(path / "checkpoints").newest(told)
    else:
        raise UserError(
            f"--resume '{path}': no such run folder or checkpoint (a recipe goes before --resume)"
        )
    if checkpoint is None:
        raise UserError(f"--resume '{path}': no checkpoint in this folder")
    check_writable(folder)
    check_writable(checkpoint.path.parent)
    return ResumePoint(folder, checkpoint, _config(checkpoint.path))


def _verified(path: Path) -> Checkpoint:
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    return checkpoint


def find_in_output_dir(config: Config, told: Callable[[str], None]) -> ResumePoint | None:
    """What ``--resume auto`` goes on from; None if the run must start from its beginning.

    Raises:
        UserError: as `find_resume_point`, or the folder holds a run that is finished, or of other
            settings, and has no checkpoint.
    """
    folder = Path(config.output_dir).expanduser()
    if CheckpointFolder(folder / "checkpoints").all():
        return find_resume_point(folder, told)
    if (folder / "config.yaml").is_file():
        if (folder / "summary.json").is_file():
            raise UserError(
                f"--resume: the run in '{folder}' is finished and has no checkpoint; choose "
                "another --output_dir, or replace it with --overwrite true"
            )
        check_same_run(config, _config(folder), folder)
    return None


def _config(folder: Path) -> Config:
    try:
        return load_config(str(folder / "config.yaml"))
    except UserError as error:
        raise UserError(
            f"'{folder / 'config.yaml'}': {error}; if an earlier version made this run with such "
            "settings, it needs that version to go on"
        ) from None


def check_resumable(point: ResumePoint, asked: Config) -> list[str]:
    """Compare the settings asked for with the run's own.

    Returns the keys that differ and make results equal up to rounding only.

    Raises:
        UserError: contradictory keys, all of them named; or fewer epochs than are done.
    """
    done = point.checkpoint.epoch
    rounding = check_same_run(asked, point.config, point.folder)
    if asked.epochs < done:
        raise UserError(
            f"epochs: the checkpoint '{point.checkpoint.path}' has done {done} epochs; expected at "
            f"least as many, got {asked.epochs}"
        )
    return rounding


def check_same_run(asked: Config, own: Config, folder: Path) -> list[str]:
    """As `check_resumable`, for a run folder without a checkpoint."""
    new, old = asked.model_dump(mode="json"), own.model_dump(mode="json")
    contradictions, rounding = [], []
    for key, field in iter_keys():
        before, now, effect = _value(old, key), _value(new, key), on_resume(field)
        if before == now or effect == "nothing":
            continue
        if effect == "rounding":
            rounding.append(key)
        else:
            contradictions.append(f"{key} ({before!r} there, {now!r} asked for)")
    if contradictions:
        raise UserError(
            f"'{folder}' is a run with other settings: {', '.join(contradictions)}. Give the same "
            f"ones, or none: --resume {folder} without a recipe takes the run's own; or choose "
            "another --output_dir"
        )
    return rounding


def take_over(
    point: ResumePoint,
    config: Config,
    parts: Mapping[str, Stateful],
    due: Callable[[int], str | None],
    runtime: Runtime,
) -> RunFolder:
    """Load the state of a checkpoint and cut its run's files back to it; all processes call this.

    Args:
        config: of the run from now on.
        parts: of the trainer's state.
        due: name of the evaluation that follows a number of epochs.

    Raises:
        UserError: the checkpoint does not fit the model or the recipe, or files of the run are
            missing or damaged; no file was changed.
    """
    from gardo.checkpointing.parts import restore  # late: a checkpoint is found without torch

    state = point.checkpoint.load()
    try:
        restore(parts, state)
        evaluated = state.value("evaluated") == due(state.epoch)
        clock = state.value("clock")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint '{point.checkpoint.path}': {error}") from error
    runtime.wait()  # until all processes have read what one of them may now cut back
    folder = RunFolder(point.folder, runtime.is_main)
    if runtime.is_main:
        folder.check_continuable(state.epoch)
        # first of all, so that no checkpoint is ever newer than the files beside it
        CheckpointFolder(folder.checkpoints).discard_after(state.epoch)
    folder.cut_back(config, state.epoch, evaluated)
    folder.set_clock(clock, state.epoch)
    runtime.wait()
    return folder


def _value(tree: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        tree = tree[part]
    return tree
