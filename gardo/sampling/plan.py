"""Which samples of an epoch this process draws, and in which update each is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gardo.types import UserError


@dataclass(frozen=True)
class EpochPlan:
    """The samples of one epoch on one process.

    Sample ``i`` of the ``P x G`` samples belongs to prompt ``i % P``: consecutive samples belong
    to different prompts, so every update sees all prompts. Update ``u`` trains the same samples
    whatever the number of processes; each process takes every ``world_size``-th of them.

    Attributes:
        sample_ids: ``[n]`` int64, this process's samples, in the order of the updates.
        updates: a slice of ``sample_ids`` per optimizer step.
        update_sizes: samples per optimizer step over all processes.
        prompts: P.
        world_size: processes among which the samples are shared out.
    """

    sample_ids: Tensor
    updates: tuple[slice, ...]
    update_sizes: tuple[int, ...]
    prompts: int
    world_size: int = 1

    @property
    def prompt_index(self) -> Tensor:
        """``[n]`` int64: which of the epoch's prompts each sample belongs to."""
        return self.sample_ids % self.prompts

    def batch_size(self, largest: int) -> int:
        """The size of all batches: ``largest``, or less if no update of any process fills it."""
        return max(1, min(largest, *(self._most_rows(size) for size in self.update_sizes)))

    def batches(self, update: int, batch_size: int) -> list[slice]:
        """The rows of an update in slices of at most ``batch_size``.

        Every process gets the same number of slices, since its forwards and backwards wait for
        those of the others; one that has no rows left gets empty slices.
        """
        rows = self.updates[update]
        starts = range(0, self._most_rows(self.update_sizes[update]), batch_size)
        bounds = [(rows.start + s, rows.start + s + batch_size) for s in starts]
        return [slice(min(a, rows.stop), min(b, rows.stop)) for a, b in bounds]

    def _most_rows(self, update_size: int) -> int:
        """Rows of an update on the process that has most of them."""
        return -(-update_size // self.world_size)


def plan_epoch(
    prompts: int, group_size: int, updates: int, rank: int = 0, world_size: int = 1
) -> EpochPlan:
    """Split ``prompts * group_size`` samples into updates of nearly equal size.

    Raises:
        UserError: an update has fewer samples than there are processes.
    """
    total = prompts * group_size
    if total // updates < world_size:
        raise UserError(
            f"prompts.per_epoch x prompts.group_size: expected at least "
            f"{world_size * updates} samples, one per process ({world_size}) and update "
            f"({updates}), got {total}"
        )
    ids, slices, sizes, start = [], [], [], 0
    for u in range(updates):
        first, last = u * total // updates, (u + 1) * total // updates
        mine = torch.tensor(range(first + rank, last, world_size), dtype=torch.int64)
        ids.append(mine)
        slices.append(slice(start, start + len(mine)))
        sizes.append(last - first)
        start += len(mine)
    return EpochPlan(torch.cat(ids), tuple(slices), tuple(sizes), prompts, world_size)


def batches(rows: slice, batch_size: int) -> list[slice]:
    """Cut a slice of rows into consecutive slices of at most ``batch_size``."""
    return [
        slice(start, min(start + batch_size, rows.stop))
        for start in range(rows.start, rows.stop, batch_size)
    ]


def shared_batches(
    count: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> tuple[list[slice], int]:
    """Deal out the batches of ``count`` rows to the processes in turn.

    The batches are those of one process, so that results are, too.

    Returns:
        this process's batches, and how many fewer these are than those of the first process.
    """
    every = batches(slice(0, count), batch_size)
    mine = every[rank::world_size]
    return mine, len(every[::world_size]) - len(mine)


def padded_rows(rows: slice, batch_size: int, device: torch.device) -> Tensor:
    """Indices of a batch, filled up to ``batch_size`` by repeating its last row.

    An empty slice is filled with the row before it.

    Full batches keep matrix products, and with them log-probs, bitwise equal between rollout
    and training.
    """
    index = torch.arange(rows.start, rows.start + batch_size, device=device)
    return index.clamp_(max=rows.stop - 1)
