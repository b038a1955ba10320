"""One process or many: device, gathering of rows, gradient synchronisation; through accelerate."""

from __future__ import annotations

import os
import platform
import signal
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gardo.distributed.sharding import FALSE, TRUE, shard, shard_on_cpu, sharding_plugin
from gardo.distributed.signals import StopRequest
from gardo.types import UserError


class Runtime:
    """What the training loop needs to know of the processes it runs on."""

    def __init__(self, device: str = "auto", precision: str = "fp32", threads: int = 0) -> None:
        resolved = resolve_device(device)
        if precision == "fp16" and resolved == "cpu":
            raise UserError("precision: fp16 needs a GPU; on a CPU use fp32 or bf16")
        if threads:
            torch.set_num_threads(threads)
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        mixed = {"fp32": "no"}.get(precision, precision)
        check_launch(os.environ)
        plugin = sharding_plugin(os.environ)
        try:
            self.accelerator: Any = Accelerator(
                cpu=resolved == "cpu",
                mixed_precision=mixed,
                fsdp_plugin=plugin,
                # buffers are tables that never change; sharing them would make every forward wait
                kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            )
        except ValueError as error:  # variables such as ACCELERATE_USE_CPU
            raise UserError(f"accelerate refuses its environment variables: {error}") from error
        self.device: torch.device = self.accelerator.device
        if plugin is not None and self.device.type == "cpu" and self.world_size > 1:
            shard_on_cpu(self.accelerator, plugin)
        self.stop = StopRequest()

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def sharded(self) -> bool:
        """Whether weights are split over the processes; each forward then waits for all others."""
        return bool(self.accelerator.is_fsdp2)

    def prepare(self, module: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        """What trains instead of the module and its optimizer; sharding replaces parameters."""
        if self.sharded:
            return module, shard(self.accelerator, module, optimizer)
        with warnings.catch_warnings():
            # accelerate knows no other name for it yet
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            wrapped: tuple[Any, Any] = self.accelerator.prepare(module, optimizer)
        return wrapped

    def shard(self, module: nn.Module) -> None:
        """Shard, in place, a module that is not trained."""
        shard(self.accelerator, module)

    def forwards(self, count: int) -> int:
        """How many forwards to make for the ``count`` that this process needs.

        Where weights are sharded it is the largest count of all processes, which all call this.
        """
        if not self.sharded or self.world_size == 1:
            return count
        return int(self.max(torch.tensor(count, device=self.device)))

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            self.accelerator.wait_for_everyone()

    def stop_point(self) -> None:
        """A place between two micro-batches; raises StopRequested if a signal came.

        Several processes cannot leave each other here: they go on to `stop_together`.
        """
        if self.world_size == 1:
            self.stop.check()

    def stop_together(self) -> None:
        """A place that all processes come to; StopRequested on all if a signal came to one."""
        if self.world_size > 1:
            own = 0 if self.stop.signal is None else int(signal.Signals[self.stop.signal])
            came = int(self.max(torch.tensor(own, device=self.device)))
            if came == 0:  # a signal since then waits for the next such place, as the others do
                return
            self.stop.tell(signal.Signals(came).name)
        self.stop.check()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the block waits for others, a signal need not (see `StopRequest.waiting`)."""
        if self.world_size > 1:
            yield
            return
        with self.stop.waiting():
            yield

    def gather(self, rows: Tensor, sample_ids: Tensor, total: int) -> Tensor:
        """Collect every process's rows in the order of their sample ids.

        Args:
            rows: ``[n, ...]`` of this process.
            sample_ids: ``[n]`` int64, where each row stands in the result.
            total: rows over all processes.

        Returns:
            ``[total, ...]`` on this process's device, the same on all processes.
        """
        ids = sample_ids.to(rows.device)
        if self.world_size > 1:
            padded = self.accelerator.pad_across_processes(rows, dim=0)
            ids = self.accelerator.pad_across_processes(ids, dim=0, pad_index=-1)
            rows, ids = self.accelerator.gather(padded), self.accelerator.gather(ids)
            rows, ids = rows[ids >= 0], ids[ids >= 0]
        out = rows.new_empty((total, *rows.shape[1:]))
        out[ids] = rows
        return out

    def sum(self, value: Tensor) -> Tensor:
        """Sum over processes."""
        return self.accelerator.reduce(value, "sum") if self.world_size > 1 else value

    def max(self, value: Tensor) -> Tensor:
        """Maximum over processes."""
        return self.accelerator.gather(value.reshape(1)).max() if self.world_size > 1 else value

    def union(self, names: Iterable[str]) -> list[str]:
        """The names that any process has, sorted."""
        mine = "\n".join(sorted(names))
        if self.world_size > 1:
            text = torch.tensor([list(mine.encode()) or [0]], dtype=torch.uint8, device=self.device)
            rows = self.accelerator.gather(self.accelerator.pad_across_processes(text, dim=1))
            mine = "\n".join(bytes(row).rstrip(b"\0").decode() for row in rows.tolist())
        return sorted(set(mine.split("\n")) - {""})

    def from_main(self, value: Tensor) -> Tensor:
        """The main process's value, on all processes."""
        if self.world_size == 1:
            return value
        from accelerate.utils import broadcast

        return broadcast(value)

    def close(self) -> None:
        """Leave the group of processes; without it a thread of the group may outlive the run."""
        if self.world_size > 1:
            self.accelerator.wait_for_everyone()
            self.accelerator.state.destroy_process_group()

    def state_dict(self) -> dict[str, Any] | None:
        """Of the loss scaler; None without one."""
        scaler = self.accelerator.scaler
        return None if scaler is None else scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore `state_dict`, where both have a loss scaler."""
        if self.accelerator.scaler is not None and state is not None:
            self.accelerator.scaler.load_state_dict(state)

    def hardware(self) -> str:
        """In words, for reports."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            return f"{self.world_size} x {name}"
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


_FLAGS = (*TRUE, *FALSE)


def check_launch(environment: Mapping[str, str]) -> None:
    """Whether the variables by which launchers tell a process its part make sense.

    Raises:
        UserError: one is no number or flag, out of range, or missing for several processes.
    """
    for name, text in environment.items():
        if name.startswith("ACCELERATE_USE_") and text.lower() not in _FLAGS:
            raise UserError(f"environment variable {name}: expected true or false, got '{text}'")
    numbers = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        number = environment.get(name)
        if number is not None and not number.isdecimal():
            raise UserError(f"environment variable {name}: expected a whole number, got '{number}'")
        numbers[name] = None if number is None else int(number)
    size, rank = numbers["WORLD_SIZE"], numbers["RANK"]
    if size == 0 or (size is not None and rank is not None and rank >= size):
        raise UserError(
            f"environment variables: expected RANK below WORLD_SIZE, got RANK {rank} and "
            f"WORLD_SIZE {size}"
        )
    if size is not None and size > 1:
        for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(name):
                raise UserError(
                    f"environment variable {name}: expected a value, because WORLD_SIZE is {size}; "
                    "start several processes with accelerate launch or torchrun"
                )


def resolve_device(device: str) -> str:
    """Turn ``auto`` into what is there. UserError for ``cuda`` without a GPU."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("device: expected cpu or auto, got 'cuda', but torch sees no CUDA device")
    return ("cuda" if available else "cpu") if device == "auto" else device
