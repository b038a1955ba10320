"""Reductions over groups given by arbitrary int64 ids, deterministic on every device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Samples sorted by group: ``order`` [N], the group of each sample [N], group sizes [G]."""

    order: Tensor
    member: Tensor
    sizes: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """Sum per group, ``[G]``.

        A segmented reduction over sorted values: unlike scatter-add it has a fixed order on CUDA.
        """
        if values.numel() == 0:
            return values.new_zeros(self.sizes.shape)
        return torch.segment_reduce(values[self.order], "sum", lengths=self.sizes)

    def mean(self, values: Tensor, valid: Tensor) -> Tensor:
        """Mean per group over the valid samples, given back per sample ``[N]``; 0 if none."""
        total = self.sum(torch.where(valid, values, torch.zeros_like(values)))
        count = self.sum(valid.to(values.dtype)).clamp(min=1)
        return (total / count)[self.member]


def group(ids: Tensor) -> Groups:
    """Sort samples by group id."""
    order = torch.argsort(ids, stable=True)
    _, member, sizes = torch.unique(ids, return_inverse=True, return_counts=True)
    return Groups(order, member, sizes)
