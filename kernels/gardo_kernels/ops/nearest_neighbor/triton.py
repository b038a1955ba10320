"""Triton backend of the nearest-neighbour distance: normalise, Gram and minimum in one kernel."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels import triton_helpers as common

_MEMBERS = 32  # members per block: one block holds the usual group of 24
_FEATURES = 32  # feature columns per block
_WARPS = 8  # four would hold twice the accumulators each, and spill


@triton.jit
def _nearest_kernel(
    features_ptr, row_stride, column_stride, order_ptr, first_ptr, last_ptr, distance_ptr,
    dimension, MEMBERS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Rows ``position .. position+MEMBERS`` of one group against all members of the group.

    One program per sorted position; all but those at the start of a block leave at once, so the
    host never needs to know the number of groups.
    """
    position = tl.program_id(0).to(tl.int64)
    first = tl.load(first_ptr + position)
    last = tl.load(last_ptr + position)
    if (position - first) % MEMBERS != 0:
        return
    lane = tl.arange(0, MEMBERS)
    rows = position + lane
    is_row = rows < last
    row_index = tl.load(order_ptr + rows, mask=is_row, other=0)
    best = tl.full((MEMBERS,), float("-inf"), dtype=tl.float32)
    row_norm = tl.zeros((MEMBERS,), dtype=tl.float32)
    for start in range(first, last, MEMBERS):
        columns = start + lane
        is_column = columns < last
        column_index = tl.load(order_ptr + columns, mask=is_column, other=0)
        dot = tl.zeros((MEMBERS, MEMBERS), dtype=tl.float32)
        row_square = tl.zeros((MEMBERS,), dtype=tl.float32)
        column_square = tl.zeros((MEMBERS,), dtype=tl.float32)
        for feature in range(0, dimension, FEATURES):
            f = feature + tl.arange(0, FEATURES)
            inside = f < dimension
            x = tl.load(
                features_ptr + row_index[:, None] * row_stride + f[None, :] * column_stride,
                mask=is_row[:, None] & inside[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            y = tl.load(
                features_ptr + column_index[:, None] * row_stride + f[None, :] * column_stride,
                mask=is_column[:, None] & inside[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            dot = tl.dot(x, tl.trans(y), dot, input_precision="ieee")
            row_square += tl.sum(x * x, axis=1)
            column_square += tl.sum(y * y, axis=1)
        row_norm = tl.sqrt(row_square)
        column_norm = tl.sqrt(column_square)
        product = row_norm[:, None] * column_norm[None, :]
        cosine = tl.where(product > 0, dot / tl.where(product > 0, product, 1.0), 0.0)
        # A row with a NaN or an infinity has no finite norm: nobody's neighbour.
        usable = is_column & (column_norm < float("inf"))
        usable = usable[None, :] & (rows[:, None] != columns[None, :])
        best = tl.maximum(best, tl.max(tl.where(usable, cosine, float("-inf")), axis=1))
    distance = tl.where(best == float("-inf"), 0.0, 1.0 - best)
    distance = tl.minimum(tl.maximum(distance, 0.0), 2.0)
    distance = tl.where(row_norm < float("inf"), distance, float("nan"))
    tl.store(distance_ptr + row_index, distance, mask=is_row)


def nearest_neighbor_distance(features: Tensor, group_ids: Tensor) -> Tensor:
    """``[N]`` float32, without host synchronisation."""
    count = features.shape[0]
    sorted_ids, order = torch.sort(group_ids, stable=True)
    first = torch.searchsorted(sorted_ids, sorted_ids)
    last = torch.searchsorted(sorted_ids, sorted_ids, right=True)
    distance = torch.empty(count, dtype=torch.float32, device=features.device)
    common.launch(
        _nearest_kernel,
        count,
        features.device,
        *(features, features.stride(0), features.stride(1), order, first, last, distance),
        features.shape[1],
        MEMBERS=_MEMBERS,
        FEATURES=_FEATURES,
        num_warps=_WARPS,
    )
    return distance


def call_every_form(dtype: torch.dtype) -> None:
    """Launch the kernel in every form that it is compiled in (see ``aot``)."""
    features = torch.zeros(48, 1024, dtype=dtype)
    nearest_neighbor_distance(features, torch.zeros(48, dtype=torch.int64))
