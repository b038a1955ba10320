"""Runs of `gardo.train` that something may happen to, each in a fork that starts at once.

As a module it is such a run: its first argument is a hook in JSON, with a name and arguments, or
null.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path

from tests.support import warm

ROOT = Path(__file__).parents[2]

SMALLEST = {
    "device": "cpu",
    "threads": 1,
    "model.lora.rank": 1,
    "prompts.per_epoch": 2,
    "prompts.group_size": 2,
    "sampling.num_steps": 2,
    "sampling.sde_window": 0,
    "sampling.sde_window_range": "null",
    "sampling.batch_size": 2,
    "train.batch_size": 1,
    "train.timestep_fraction": 0.5,
    "evaluation.max_prompts": 2,
    "evaluation.samples_per_prompt": 2,
    "evaluation.num_steps": 2,
    "evaluation.grid_images": 2,
    "evaluation.reference_images": "null",
    "rewards.eval": "artifact",
}
"""Settings of the recipe ``tiny`` with which an epoch takes a tenth of a second."""


def arguments(folder, *words, **changes):
    """A command line of the smallest run; keys have ``__`` for a dot."""
    keys = {name.replace("__", "."): value for name, value in changes.items()}
    settings = {**SMALLEST, "output_dir": folder, **keys}
    return [*words, *(f"--{key}={value}" for key, value in settings.items())]


class Runner:
    """Starts runs, whose output goes to a file."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def start(self, argv, hook=None) -> int:
        """Start a run; returns its process id."""
        with self.log.open("wb") as log, open(os.devnull) as nothing:
            files = (nothing.fileno(), log.fileno(), log.fileno())
            command = ["-m", "tests.support.forked", json.dumps(hook), *argv]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            self._run = warm.Fork(warm.server(), command, files, environment, ROOT)
        return self._run.pid

    def wait(self) -> int:
        """Exit code of the run that was started; -N if signal N ended it."""
        return self._run.wait()

    def run(self, argv, hook=None) -> int:
        self.start(argv, hook)
        return self.wait()

    @property
    def said(self) -> str:
        """What the last run wrote."""
        return self.log.read_text()


def _before(owner, name, count, action) -> None:
    """Call ``action`` before the ``count``-th call of a function, counted from 1."""
    function, calls = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == count:
            action()
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def die_while_saving(operation: int) -> None:
    """SIGKILL before the given one of the operations by which files get their names."""
    import shutil

    calls = [0]

    def counted(function):
        def wrapped(*args, **kwargs):
            calls[0] += 1
            if calls[0] == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    shutil.rmtree = counted(shutil.rmtree)


def disk_full(file: int) -> None:
    """The disk is full when the given file of a checkpoint is written."""
    from gardo.checkpointing import checkpoint

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    _before(checkpoint, "_write", file, fail)


def signals(names: list[str], where: str, count: int) -> None:
    """Signals to this process at a place that the training loop comes to for the n-th time."""
    import gardo.distributed.process
    import gardo.trainer

    owner, function = {
        "micro-batch": (gardo.distributed.process.Runtime, "stop_point"),
        "evaluation": (gardo.trainer.Trainer, "evaluate"),
        "shape": (gardo.trainer.Shaper, "__call__"),
        "start": (gardo.trainer.Trainer, "__init__"),
    }[where]

    def send():
        for name in names:
            os.kill(os.getpid(), getattr(signal, name))

    _before(owner, function, count, send)


def fail(where: str, count: int, kind: str) -> None:
    """An exception at the n-th reference pass or scoring."""
    import torch

    import gardo.trainer
    from gardo.rewards.base import RewardUnavailable

    def oom():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    def unavailable():
        raise RewardUnavailable("clean", "no server answers")

    owner, function = {
        "update": (gardo.trainer.ParityCheck, "__call__"),
        "score": (gardo.trainer.RewardSet, "score_one"),
    }[where]
    _before(owner, function, count, {"oom": oom, "unavailable": unavailable}[kind])


def not_finite(updates: list[list[int]], what: str, rank: int = 0) -> None:
    """The loss, or the gradients alone, of some ``[epoch, update]`` are not finite on a rank.

    It is the second batch of the update, if there is one, and only at its first trained step.
    """
    import torch

    import gardo.trainer
    from gardo.algorithms.grpo import GRPO
    from gardo.algorithms.nft import NFT

    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(context, loss):
            return loss.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * torch.inf

    now = []  # the update that is made, and its rows
    update = gardo.trainer.update_if_finite

    def noted(algorithm, health, epoch, data, index, stats):
        now[:] = [[epoch, index], data.rollout.plan.updates[index]]
        made = update(algorithm, health, epoch, data, index, stats)
        now.clear()
        return made

    gardo.trainer.update_if_finite = noted

    def broken(owner):
        function = owner.loss

        def loss(self, data, batch, step_index):
            out = function(self, data, batch, step_index)
            if not now:
                return out
            rows = now[1]
            last = int(batch.rows[0]) + len(batch.rows) >= rows.stop
            if now[0] in updates and step_index == 0 and last and self.runtime.rank == rank:
                value = out.loss * torch.nan if what == "loss" else Infinite.apply(out.loss)
                return out._replace(loss=value)
            return out

        owner.loss = loss

    broken(GRPO)
    broken(NFT)


def leave_out(updates: list[list[int]]) -> None:
    """Some ``[epoch, update]`` do not happen."""
    import gardo.trainer

    update = gardo.trainer.update_if_finite

    def some(algorithm, health, epoch, data, index, stats):
        skipped = [epoch, index] in updates
        return not skipped and update(algorithm, health, epoch, data, index, stats)

    gardo.trainer.update_if_finite = some


def collapse(epoch: int) -> None:
    """From an epoch on the policy heads for one and the same image, whatever prompt and noise."""
    import gardo.trainer
    from gardo.models.base import Velocity
    from gardo.models.sd3 import SD3Model

    velocity, run_epoch, now = SD3Model.velocity, gardo.trainer.Trainer.run_epoch, [0]

    def noted(self, number):
        now[0] = number
        return run_epoch(self, number)

    def collapsed(self, latents, timesteps, *rest):
        out = velocity(self, latents, timesteps, *rest)
        if now[0] < epoch:
            return out
        share = (timesteps / 1000).reshape(-1, *[1] * (latents.dim() - 1))
        return Velocity((latents - 0.1) / share + 0 * out.cond)

    gardo.trainer.Trainer.run_epoch, SD3Model.velocity = noted, collapsed


HOOKS = {
    f.__name__: f
    for f in (die_while_saving, disk_full, signals, fail, not_finite, leave_out, collapse)
}


def main() -> None:
    import gardo.run.report
    from gardo import cli, train

    # its curves take as long as six epochs, and nothing is resumed from it
    gardo.run.report.write_report = lambda runs, out: out
    if hook := json.loads(sys.argv.pop(1)):
        HOOKS[hook["name"]](**hook["with"])
    sys.argv[0] = "gardo.train"
    cli.run(train.main)


if __name__ == "__main__":
    main()
