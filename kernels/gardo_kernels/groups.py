"""Reductions over groups given by arbitrary int64 ids: deterministic, without waiting for a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """``N`` samples sorted by group.

    ``order`` sorts them; ``member`` is the group of each sample, numbered from 0; ``sizes`` has
    ``N`` entries, zero beyond the last group, because the number of groups is only known on the
    device.
    """

    order: Tensor
    member: Tensor
    sizes: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the group of each sample, ``[N]``.

        A segmented reduction of sorted values has a fixed order on CUDA, unlike scatter-add.
        """
        if values.numel() == 0:
            return torch.zeros_like(values)
        # "unsafe" leaves out a check of `sizes` that would wait for the device.
        total = torch.segment_reduce(values[self.order], "sum", lengths=self.sizes, unsafe=True)
        return total[self.member]

    def mean(self, values: Tensor, valid: Tensor) -> Tensor:
        """Mean over the valid samples of the group of each sample, ``[N]``; 0 if there is none."""
        total = self.sum(torch.where(valid, values, torch.zeros_like(values)))
        return total / self.sum(valid.to(values.dtype)).clamp(min=1)


def group(ids: Tensor) -> Groups:
    """Sort samples by group id."""
    ordered, order = torch.sort(ids, stable=True)
    is_new = torch.ones_like(ordered)
    is_new[1:] = ordered[1:] != ordered[:-1]
    number = is_new.cumsum(0) - 1
    member = torch.empty_like(number).scatter_(0, order, number)
    sizes = torch.zeros_like(number).scatter_add_(0, number, torch.ones_like(number))
    return Groups(order, member, sizes)
