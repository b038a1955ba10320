"""Which samples of an epoch this process draws, and in which update each is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    """

    sample_ids: Tensor
    updates: tuple[slice, ...]
    update_sizes: tuple[int, ...]
    prompts: int

    @property
    def prompt_index(self) -> Tensor:
        """``[n]`` int64: which of the epoch's prompts each sample belongs to."""
        return self.sample_ids % self.prompts

    def batch_size(self, largest: int) -> int:
        """The size of all batches: ``largest``, or less if no update fills it."""
        return max(1, min(largest, max(rows.stop - rows.start for rows in self.updates)))


def plan_epoch(
    prompts: int, group_size: int, updates: int, rank: int = 0, world_size: int = 1
) -> EpochPlan:
    """Split ``prompts * group_size`` samples into updates of nearly equal size."""
    total = prompts * group_size
    ids, slices, sizes, start = [], [], [], 0
    for u in range(updates):
        first, last = u * total // updates, (u + 1) * total // updates
        mine = torch.tensor(range(first + rank, last, world_size), dtype=torch.int64)
        ids.append(mine)
        slices.append(slice(start, start + len(mine)))
        sizes.append(last - first)
        start += len(mine)
    return EpochPlan(torch.cat(ids), tuple(slices), tuple(sizes), prompts)


def batches(rows: slice, batch_size: int) -> list[slice]:
    """Cut a slice of rows into consecutive slices of at most ``batch_size``."""
    return [
        slice(start, min(start + batch_size, rows.stop))
        for start in range(rows.start, rows.stop, batch_size)
    ]


def padded_rows(rows: slice, batch_size: int, device: torch.device) -> Tensor:
    """Indices of a batch, filled up to ``batch_size`` by repeating its last row.

    Full batches keep matrix products, and with them log-probs, bitwise equal between rollout
    and training.
    """
    index = torch.arange(rows.start, rows.start + batch_size, device=device)
    return index.clamp_(max=rows.stop - 1)
