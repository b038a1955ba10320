"""Cosine distance to the nearest neighbour of the same group."""

from __future__ import annotations

import torch
from torch import Tensor

from gardo_kernels import _backends, _checks
from gardo_kernels.ops.nearest_neighbor import faiss, reference
from gardo_kernels.ops.sde.fused import kernels

__all__ = ["nearest_neighbor_distance"]

_BACKENDS: dict[str, _backends.Availability] = {
    "native": _backends.native_cpu,
    "triton": _backends.triton,
    "reference": _backends.always,
    "faiss": faiss.unavailable,
}


@torch.library.custom_op("gardo::nearest_neighbor_distance", mutates_args=())
def _fused(features: Tensor, group_ids: Tensor, backend: str) -> Tensor:
    return kernels("nearest_neighbor", backend).nearest_neighbor_distance(features, group_ids)


@_fused.register_fake
def _(features: Tensor, group_ids: Tensor, backend: str) -> Tensor:
    return features.new_empty(features.shape[0], dtype=torch.float32)


def nearest_neighbor_distance(
    features: Tensor, group_ids: Tensor, backend: str | None = None
) -> Tensor:
    """``1 - cosine similarity`` to the nearest *other* member of the sample's group.

    Args:
        features: ``[N, D]`` floating, of any length (they are normalised here). A zero row is at
            distance 1 from everything; a row with a NaN has distance NaN and is no one's
            neighbour.
        group_ids: int64 ``[N]`` in any order.
        backend: None for the best available, or a name; ``faiss`` for very large groups.

    Returns:
        ``[N]`` in ``[0, 2]``, 0 for a singleton; float64 for float64 features, else float32.

    Raises:
        TypeError, ValueError: wrong type, shape, dtype or device.
        BackendUnavailable: the backend asked for cannot run here.
    """
    _checks.floating("features", features)
    if features.dim() != 2:
        raise ValueError(f"features: expected shape [N, D], got {list(features.shape)}")
    if features.shape[0] > 0 and features.shape[1] == 0:
        raise ValueError(f"features: expected D >= 1, got shape {list(features.shape)}")
    _checks.group_ids(group_ids, features.shape[0], features.device)
    dtype = _checks.compute_dtype(features)
    chosen = _backends.select(
        "nearest_neighbor_distance", backend, features.device, dtype, _BACKENDS
    )
    features = features.detach()
    if chosen == "reference":
        return reference.nearest_neighbor_distance(features, group_ids).to(dtype)
    if chosen == "faiss":
        return faiss.nearest_neighbor_distance(features, group_ids).to(dtype)
    return _fused(features, group_ids, chosen)
