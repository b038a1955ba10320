"""Plain PyTorch form of the distance to the nearest neighbour of the group: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from gardo_kernels.checks import compute_dtype

# Bounds the [groups, rows, members] similarity block, so that large groups stay in memory.
_MAX_BLOCK = 1 << 24


def nearest_neighbor_distance(features: Tensor, group_ids: Tensor) -> Tensor:
    """Cosine distance to the nearest other member, ``[N]``; 0 for a singleton.

    Computed in float64 because 1 - cosine cancels: near-duplicates would be rounding noise.
    """
    unit = normalized(features.to(torch.float64))
    distance = torch.zeros(features.shape[0], dtype=torch.float64, device=features.device)
    order = torch.argsort(group_ids, stable=True)
    _, sizes = torch.unique_consecutive(group_ids[order], return_counts=True)
    starts = sizes.cumsum(0) - sizes
    for size in sizes.unique().tolist():  # groups of one size form a batch
        if size == 1:
            continue
        first = starts[sizes == size]
        index = order[first[:, None] + torch.arange(size, device=first.device)]
        groups_per_block = max(1, _MAX_BLOCK // (size * max(size, features.shape[1])))
        for members in index.split(groups_per_block):
            distance[members] = _within(unit[members])
    distance = torch.where(unit.isnan().any(-1), torch.nan, distance)
    return distance.to(compute_dtype(features))


def normalized(features: Tensor) -> Tensor:
    """Rows of unit length; a zero row stays zero (distance 1 to everything), NaN stays NaN."""
    norm = features.norm(dim=-1, keepdim=True)
    return features / torch.where(norm > 0, norm, torch.ones_like(norm))


def _within(unit: Tensor) -> Tensor:
    """``[g, m, D]`` to ``[g, m]``: distance of each member to its nearest other."""
    size = unit.shape[1]
    rows_per_block = max(1, _MAX_BLOCK // (unit.shape[0] * size))
    blocks = []
    for start in range(0, size, rows_per_block):
        rows = unit[:, start : start + rows_per_block]
        similarity = rows @ unit.transpose(1, 2)
        # A member with NaN features is nobody's neighbour.
        similarity = similarity.nan_to_num(nan=-torch.inf)
        offset = torch.arange(rows.shape[1], device=unit.device)
        similarity[:, offset, offset + start] = -torch.inf
        blocks.append(similarity.amax(-1))
    nearest = torch.cat(blocks, dim=1)
    distance = (1 - nearest).clamp(0, 2)
    # No usable neighbour at all: as a singleton.
    return torch.where(nearest.isinf(), 0.0, distance)
