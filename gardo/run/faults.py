"""What a user can do about a full disk, a folder that cannot be written and memory that ran out."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from gardo.config import Config
from gardo.types import UserError

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)


def explain(error: BaseException, config: Config) -> UserError | None:
    """The user's view of an error of the machine, or None for any other error.

    Args:
        error: as it was raised; what caused it is looked at, too.
        config: of the run.
    """
    for cause in _causes(error):
        if isinstance(cause, torch.OutOfMemoryError):
            return UserError(_out_of_memory(cause, error, config))
        if isinstance(cause, MemoryError) or "can't allocate memory" in str(cause):
            return UserError(
                "out of memory of the machine; try smaller batches (sampling.batch_size is "
                f"{config.sampling.batch_size}, train.batch_size {config.train.batch_size}), "
                "a smaller model.lora.rank, or sampling.offload_trajectories false"
            )
        if isinstance(cause, SafetensorError):  # tells the number of the system's error in words
            number = re.search(r"\(os error (\d+)\)", str(cause))
            if number:
                cause = OSError(int(number[1]), str(cause))
        if isinstance(cause, OSError) and cause.errno in _DISK:
            # a failed write does not say of which file; a refused one may be of another folder
            if cause.errno in _FULL or _is_within(cause.filename, config.output_dir):
                return UserError(_disk(cause, config))
    return None


def _is_within(file: str | bytes | int | None, folder: str) -> bool:
    return isinstance(file, str) and Path(folder).absolute() in Path(file).absolute().parents


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _disk(error: OSError, config: Config) -> str:
    reason = _DISK[error.errno or 0]
    where = f" '{error.filename}'" if error.filename else ""
    message = f"output_dir '{config.output_dir}':{where} could not be written: {reason}"
    if error.errno in _FULL:
        message += (
            "; free some space, or keep and write less (checkpoint.keep_last is "
            f"{config.checkpoint.keep_last}, checkpoint.every {config.checkpoint.every}, "
            f"evaluation.grid_images {config.evaluation.grid_images})"
        )
    return (
        f"{message}. Earlier checkpoints are as they were; then continue with --resume "
        f"{config.output_dir}"
    )


def _out_of_memory(cause: BaseException, error: BaseException, config: Config) -> str:
    model, sampling, train = config.model, config.sampling, config.train
    # what the run does not do yet, the cheapest first
    advice = [
        text
        for text, possible in (
            ("model.vae_slicing true", not model.vae_slicing),
            ("model.vae_tiling true", not model.vae_tiling),
            ("sampling.cuda_graph off", sampling.cuda_graph != "off"),
            ("sampling.offload_trajectories true", not sampling.offload_trajectories),
            (
                f"smaller batches (sampling.batch_size is {sampling.batch_size}, "
                f"train.batch_size {train.batch_size})",
                max(sampling.batch_size, train.batch_size) > 1,
            ),
            ("model.gradient_checkpointing true", not model.gradient_checkpointing),
            ("fewer rewards on this GPU (rewards.servers)", True),
        )
        if possible
    ]
    what = "" if cause is error else f" ({str(error).split(':', 1)[0]})"
    asked = str(cause).split(". ", 1)[0]
    return (
        f"out of GPU memory{what}: {asked}. Try, the cheapest first: {', '.join(advice)}; "
        "python -m gardo.plan tells what a recipe needs. A run may be resumed with these changed"
    )
