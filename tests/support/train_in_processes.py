"""Trains several configurations, in one process or by torchrun in several, and writes what it saw.

Usage: torchrun ... train_in_processes.py CASES.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from gardo.checkpointing.resume import find_resume_point
from gardo.config import load_config
from gardo.distributed.process import Runtime
from gardo.distributed.signals import leave
from gardo.run.folder import RunFolder
from gardo.trainer import Trainer

SMALL = {
    "device": "cpu",
    "threads": 1,
    "epochs": 2,
    # 14 samples in two updates of 7: unequal shares of two processes, and batches that are not full
    "prompts.per_epoch": 2,
    "prompts.group_size": 7,
    "sampling.num_steps": 4,
    "sampling.sde_window": 0,
    "sampling.sde_window_range": "null",
    "sampling.batch_size": 3,
    "health.ratio": "null",
    "train.batch_size": 3,
    "train.timestep_fraction": 0.5,
    "train.learning_rate": 1e-3,
    "train.ema": "true",
    "train.ema_every": 2,
    "algorithm.kl_coef": 0.5,
    "algorithm.reference.reset_every": 0,
    "algorithm.reference.kl_threshold": 0,
    # 10 samples in batches of 3: two each, of which one process has no second full one
    "evaluation.max_prompts": 5,
    "evaluation.samples_per_prompt": 2,
    "evaluation.num_steps": 2,
    "evaluation.grid_images": 4,
    "checkpoint.every": 1,
}


def run(case) -> None:
    """Train; ``seen.safetensors`` in the run folder has gathered figures of each epoch."""
    from accelerate.state import AcceleratorState

    try:
        _run(case)
    finally:  # the next case may have another precision
        AcceleratorState._reset_state(reset_partial_state=True)


def _run(case) -> None:
    overrides = {**SMALL, **case["settings"], "output_dir": case["folder"]}
    config = load_config("tiny", [], [(k, str(v)) for k, v in overrides.items()])
    runtime = Runtime(config.device, config.precision, config.threads)
    trainer = Trainer(config, runtime)
    watch = Watch(trainer, runtime)
    if case.get("resume"):
        folder = trainer.resume(find_resume_point(Path(case["resume"]), print))
    else:
        folder = RunFolder.create(config, is_main=runtime.is_main)
        runtime.wait()
    trainer.train(folder)
    watch.save(folder)


class Watch:
    """What the epochs of a trainer were like, over all processes."""

    def __init__(self, trainer, runtime) -> None:
        self.runtime, self.seen = runtime, {}
        self.forwards = torch.zeros(1)
        self.reductions = torch.zeros(1)
        trainer.model.transformer.register_forward_hook(self._count_forward)
        self._watch_reductions(trainer)
        shape = trainer.shaper.__call__

        def shaped(book, plan, runtime):
            result = shape(book, plan, runtime)
            total, epoch = sum(plan.update_sizes), len(self.seen) // 4
            gathered = {
                "advantage": runtime.gather(result.advantage, plan.sample_ids, total),
                "gate": runtime.gather(result.gate.float(), plan.sample_ids, total),
                "scores": result.scores.contiguous(),
                "gated_rows": self.everywhere(torch.tensor([float(len(result.gated_rows))])),
            }
            self.seen |= {f"{epoch}/{name}": value for name, value in gathered.items()}
            return result

        trainer.shaper = shaped_like(trainer.shaper, shaped)

    def _count_forward(self, *_) -> None:
        self.forwards += 1

    def _watch_reductions(self, trainer) -> None:
        if self.runtime.sharded:
            from torch.distributed.fsdp._fully_shard import _fsdp_collectives

            reduce = _fsdp_collectives.foreach_reduce
            module = sys.modules["torch.distributed.fsdp._fully_shard._fsdp_param_group"]

            def counted(*args, **kwargs):
                self.reductions += 1
                return reduce(*args, **kwargs)

            module.foreach_reduce = counted
        elif self.runtime.world_size > 1:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            def counted(state, bucket):
                self.reductions += 1
                return allreduce_hook(state, bucket)

            trainer.model.module.register_comm_hook(None, counted)

    def everywhere(self, value):
        return self.runtime.accelerator.gather(value)

    def save(self, folder) -> None:
        self.seen["forwards"] = self.everywhere(self.forwards)
        self.seen["reductions"] = self.everywhere(self.reductions)
        if self.runtime.is_main:
            save_file(self.seen, folder.path / "seen.safetensors")


def shaped_like(shaper, call):
    """A shaper that is called in another way."""
    kind = type(shaper)
    shaper.__class__ = type(kind.__name__, (kind,), {"__call__": lambda self, *a: call(*a)})
    return shaper


def main(path: str) -> None:
    for case in json.loads(Path(path).read_text()):
        run(case)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main(sys.argv[1])
