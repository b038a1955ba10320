"""The C++ kernel of the nearest-neighbour distance, on CPU features."""

from __future__ import annotations

import torch
from torch import Tensor

from gardo_kernels import core


def nearest_neighbor_distance(features: Tensor, group_ids: Tensor) -> Tensor:
    """Cosine distance to the nearest other member of the group, ``[N]`` float32 in ``[0, 2]``.

    ``features`` ``[N, D]`` float32, float16 or bfloat16 of any length, ``group_ids`` ``[N]`` int64.
    0 for a sample without another usable member, NaN for a row that is not finite (it is no one's
    neighbour), distance 1 from and to a zero row, exactly 0 between identical rows.
    """
    distance, _ = _distance(features, group_ids, group_ids.numel())
    return distance


def distance_up_to(features: Tensor, group_ids: Tensor, max_group: int) -> Tensor | None:
    """As above; None, with nothing computed, where a group has more than ``max_group`` members."""
    distance, computed = _distance(features, group_ids, max_group)
    return distance if computed else None


def _distance(features: Tensor, group_ids: Tensor, max_group: int) -> tuple[Tensor, bool]:
    if features.dim() != 2:
        raise ValueError(f"features: expected shape [N, D], got {list(features.shape)}")
    features, group_ids = features.contiguous(), group_ids.contiguous()
    samples, dim = features.shape
    distance = core.float32(samples)
    computed = core.require_core().nearest_neighbor(
        features=core.latents("features", features, features),
        group_ids=core.array("group_ids", group_ids, torch.int64, (samples,)),
        num_samples=samples,
        dim=dim,
        max_group=max_group,
        num_threads=torch.get_num_threads(),
        distance=distance.data_ptr(),
    )
    return distance, computed
