"""A row sum whose bits depend on that row alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def row_mean(values: Tensor) -> Tensor:
    """Mean of each row of ``[B, ...]`` by a fixed binary tree, ``[B]``.

    ``torch.mean`` chooses its order of additions by the batch size and the number of threads, so
    the same row can give other bits in another batch. The tree uses elementwise additions only:
    its result depends on nothing but the row, on any device. This is what makes the on-policy
    ratio exactly 1 when sampling and training use different batch sizes.
    """
    n = math.prod(values.shape[1:])
    width = 1 << max(n - 1, 0).bit_length()
    # Zero padding is exact, and a power of two keeps the tree's shape simple.
    total = torch.nn.functional.pad(values.reshape(values.shape[0], n), (0, width - n))
    while width > 1:
        width //= 2
        total = total[:, :width] + total[:, width:]
    return total[:, 0] / n
