"""CPU kernel of the nearest-neighbour distance (see ``_native`` and ``csrc``)."""

from __future__ import annotations

from torch import Tensor

from gardo_kernels import _native


def nearest_neighbor_distance(features: Tensor, group_ids: Tensor) -> Tensor:
    """``[N]`` float32."""
    return _native.nearest_neighbor_distance(features.contiguous(), group_ids.contiguous())
